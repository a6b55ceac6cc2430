"""Builds of liblowbit in turns, product by product: what a change of kernels gains where a machine's moods change more.

    python bench/builds.py BEFORE/liblowbit.so.0 AFTER/liblowbit.so.0                 every format, one token: 30 s
    python bench/builds.py BEFORE.so AFTER.so --formats int4 --columns 11008 --tokens 1 2 --rounds 41
    LOWBIT_ISA=avx2 python bench/builds.py BEFORE.so AFTER.so --in-cache

Every round gives each build a slice, in an order of chance, on the same matrices of 10 MB: rotating over 300 MB of
them, or with --in-cache one over and over. "gain" is the first build's time over this one's, the median over rounds.
A build whose results are other bits than the first one's is marked.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import statistics
import time
from pathlib import Path

import blocking
import capi
import table
import torch

from lowbit import PackedMatrix, abi

COLUMNS = (2048, 4096, 11008)
SCRATCH = 1 << 25


class Build:
    """A liblowbit of its own, called through the C API."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path.resolve()))
        self._library.lowbit_last_error.restype = ctypes.c_char_p
        pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._library.lowbit_matmul.argtypes = (
            *(ctypes.POINTER(capi.Matrix), pointer, size, number, number),
            *(pointer, size, pointer, number, size, pointer, ctypes.c_size_t),
        )
        self._scratch = torch.empty(SCRATCH + 64, dtype=torch.uint8)
        self._workspace = -(-self._scratch.data_ptr() // 64) * 64

    def matmul(self, matrix: capi.Matrix, x: torch.Tensor, y: torch.Tensor, activations: str) -> None:
        """y (tokens, rows) = x (tokens, cols) . matrix', both float32 and contiguous."""
        tokens, mode = len(x), abi.ACTIVATIONS[activations]
        status = self._library.lowbit_matmul(
            matrix, x.data_ptr(), capi.F32, tokens, x.shape[1], None, capi.F32, y.data_ptr(), y.shape[1], mode,
            self._workspace, SCRATCH,
        )  # fmt: skip
        if status:
            raise capi.LowbitError(f"{self.path}: {self._library.lowbit_last_error().decode()}")


def view(matrix: PackedMatrix, bits: int) -> capi.Matrix:
    """What the C API is given of a matrix of windows(): fp16 scales, no zeros, no permutation."""
    codes, scales = matrix.codes.data_ptr(), matrix.scales
    group = matrix.cols if scales.shape[1] == 1 else matrix.group_size
    return capi.Matrix(
        bits, matrix.rows, matrix.cols, group, codes, scales.data_ptr(), capi.F16, *scales.shape, None, None
    )


def compare(
    builds: list[Build], matrices: list[capi.Matrix], x: torch.Tensor, activations: str, rounds: int
) -> list[tuple[float, float, bool]]:
    """Of each build: seconds a product, its gain over the first, and whether its results are the first one's bits."""
    y = torch.empty(len(x), matrices[0].rows)
    results = []
    for build in builds:  # which warms up, too
        build.matmul(matrices[0], x, y, activations)
        results.append(y.clone())
    turns = itertools.cycle(matrices)
    seconds: list[list[float]] = [[] for _ in builds]
    for _ in range(rounds):
        for i in random.sample(range(len(builds)), len(builds)):
            calls, start = 0, time.perf_counter()
            while (now := time.perf_counter()) - start < blocking.SECONDS:
                builds[i].matmul(next(turns), x, y, activations)
                calls += 1
            seconds[i].append((now - start) / calls)
    return [
        (
            statistics.median(own),
            statistics.median(first / this for first, this in zip(seconds[0], own, strict=True)),
            torch.equal(result, results[0]),
        )
        for own, result in zip(seconds, results, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "libraries", nargs="+", type=Path, metavar="LIBLOWBIT", help="the first is the one compared with"
    )
    parser.add_argument("--formats", nargs="+", choices=list(abi.FORMATS), default=list(abi.FORMATS))
    parser.add_argument("--columns", nargs="+", type=int, default=list(COLUMNS), help="default %(default)s")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=21, help="default %(default)s")
    parser.add_argument("--in-cache", action="store_true", help="one matrix over and over")
    args = parser.parse_args()
    builds = [Build(path) for path in args.libraries]
    arena = blocking.make_arena()
    lines = []
    for format, columns in itertools.product(args.formats, args.columns):
        windows = blocking.windows(arena, format, columns)
        matrices = [view(m, abi.FORMATS[format]) for m in (windows[:1] if args.in_cache else windows)]
        for tokens, activations in itertools.product(args.tokens, abi.ACTIVATIONS):
            found = compare(builds, matrices, torch.randn(tokens, columns), activations, args.rounds)
            cells = [f"{s * 1e6:,.0f} ({gain:.2f}{'' if same else ', other bits'})" for s, gain, same in found]
            lines.append([f"{format}, {activations}, {columns} columns, {tokens}", *cells])
    print(table.grid(["product, tokens: µs (gain)", *(str(build.path) for build in builds)], lines))


if __name__ == "__main__":
    main()
