"""Linear layers that read one tensor are multiplied in one call: queries, keys and values; gate and up.

A model calls them one after another with the same tensor. `note` sees that and makes a `SharedInput` of them; from then
on the first of them to be called computes all, in one call that prepares the activations and starts the threads once
(`abi.matmul_group`), and the others find their results waiting. A result is the bits that the layer computes alone.

Waiting results are for that very tensor, unchanged: the same object with the same version of its contents. Tensors of
inference mode have no versions, so nothing is shared there. Layers that turn out not to be called together are let go.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit import _C, abi

if TYPE_CHECKING:
    from lowbit.matrix import PackedMatrix
    from lowbit.nn import Linear

_PATIENCE = 3  # calls whose results nobody fetched, after which layers are let go


class SharedInput:
    """Some layers that are called together. Holds them weakly: it is they who keep it."""

    def __init__(self, members: list[Linear]):
        self._members = [weakref.ref(member) for member in members]
        # By thread: the input, its version, and of each layer the matrix and the result.
        self._waiting: dict[int, tuple[Tensor, int, dict[int, tuple[PackedMatrix, Tensor]]]] = {}
        self._unfetched = 0

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """layer's x W^T + bias, and those of the others for later."""
        thread = threading.get_ident()
        waiting = self._waiting.pop(thread, None)
        if waiting is not None:
            source, version, results = waiting
            matrix, y = results.pop(id(layer), (None, None))
            if matrix is layer.packed and source is x and version == x._version:
                if results:
                    self._waiting[thread] = waiting
                return y
            self._unfetched += 1
            if self._unfetched > _PATIENCE:
                self._let_go()
                return abi.matmul(layer.packed._view, x, layer.bias, layer.activations)
        members = [member for ref in self._members if (member := ref()) is not None and _joins(member, layer)]
        matrices, biases = [member.packed for member in members], [member.bias for member in members]
        ys = abi.matmul_group([matrix._view for matrix in matrices], x, biases, layer.activations)
        results = dict(zip(map(id, members), zip(matrices, ys, strict=True), strict=True))
        _, own = results.pop(id(layer))
        if results:
            self._waiting[thread] = x, x._version, results
        return own

    def _let_go(self) -> None:
        for ref in self._members:
            if (member := ref()) is not None:
                member.shares_input, member.shared_input = False, None

    def __deepcopy__(self, memo: dict) -> None:
        return None  # copies find each other again


def _joins(member: Linear, layer: Linear) -> bool:
    return member is layer or (
        member.layout is not None
        and member.layout.cols == layer.layout.cols
        and member.activations == layer.activations
        and member.rms_norm is None
        and member.weight.device == layer.weight.device
        and (member.bias is None or not member.bias.requires_grad)
    )


class _Last(threading.local):
    """What this thread's last layers read."""

    source: weakref.ref | None = None
    version = 0
    layers: tuple = ()


_last = _Last()


def note(layer: Linear, x: Tensor) -> None:
    """Tells that a layer has just read x; after two or more in a row read the same, they share it."""
    if x.is_cuda or x.is_inference():
        return
    last = _last
    if last.source is not None and last.source() is x and last.version == x._version:
        last.layers = (*last.layers, weakref.ref(layer))
        return
    if 1 < len(last.layers) <= _C.MAX_GROUP:
        layers = [found for ref in last.layers if (found := ref()) is not None]
        if len({id(found) for found in layers}) == len(layers) > 1:
            shared = SharedInput(layers)
            for found in layers:
                found.shared_input = shared
    last.source, last.version, last.layers = weakref.ref(x), x._version, (weakref.ref(layer),)
