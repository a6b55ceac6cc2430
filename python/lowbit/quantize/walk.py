"""Takes every matrix of a model to the inputs that calibration gives it, block by block.

    modules before the blocks
    block 0: stage, stage, ...
    block 1: ...
    modules after them, the head

A block's modules form stages in order of execution; modules that read the same tensor (query, key and value, gate and
up) share one Hessian and one stage. What is done with a Hessian is a subclass's business: `run` packs the modules, so
that what comes after them is calibrated on what they give then; `sensitivity` measures and changes nothing. Beside the
model, memory holds one block's activations for all calibration windows, in the model's dtype, and the Hessians of one
stage: on the GPU of a model that is on one.

With a correction the original network runs beside the quantized one, block by block: its activations are held as
well, and the weights of one block as they were.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.integrations.decoder import by_modules
from lowbit.models import find_blocks, find_targets, replaced
from lowbit.quantize.calibration import token_windows
from lowbit.quantize.correction import LEAST_TOKENS, Drift
from lowbit.quantize.hessian import Hessian
from lowbit.quantize.plan import PlannedModule
from lowbit.quantize.progress import Progress
from lowbit.quantize.replay import Replay, hooks, stop, survey, until_stop

MAX_DEFAULT_CONTEXT = 2048
_BATCH_TOKENS = 4096  # of a batch by default: enough rows for a matrix product to run at its full speed


class Walk:
    """One pass over a model. `left` holds the modules that are still to be met, by name; `with_inputs` and
    `without_inputs` take out what they have done."""

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[PlannedModule],
        windows: torch.Tensor | None,
        *,
        batch_size: int | None,
        true_sequential: bool,
        progress: Progress,
    ) -> None:
        self.model, self.true_sequential, self.progress = model, true_sequential, progress
        self.device = model_device(model)
        self.left = {m.name: m for m in modules}
        # What was packed of blocks that are not done, by name, while the original network runs beside.
        self.originals: dict[str, nn.Module] | None = None
        self.batches: tuple[torch.Tensor, ...] = ()
        if windows is not None:
            size = max(1, _BATCH_TOKENS // windows.shape[1]) if batch_size is None else batch_size
            self.batches = windows.to(self.device).split(size)
        self._call, self._options = _forward_call(model)

    def wants_inputs(self, planned: PlannedModule) -> bool:
        """Whether a Hessian is to be made for a module."""
        return planned.spec.method == "gptq"

    def with_inputs(self, group: list[str], hessian: Hessian, drift: Drift | None) -> None:
        """Does what is to be done with modules that read one input."""
        raise NotImplementedError

    def without_inputs(self, modules: list[PlannedModule], reason: str | None) -> None:
        """The same for modules without a Hessian; reason: why there is none, where one was wanted."""
        raise NotImplementedError

    def tables(self) -> None:
        """Tables before the blocks, which are then calibrated on what the tables give. One that is a head as well is
        solved for the head's inputs in the network as it is now."""
        for planned in [m for m in self.left.values() if m.is_table and self.wants_inputs(m)]:
            head = planned.names[planned.kinds.index("head")]
            module = {planned.name: self.model.get_submodule(head)}
            hessian = self.hessians(self.forward, [[planned.name]], module, True, None, {})[planned.name]
            if hessian.tokens:
                self.with_inputs([planned.name], hessian, None)
        self.without_inputs([m for m in self.left.values() if m.is_table and not self.wants_inputs(m)], None)

    def calibrated(self) -> None:
        """Everything that a forward pass of the model reaches."""
        # A model without blocks is one block.
        blocks = find_blocks(self.model) or {"": self.model}
        inside = {name: self._inside(name) for name in blocks}
        planned_inside = {m for names in inside.values() for m in names}
        outside = [name for name, m in self.left.items() if name not in planned_inside and not m.is_table]
        seen = survey(self.short_forward, blocks, {name: self.model.get_submodule(name) for name in outside})
        outside += [name for block in blocks if block in seen.repeated for name in inside[block]]

        order = {name: i for i, name in enumerate(seen.order)}
        first_block = min((order[name] for name in blocks if name in order), default=0)
        before = [n for n in outside if order.get(n, first_block) < first_block]
        segments = [segment.until(lambda step: bool(inside[step.name])) for segment in seen.segments]
        segments = [segment for segment in segments if segment.steps]
        # The original network's inputs are taken before anything of it is packed.
        batches = len(self.batches)
        corrected = any(corrects(m) for m in self.left.values()) and sum(map(torch.numel, self.batches)) >= LEAST_TOKENS
        originals = [Replay(self.short_forward, s, batches) if corrected else None for s in segments]
        self.tables()
        self.outside_blocks(before)

        total = sum(len(segment.steps) for segment in segments)
        index = 0
        for segment, original in zip(segments, originals, strict=True):
            replay = Replay(self.short_forward, segment, batches)
            self.originals = {} if original else None
            for i, step in enumerate(segment.steps):
                self.progress.on_block_start(index, total, step.name)
                self.stages(partial(replay.run, i), inside[step.name], original=original and partial(original.run, i))
                replay.advance(i)
                if original:
                    with replaced(self.model, self.originals or {}):
                        original.advance(i)
                    done = _prefix(step.name)
                    self.originals = {n: m for n, m in self.originals.items() if not n.startswith(done)}
                self.progress.on_block_end(index, total, step.name)
                index += 1
        self.originals = None
        self.outside_blocks([n for n in outside if n in self.left])

    def outside_blocks(self, names: list[str]) -> None:
        """Modules that are reached only by running the whole model."""
        self.stages(self.forward, names, self.short_forward)

    def stages(
        self,
        forward: Callable[[int], object],
        names: list[str],
        discover: Callable[[int], object] | None = None,
        original: Callable[[int], object] | None = None,
    ) -> None:
        """Some modules stage by stage. forward(batch) reaches them; discover is a cheaper forward pass
        that shows which of them share an input; original(batch) is forward on the original network's inputs."""
        self.without_inputs([self.left[n] for n in names if not self.wants_inputs(self.left[n])], None)
        modules = {name: self.model.get_submodule(name) for name in names if name in self.left}
        if not modules:
            return
        groups, repeated = _shared_inputs(discover or forward, len(self.batches), modules)
        for stage in self._stages(groups) if self.true_sequential else [groups]:
            # Nothing after the only input that is wanted has to run.
            early = len(stage) == 1 and stage[0][0] not in repeated
            drifts = self._drifts(stage) if original else {}
            hessians = self.hessians(forward, stage, modules, early, original, drifts)
            for group in stage:
                self.with_inputs(group, hessians.pop(group[0]), drifts.pop(group[0], None))

    @torch.inference_mode()
    def forward(self, batch: int) -> object:
        """The whole model on one batch."""
        return self._call(self.batches[batch])

    @torch.inference_mode()
    def short_forward(self, batch: int) -> object:
        """The same with logits of the last position only, where the model can: logits are not what is
        wanted."""
        return self._call(self.batches[batch], **self._options)

    def _inside(self, block: str) -> list[str]:
        return [name for name in self.left if name.startswith(_prefix(block))]

    def _stages(self, groups: list[list[str]]) -> list[list[list[str]]]:
        """Groups in stages, in order of execution. The same layer of sibling experts is one stage, or a block
        of many experts would be run once for each of them."""
        stages: dict[str, list[list[str]]] = {}
        for group in groups:
            stages.setdefault(self._without_list_indices(group[0]), []).append(group)
        return list(stages.values())

    def _without_list_indices(self, name: str) -> str:
        parts = name.split(".")
        lists = [isinstance(self.model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(len(parts))]
        return ".".join("*" if inside else part for part, inside in zip(parts, lists, strict=True))

    def hessians(
        self,
        forward: Callable[[int], object],
        stage: list[list[str]],
        modules: dict[str, nn.Module],
        stop_early: bool,
        original: Callable[[int], object] | None,
        drifts: dict[str, Drift],
    ) -> dict[str, Hessian]:
        """The Hessian of every group of a stage, by the name of its first module; fills the drifts, too."""
        hessians = {group[0]: Hessian(self.left[group[0]].shape[1], self.device) for group in stage}
        for batch, ids in enumerate(self.batches):
            before: dict[str, torch.Tensor] = {}

            def keep(name: str, x: torch.Tensor, before=before) -> None:
                before[name] = x.clone()  # a model may go on to change its tensors in place

            if drifts:
                with replaced(self.model, self.originals or {}):
                    _each_input(original, batch, {name: modules[name] for name in drifts}, keep, stop_early)

            def add(name: str, x: torch.Tensor, before=before, ids=ids) -> None:
                if x.numel():
                    hessians[name].add(x)
                # Rows are paired by position, so a module must read all tokens: experts do not.
                then = before.pop(name, None)
                if then is not None and then.shape == x.shape and x[..., 0].numel() == ids.numel():
                    drifts[name].add(then, x)

            _each_input(forward, batch, {name: modules[name] for name in hessians}, add, stop_early)
        return hessians

    def _drifts(self, stage: list[list[str]]) -> dict[str, Drift]:
        """An empty drift for every group of a stage with a module to correct."""
        wanted = [group for group in stage if any(corrects(self.left[name]) for name in group)]
        return {group[0]: Drift(self.left[group[0]].shape[1], self.device) for group in wanted}


def _prefix(block: str) -> str:
    """What the names of the modules in a block begin with; a model without blocks is the block ""."""
    return f"{block}." if block else ""


def _each_input(
    forward: Callable[[int], object],
    batch: int,
    modules: dict[str, nn.Module],
    take: Callable[[str, torch.Tensor], object],
    stop_early: bool,
) -> None:
    """Runs one batch and gives take(name, input) each input of some modules; stop_early: of the first call alone."""

    def hook(name: str):
        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            take(name, _input(args, kwargs))
            if stop_early:
                stop()

        return before

    with hooks() as add:
        for name, module in modules.items():
            add(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        until_stop(forward, batch)


def _shared_inputs(
    forward: Callable[[int], object], batches: int, modules: dict[str, nn.Module]
) -> tuple[list[list[str]], set[str]]:
    """Modules grouped by the tensor that they read, groups in order of execution, and the modules that read several
    tensors in one forward pass, each a group of its own. Modules that are never reached are in no group; batches
    are run until all have been (experts) or there are no more."""
    groups: list[list[str]] = []
    repeated: set[str] = set()
    missing = set(modules)
    for batch in range(batches):
        # The inputs stay alive until the batch is through, so that no address is met twice.
        calls: dict[tuple, tuple[torch.Tensor, list[str]]] = {}

        def note(name: str, calls=calls):
            def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _input(args, kwargs)
                if x.numel():
                    calls.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

            return hook

        with hooks() as add:
            for name, module in modules.items():
                add(module.register_forward_pre_hook(note(name), with_kwargs=True))
            forward(batch)
        readers = [names for _, names in calls.values()]
        counts = Counter(name for names in readers for name in names)
        repeated |= {name for name, count in counts.items() if count > 1}
        for names in readers:
            new = [name for name in dict.fromkeys(names) if name in missing]
            alone = [[name] for name in new if name in repeated]
            shared = [name for name in new if name not in repeated]
            groups += [*([shared] if shared else []), *alone]
            missing -= set(new)
        if not missing:
            break
    return groups, repeated


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def corrects(planned: PlannedModule) -> bool:
    return planned.spec is not None and planned.spec.method == "gptq" and planned.spec.correction != "none"


def model_device(model: nn.Module) -> torch.device:
    """Where a model is. NotImplementedError: in several places, or neither on the CPU nor on a GPU."""
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices)))
        raise NotImplementedError(f"model: expected all parameters on the CPU or on one GPU, got {found}")
    return devices.pop()


def calibration_windows(
    model: nn.Module, calibration: Any, tokenizer: Any = None, *, context: int | None, max_windows: int | None
) -> torch.Tensor:
    """`token_windows` of a length that suits the model, unless one is given, and of its vocabulary."""
    return token_windows(
        calibration,
        tokenizer,
        context=_default_context(model, calibration) if context is None else context,
        vocab_size=_vocabulary(model),
        max_windows=max_windows,
    )


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _default_context(model: nn.Module, calibration: Any) -> int:
    if isinstance(calibration, torch.Tensor) and calibration.ndim == 2:
        return calibration.shape[1]
    longest = getattr(_text_config(model), "max_position_embeddings", None) or MAX_DEFAULT_CONTEXT
    # Some models count positions from 2: RoBERTa's 514 hold 512 tokens.
    return min(longest - longest % 8, MAX_DEFAULT_CONTEXT)


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the token embedding, or what the configuration says."""
    tables = [t.shape[0] for t in find_targets(model) if t.is_table and "embedding" in t.kinds]
    return tables[0] if tables else getattr(_text_config(model), "vocab_size", None)


def _forward_call(model: nn.Module) -> tuple[Callable[..., object], dict[str, Any]]:
    """(call of a model on token ids, without cache; options that spare it logits), from its forward's
    signature."""
    parameters = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in parameters else {}
    options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda ids, **more: model(input_ids=ids, decoder_input_ids=ids, **fixed, **more), options
    if "input_ids" in parameters:
        return lambda ids, **more: model(input_ids=ids, **fixed, **more), options
    return lambda ids, **more: model(ids, **fixed, **more), options


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without caches, layers by their modules; as before afterwards."""
    training = {name: m.training for name, m in model.named_modules()}  # by name: modules are replaced meanwhile
    config = getattr(model, "config", None)
    configs = [c for c in {id(c): c for c in (config, _text_config(model))}.values() if hasattr(c, "use_cache")]
    caches = [(c, c.use_cache) for c in configs]
    model.eval()
    for c in configs:
        c.use_cache = False
    try:
        with by_modules():
            yield
    finally:
        for c, use_cache in caches:
            c.use_cache = use_cache
        for name, mode in training.items():
            model.get_submodule(name).training = mode
