"""Runs the blocks of a model one at a time, each on what it would get inside the model.

A survey runs the model once and notes, for every block, where each tensor among its arguments comes from: the
output of the block before it (`flow`), or something made elsewhere and seen here for the first time
(`stored`: the first hidden states, masks, position embeddings). Blocks linked by a flow form a segment. To
begin a segment the model runs up to its first block, or to the last block that meets something new; from then
on blocks are called alone, with their stored tensors and the outputs of the block before. So masks that
differ from block to block, an encoder beside a decoder and models that do something between their blocks all
work without being known by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Forward = Callable[[int], object]  # runs the whole model on the batch of this number


class _Stop(Exception):
    """Ends a forward pass when all that was wanted of it has been seen."""


@dataclass(frozen=True)
class _Slot:
    """A tensor among a block's arguments: output `index` of the block before, or stored tensor `index`."""

    flows: bool
    index: int


@dataclass
class _Step:
    """One block of a segment: its arguments with slots for tensors, and the slots that are new here, as
    (position among the tensors of the arguments, slot index)."""

    name: str
    block: nn.Module
    arguments: Any
    new: list[tuple[int, int]]


@dataclass
class Segment:
    """Consecutive blocks, each taking outputs of the one before."""

    steps: list[_Step] = field(default_factory=list)

    def until(self, wanted: Callable[[_Step], bool]) -> Segment:
        """The segment up to the last block that is wanted; what comes after it need not run."""
        last = max((i for i, step in enumerate(self.steps) if wanted(step)), default=-1)
        return Segment(self.steps[: last + 1])


@dataclass
class Survey:
    """How a model runs its blocks. segments: blocks that run once a forward pass, in order of execution.
    order: names of the watched modules and of the blocks by first execution; repeated: blocks that run
    several times."""

    segments: list[Segment]
    order: list[str]
    repeated: set[str]


def survey(forward: Forward, blocks: dict[str, nn.Module], watched: dict[str, nn.Module]) -> Survey:
    """Runs the model on batch 0 and notes how it calls its blocks and the watched modules."""
    segments: list[Segment] = []
    order: list[str] = []
    counts: dict[str, int] = {}
    origins: dict[int, tuple[weakref.ref, int]] = {}
    previous: list[torch.Tensor] = []

    def enter(name: str):
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > 1:
                return
            order.append(name)
            flows = {id(t): i for i, t in enumerate(previous)}
            if not any(id(t) in flows for t in tensors((args, kwargs))):
                segments.append(Segment())
                origins.clear()
            new: list[tuple[int, int]] = []
            position = -1

            def slot(tensor: torch.Tensor) -> _Slot:
                nonlocal position
                position += 1
                if id(tensor) in flows:
                    return _Slot(True, flows[id(tensor)])
                # The reference tells a tensor met before from a new one at the same address.
                origin = origins.get(id(tensor))
                if origin is None or origin[0]() is not tensor:
                    origin = origins[id(tensor)] = (
                        weakref.ref(tensor),
                        sum(len(s.new) for s in segments[-1].steps) + len(new),
                    )
                    new.append((position, origin[1]))
                return _Slot(False, origin[1])

            segments[-1].steps.append(_Step(name, block, map_tensors(slot, (args, kwargs)), new))
            previous.clear()

        return hook

    def leave(_block: nn.Module, _args: tuple, output: Any) -> None:
        previous[:] = tensors(output)

    def watch(name: str):
        return lambda *_: order.append(name) if name not in order else None

    with hooks() as add:
        for name, block in blocks.items():
            add(block.register_forward_pre_hook(enter(name), with_kwargs=True))
            add(block.register_forward_hook(leave))
        for name, module in watched.items():
            add(module.register_forward_pre_hook(watch(name)))
        forward(0)

    repeated = {name for name, count in counts.items() if count > 1}
    # A segment that holds a block met again later cannot be replayed in order.
    usable = [s for s in segments if not repeated & {step.name for step in s.steps}]
    repeated |= {step.name for s in segments if s not in usable for step in s.steps}
    return Survey(usable, order, repeated)


class Replay:
    """The blocks of a segment on all batches: `run(i, batch)` calls block i, `advance(i)` moves on to the
    next.

    What is kept: the stored tensors until their last use, and the outputs of one block, both in the model's
    dtype.
    """

    def __init__(self, forward: Forward, segment: Segment, batches: int) -> None:
        self.steps = segment.steps
        self._stored: list[dict[int, torch.Tensor]] = [{} for _ in range(batches)]
        self._flow: list[dict[int, torch.Tensor]] = [{} for _ in range(batches)]
        self._last_use: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for slot in _slots(step.arguments):
                if not slot.flows:
                    self._last_use[slot.index] = i
        for batch in range(batches):
            self._capture(forward, batch)

    @property
    def batches(self) -> int:
        return len(self._stored)

    @torch.inference_mode()
    def run(self, i: int, batch: int) -> Any:
        """The output of block i on one batch."""
        step, stored, flow = self.steps[i], self._stored[batch], self._flow[batch]
        args, kwargs = map_slots(lambda s: flow[s.index] if s.flows else stored[s.index], step.arguments)
        return step.block(*args, **kwargs)

    def advance(self, i: int) -> None:
        """Runs block i as it is now on every batch and keeps what the block after it takes."""
        for batch in range(self.batches):
            if i + 1 < len(self.steps):
                outputs = tensors(self.run(i, batch))
                wanted = {s.index for s in _slots(self.steps[i + 1].arguments) if s.flows}
                self._flow[batch] = {index: outputs[index] for index in wanted}
            else:
                self._flow[batch] = {}
            for index in [index for index in self._stored[batch] if self._last_use[index] <= i]:
                del self._stored[batch][index]

    def _capture(self, forward: Forward, batch: int) -> None:
        last = max(i for i, step in enumerate(self.steps) if step.new or i == 0)
        stored, first = self._stored[batch], self._stored[0]

        def take(i: int):
            def hook(_block: nn.Module, args: tuple, kwargs: dict) -> None:
                found = tensors((args, kwargs))
                for position, index in self.steps[i].new:
                    tensor = found[position]
                    # Masks and position embeddings are the same for every batch: keep one.
                    same = batch > 0 and tensor.shape == first[index].shape and torch.equal(tensor, first[index])
                    stored[index] = first[index] if same else tensor
                if i == last:
                    raise _Stop

            return hook

        with hooks() as add:
            for i, step in enumerate(self.steps[: last + 1]):
                add(step.block.register_forward_pre_hook(take(i), with_kwargs=True))
            until_stop(forward, batch)


def until_stop(forward: Callable[..., object], *args: Any) -> None:
    """Calls forward, which a hook may end early by `stop()`."""
    with suppress(_Stop):
        forward(*args)


def stop() -> None:
    """Called in a hook: ends the forward pass that `until_stop` started."""
    raise _Stop


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """`with hooks() as add: add(module.register_forward_hook(f))`: removed at the end, also after an
    error."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda t: found.append(t), tree)
    return found


def map_tensors(fn: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    return _map(fn, tree, torch.Tensor)


def map_slots(fn: Callable[[_Slot], Any], tree: Any) -> Any:
    return _map(fn, tree, _Slot)


def _slots(tree: Any) -> list[_Slot]:
    found: list[_Slot] = []
    map_slots(lambda s: found.append(s), tree)
    return found


def _map(fn: Callable[[Any], Any], tree: Any, leaf: type) -> Any:
    """A copy of nested tuples, lists and dicts with every `leaf` replaced; anything else stays."""
    if isinstance(tree, leaf):
        return fn(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(fn, item, leaf) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_map(fn, item, leaf) for item in tree)
    if isinstance(tree, dict):
        # A plain dict, since ModelOutput and the like check what they are made of.
        return {key: _map(fn, item, leaf) for key, item in tree.items()}
    return tree
