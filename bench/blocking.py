"""Which blocking of products is best on this machine, beside lowbit's own choice: for CPUs that nobody measured.

    python bench/blocking.py                        every format: 2 minutes
    python bench/blocking.py --formats int4 trit
    python bench/blocking.py --json FILE            and a result file
    LOWBIT_ISA=avx2 python bench/blocking.py        of another level

Two thresholds decide how a product with few tokens is cut (csrc/dispatch/blocking.h). Tiles: the number of tokens from
which activations lie as a tile of 16 tokens, as rows below; it holds for the tail of more than 16 too. Own digits: the
bytes of digits up to which each row of the matrix reads them alone; beyond, rows share them. Both ways are
timed in turns about each threshold, on matrices from DRAM, in both activation modes, and the threshold that takes the
least time over all of them (the geometric mean) is printed with what lowbit's own costs beside it. Both ways give the
same bits, so a line of the environment is all that the difference takes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import harness
import table
import torch

import lowbit
from lowbit import _C, PackedMatrix, abi

MEGABYTES = 300  # of codes, which matrices of every shape are windows of
COLUMNS = (4096, 8192, 12288, 16384, 22528, 28672)  # of the matrices whose rows share digits
SHARED_TOKENS = (1, 2, 4)
TILE_TOKENS = range(2, 17)
TILE_COLUMNS = 4096
LINES = 160_000  # of one matrix: 10 MB
NEVER = table.BEYOND_ALL
SECONDS = 0.02  # of a slice


@dataclass(frozen=True)
class Point:
    """Both ways of one product: `place` on the threshold's scale, and the seconds a call took below and beyond it."""

    columns: int
    tokens: int
    activations: str
    place: int
    below: float
    beyond: float
    ratio: float  # beyond / below, the median over rounds

    @property
    def cost(self) -> float:
        return math.log(self.ratio)


def best_threshold(points: list[Point]) -> int:
    """The largest place that stays below, 0 for none: of all thresholds the one with the least total time."""
    places = [0, *sorted({p.place for p in points})]
    return min(places, key=lambda place: sum(p.cost for p in points if p.place > place))


def excess(points: list[Point], is_beyond: Callable[[Point], bool]) -> float:
    """How much longer than the better of both ways products take, on average, by a choice: 0.02 is 2%."""
    lost = [(p.cost if is_beyond(p) else 0) - min(p.cost, 0) for p in points]
    return math.exp(statistics.mean(lost)) - 1


def make_arena() -> torch.Tensor:
    """MEGABYTES of bytes that are codes of every format: those that five trits are stored as."""
    trits = torch.randint(0, 3, (1024, 3200), dtype=torch.uint8)
    sample = PackedMatrix.from_codes(trits, torch.ones(1, 1), format="trit").codes.flatten()
    arena = abi.empty_codes(MEGABYTES * 2**20 // abi.LINE_BYTES, 1).flatten()
    for part in arena.split(len(sample)):
        part.copy_(sample[: len(part)])
    return arena


def windows(arena: torch.Tensor, format: str, columns: int) -> list[PackedMatrix]:
    """Matrices of LINES lines side by side in the arena, with one range of scales."""
    lines = _C.row_lines(abi.FORMATS[format], columns)
    rows, row_bytes = LINES // lines, lines * abi.LINE_BYTES
    codes = arena[: arena.numel() // row_bytes * row_bytes].view(-1, lines, abi.LINE_BYTES)
    grouped = format not in ("trit", "int8")
    scales = torch.full(
        (rows, -(-columns // 128)) if grouped else (1, 1) if format == "trit" else (rows, 1), 0.01
    ).half()
    group = 128 if grouped else -1
    return [
        PackedMatrix(part, scales, format=format, cols=columns, group_size=group, validate=False)
        for part in codes.split(rows)
        if len(part) == rows
    ]


class Ways:
    """One product in two blockings, in turns."""

    def __init__(self, format: str, matrices: list[PackedMatrix], tokens: int, activations: str) -> None:
        self.format, self.activations = abi.FORMATS[format], activations
        self.matrices = itertools.cycle(matrices)
        self.x = torch.randn(tokens, matrices[0].cols)

    def seconds(self, tiles_from: int, own_digit_bytes: int) -> float:
        """A call's, on average over a slice."""
        _C.set_matmul_blocking(self.format, tiles_from, own_digit_bytes)
        calls, start = 0, time.perf_counter()
        while (now := time.perf_counter()) - start < SECONDS:
            next(self.matrices).matmul(self.x, activations=self.activations)
            calls += 1
        return (now - start) / calls

    def compare(self, place: int, below: tuple[int, int], beyond: tuple[int, int], rounds: int) -> Point:
        try:
            self.seconds(*below), self.seconds(*beyond)
            turns = [(self.seconds(*below), self.seconds(*beyond)) for _ in range(rounds)]
        finally:
            _C.set_matmul_blocking(self.format, -1, -1)
        medians = [statistics.median(way) for way in zip(*turns, strict=True)]
        ratio = statistics.median(after / before for before, after in turns)
        return Point(self.x.shape[1], len(self.x), self.activations, place, *medians, ratio)


def tile_points(format: str, arena: torch.Tensor, rounds: int) -> list[Point]:
    matrices = windows(arena, format, TILE_COLUMNS)
    return [
        Ways(format, matrices, tokens, mode).compare(tokens, (NEVER, -1), (1, -1), rounds)
        for tokens in TILE_TOKENS
        for mode in abi.ACTIVATIONS
    ]


def sharing_points(format: str, arena: torch.Tensor, rounds: int) -> list[Point]:
    points = []
    for columns in COLUMNS:
        matrices = windows(arena, format, columns)
        for tokens, (mode, code) in itertools.product(SHARED_TOKENS, abi.ACTIVATIONS.items()):
            digit_bytes = (1 if code else 2) * tokens * columns
            points.append(Ways(format, matrices, tokens, mode).compare(digit_bytes, (NEVER, NEVER), (NEVER, 0), rounds))
    return points


def row(format: str, threshold: str, points: list[Point], own: int, is_beyond: Callable[[Point], bool]) -> dict:
    """own: the threshold that lowbit has itself; is_beyond: what that makes of a point."""
    best = best_threshold(points)
    return {
        "format": format,
        "threshold": threshold,
        "best": best,
        "best_excess": round(excess(points, lambda p: p.place > best), 4),
        "own": own,
        "own_excess": round(excess(points, is_beyond), 4),
        "points": [
            {
                "columns": p.columns,
                "tokens": p.tokens,
                "activations": p.activations,
                "place": p.place,
                "below_us": round(p.below * 1e6, 2),
                "beyond_us": round(p.beyond * 1e6, 2),
                "ratio": round(p.ratio, 4),
            }
            for p in points
        ],
    }


def _shares(format: str) -> bool:
    """Whether rows of the kernels in use can share digits."""
    isa = _C.selected_kernel("matmul", abi.FORMATS[format]).partition("__")[2]
    return isa in ("avx512vnni", "amx") or (isa != "ref" and format != "trit")


def rows_of(format: str, arena: torch.Tensor, rounds: int) -> list[dict]:
    bits = abi.FORMATS[format]

    def tiles_from(mode: str) -> int:
        return _C.matmul_batching(bits, abi.ACTIVATIONS[mode])[1]

    points = tile_points(format, arena, rounds)
    own = tiles_from("float") - 1
    rows = [row(format, "tiles", points, own, lambda p: p.tokens >= tiles_from(p.activations))]
    if not _shares(format):
        return rows

    def columns(tokens: int, mode: str) -> int:  # up to which rows read their digits alone
        return _C.matmul_sharing(bits, tokens, abi.ACTIVATIONS[mode])

    points = sharing_points(format, arena, rounds)
    own = min(2 * columns(1, "float"), NEVER)  # other modes and more tokens may have another
    return [*rows, row(format, "own digits", points, own, lambda p: p.columns > columns(p.tokens, p.activations))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(abi.FORMATS), default=list(abi.FORMATS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each pair; default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write a result file")
    args = parser.parse_args()
    threads = _C.threads()
    arena = make_arena()
    before = harness.read_bandwidth(threads)
    rows = [row for format in args.formats for row in rows_of(format, arena, args.rounds)]
    document = harness.document(
        "blocking",
        {"threads": threads, "rounds": args.rounds, "isa": _C.isa()},
        {"lowbit": lowbit.__version__, "torch": torch.__version__},
        {},
        rows,
        {"start": round(before * 1e-9, 1), "end": round(harness.read_bandwidth(threads) * 1e-9, 1)},
    )
    print(table.markdown([document]))
    for threshold, variable, first in (("tiles", "LOWBIT_TILES_FROM", 1), ("own digits", "LOWBIT_OWN_DIGIT_BYTES", 0)):
        best = [f"{r['format']}={r['best'] + first}" for r in rows if r["threshold"] == threshold]
        if best:
            print(f"\n{variable}={','.join(best)}")
    if args.json:
        print(harness.save(document, args.json))


if __name__ == "__main__":
    main()
