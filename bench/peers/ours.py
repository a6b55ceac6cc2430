"""lowbit: every format, group 128 (int8: one scale a row, ternary: one), both activation modes; its gather."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch

import lowbit
from lowbit import _C, PackedMatrix
from peers import Gather, Matmul, copies_for
from peers.dense import CopiedWeights

GROUPS = {"int2": 128, "int3": 128, "int4": 128, "int8": -1}
BITS = {"trit": 1.6, "int2": 2, "int3": 3, "int4": 4, "int8": 8}


def available() -> dict:
    return {"lowbit": lowbit.__version__, "torch": torch.__version__}


def last_kernel(verb: str) -> str:
    return _C.last_kernel(verb)


def _random(format: str, rows: int, cols: int) -> PackedMatrix:
    """Any codes with one range of scales: the speed does not depend on the values."""
    if format.startswith("ternary"):
        trits = torch.randint(0, 3, (rows, cols), dtype=torch.uint8)
        return PackedMatrix.from_codes(trits, torch.full((1, 1), 0.02), format="trit").repack(format.split()[-1])
    group = GROUPS[format]
    codes = torch.randint(0, 2 ** int(format[3:]), (rows, cols), dtype=torch.uint8)
    groups = 1 if group == -1 else -(-cols // group)
    scales = (torch.rand(rows, groups) * 0.002 + 0.001).half()
    return PackedMatrix.from_codes(codes, scales, format=format, group_size=group)


def _copy(w: PackedMatrix) -> PackedMatrix:
    zeros = None if w.zeros is None else w.zeros.clone()
    return PackedMatrix(w.codes.clone(), w.scales.clone(), zeros, format=w.format, cols=w.cols, group_size=w.group_size)


class _Copies(list):
    """A list that can be referred to weakly."""


# Both activation modes multiply by the same matrices: made once, kept as long as one of the two is held.
_made: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def _weights(format: str, activations: str, cols: int, rows: int, megabytes: int) -> CopiedWeights:
    key = (format, cols, rows, megabytes)
    copies = _made.get(key)
    if copies is None:
        first = _random(format, rows, cols)
        copies = _Copies([first])
        copies.extend(_copy(first) for _ in range(copies_for(first.nbytes, megabytes) - 1))
        _made[key] = copies

    def multiply(x: torch.Tensor, w: PackedMatrix) -> torch.Tensor:
        return w.matmul(x, activations=activations)

    return CopiedWeights(copies, multiply, copies[0].nbytes, cols, torch.float32, lambda: copies[0].unpack())


# Outputs of several types come from the same table: made once, kept as long as one of its subjects is held.
_tables: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class _Table:
    def __init__(self, format: str, dtype: torch.dtype, rows: int, cols: int):
        key = (format, rows, cols)
        self.packed = _tables.get(key)
        if self.packed is None:
            self.packed = _tables[key] = _random(format, rows, cols)
        self.dtype = dtype
        self.row_bytes = self.packed.nbytes // rows

    def ids(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.packed.rows, (count,))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed.gather(ids, dtype=self.dtype)

    def op(self, ids: torch.Tensor) -> torch.Tensor:
        """What a compiled model calls."""
        packed, layout = self.packed, self.packed.layout
        tensors = packed.codes, packed.scales, packed.zeros, packed.perm
        return torch.ops.lowbit.gather(
            ids, *tensors, layout.format, layout.cols, layout.group_size, self.dtype, "error"
        )

    def bags(self, count: int, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids(count), torch.arange(0, count + 1, count // bags)

    def sum(self, bags: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.packed.gather_bags(*bags, dtype=self.dtype)

    def output(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.packed.cols, dtype=self.dtype)

    def gather_into(self, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.packed.gather(ids, dtype=self.dtype, out=output)


def _matmuls() -> list[Matmul]:
    made: list[Matmul] = []
    for format, group in GROUPS.items():
        for mode in ("float", "int8"):
            suffix = "" if group == -1 else f" g{group}"
            weights: Callable = partial(_weights, format, mode)
            made.append(Matmul(f"lowbit {format}{suffix}, {mode}", int(format[3:]), mode == "int8", weights))
    for stored in ("trit", "int2"):
        for mode in ("float", "int8"):
            weights = partial(_weights, f"ternary {stored}", mode)
            name = f"lowbit {stored}" if stored == "trit" else "lowbit ternary as int2"
            made.append(Matmul(f"{name}, {mode}", BITS[stored], mode == "int8", weights, ternary=True))
    return made


def _gathers() -> list[Gather]:
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}
    return [
        Gather(f"lowbit {format} -> {name}", int(format[3:]), name, partial(_Table, format, dtype))
        for format in GROUPS
        for name, dtype in dtypes.items()
    ]


MATMUL = _matmuls()
GATHER = _gathers()
BAGS = [
    Gather("lowbit int4 g128", 4, "f32", partial(_Table, "int4", torch.float32)),
    Gather("lowbit int8", 8, "f32", partial(_Table, "int8", torch.float32)),
]
