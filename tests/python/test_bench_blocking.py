"""The thresholds that bench/blocking.py finds: from times that are made up, and from a short run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import blocking  # noqa: E402
import table  # noqa: E402

from lowbit import _C, abi  # noqa: E402


def points(ratios: dict[int, float]) -> list[blocking.Point]:
    """Of one token; place: 1/below is the better way by that factor."""
    return [blocking.Point(4096, 1, "float", place, 1.0, ratio, ratio) for place, ratio in ratios.items()]


@pytest.mark.parametrize(
    "ratios, best",
    [
        ({1: 2.0, 2: 1.2, 3: 0.9, 4: 0.5}, 2),
        ({1: 2.0, 2: 1.1}, 2),  # the first way throughout
        ({1: 0.8, 2: 0.9}, 0),  # the second throughout
        ({1: 2.0, 2: 0.99, 3: 1.5, 4: 0.5}, 3),  # one good moment is no threshold
        ({1: 2.0, 2: 0.5, 3: 1.01, 4: 0.5}, 1),
    ],
)
def test_the_threshold_with_the_least_time(ratios, best):
    assert blocking.best_threshold(points(ratios)) == best


def test_what_a_choice_costs():
    measured = points({1: 2.0, 2: 0.5})
    assert blocking.excess(measured, lambda p: p.place > 1) == 0
    assert blocking.excess(measured, lambda p: True) == pytest.approx(2**0.5 - 1)
    assert blocking.excess(measured, lambda p: False) == pytest.approx(2**0.5 - 1)


@pytest.mark.parametrize("format", abi.FORMATS)
def test_matrices_are_valid_windows_of_the_arena(monkeypatch, format):
    monkeypatch.setattr(blocking, "MEGABYTES", 1)
    monkeypatch.setattr(blocking, "LINES", 2000)
    arena = blocking.make_arena()
    for columns in (320, 4096):
        matrices = blocking.windows(arena, format, columns)
        for matrix in matrices:
            matrix._matrix.check(True)
        assert [m.codes.data_ptr() - arena.data_ptr() for m in matrices] == [
            i * matrices[0].codes.nbytes for i in range(arena.nbytes // matrices[0].codes.nbytes)
        ]


def test_a_short_run(monkeypatch):
    monkeypatch.setattr(blocking, "MEGABYTES", 1)
    monkeypatch.setattr(blocking, "LINES", 500)
    monkeypatch.setattr(blocking, "SECONDS", 1e-4)
    monkeypatch.setattr(blocking, "COLUMNS", (1024, 2048))
    monkeypatch.setattr(blocking, "TILE_COLUMNS", 1024)
    before = [_C.matmul_batching(4, mode) for mode in (0, 1)]
    rows = blocking.rows_of("int4", blocking.make_arena(), rounds=1)
    assert before == [_C.matmul_batching(4, mode) for mode in (0, 1)]  # as it was found
    assert [r["threshold"] for r in rows] == ["tiles", "own digits"][: len(rows)]
    assert {(p["tokens"], p["activations"]) for p in rows[0]["points"]} == set(
        itertools.product(blocking.TILE_TOKENS, abi.ACTIVATIONS)
    )
    for row in rows:
        assert all(p["below_us"] > 0 and p["beyond_us"] > 0 for p in row["points"])
    text = table.blocking({"rows": rows})
    never = table.blocking({"rows": [{**rows[-1], "own": blocking.NEVER}]})
    assert never.splitlines()[-1].split(" | ")[4] == "any"
    assert "as tiles of 16" in text and f"| {rows[0]['best'] + 1:,} |" in text
