"""Comparing two result files: which rows belong together, what counts as slower, what only looks like it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import compare  # noqa: E402
import harness  # noqa: E402


def product(us: float, subject: str = "lowbit int4", share: float = 0.3, **changes) -> dict:
    row = {"subject": subject, "shape": "A", "tokens": 1, "case": "dram", "us": us, "share": share, "quiet": True}
    return {**row, **changes}


def bags(us: float, count: int, cols: int) -> dict:
    row = {"subject": "lowbit int4", "ids": 4096, "case": "bags", "bags": count, "rows": 1000, "cols": cols}
    return {**row, "us": us, "share": 0.2, "quiet": True}


def document(rows: list[dict], bench: str = "matmul", threads: int = 2, **more) -> dict:
    return harness.document(bench, {"threads": threads}, {}, {}, rows, {}, **more)


def test_rows_are_matched_by_what_they_measure():
    before = document([product(300), product(1, "old")])
    after = document([product(150), product(40, case="warm")])
    pairs, broken, remarks = compare.compare(before, after)
    assert [(pair.key[0], pair.ratio) for pair in pairs] == [("lowbit int4", 0.5)]
    assert broken == []
    assert remarks == ["only before: old A 1 dram", "only after: lowbit int4 A 1 warm"]


def test_bags_of_every_size_and_table_are_rows_of_their_own():
    sizes = [(64, 4096), (512, 4096), (64, 128), (512, 128)]
    before = document([bags(100.0, *size) for size in sizes], "gather")
    after = document([bags(100.0 * i, *size) for i, size in enumerate(sizes, 1)], "gather")
    assert [pair.ratio for pair in compare.compare(before, after)[0]] == [1, 2, 3, 4]


def test_the_slowest_now_comes_last():
    names = {"a": 1.3, "b": 0.7, "c": 1.0}
    pairs, _, _ = compare.compare(
        document([product(100, n) for n in names]), document([product(100 * r, n) for n, r in names.items()])
    )
    assert [pair.key[0] for pair in pairs] == ["b", "c", "a"]


@pytest.mark.parametrize("before, after, slowdown", [
    # Bound by memory, and the machine's memory was slower: no slower kernel.
    (product(100, share=0.9), product(150, share=0.88), 0.9 / 0.88),
    # Bound by memory, and slower by both.
    (product(100, share=0.9), product(150, share=0.6), 1.5),
    # Its share fell because the memory got faster; the time did not.
    (product(100, share=0.9), product(100, share=0.6), 1.0),
    # Not bound by memory: the time decides.
    (product(100, share=0.2), product(150, share=0.4), 1.5),
    # A benchmark without shares.
    ({"subject": "a", "us": 100}, {"subject": "a", "us": 120}, 1.2),
])  # fmt: skip
def test_slower_is_what_time_and_share_agree_on(before, after, slowdown):
    pair = compare.Pair((), before, after)
    assert pair.slowdown == pytest.approx(slowdown)


def test_marked_rows_are_not_counted_as_slower():
    before = document([product(100, "steady"), product(100, "busy"), product(100, "same")])
    after = document([product(200, "steady"), product(300, "busy", quiet=False), product(105, "same")])
    pairs, _, _ = compare.compare(before, after)
    assert [pair.key[0] for pair in compare.slower_than(pairs, 1.1)] == ["steady"]
    assert [pair.key[0] for pair in pairs if pair.noisy] == ["busy"]
    assert compare.line(pairs[-1], 20).endswith("x3.00   share 0.30 -> 0.30  ?")


def test_what_fails_or_was_left_out_is_told():
    before = document([product(100, "a"), product(100, "b"), product(100, "c")])
    failing = {k: v for k, v in product(0, "b").items() if k != "us"} | {"failure": "no memory"}
    left = {k: v for k, v in product(0, "c").items() if k != "us"} | {"left_out": "no time left"}
    _, broken, remarks = compare.compare(before, document([product(100, "a"), failing], left_out=[left]))
    assert broken == ["b A 1 dram: no memory"]
    assert remarks == ["only before: c A 1 dram (no time left)"]


@pytest.mark.parametrize("before, after, message", [
    (document([]), document([], "gather"), "got matmul and gather"),
    (document([product(1)]), document([product(1)], threads=1), "threads: expected the same in both files, got 2"),
    (document([product(1)]), document([product(1, "other")]), "expected measured rows that both files have"),
    (document([product(1), product(2)]), document([product(1)]), "got two of lowbit int4 A 1 dram"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(before, after)


@pytest.mark.parametrize("after_us, words, status", [
    (105, ["--fail-above", "1.1"], 0),
    (120, ["--fail-above", "1.1"], 1),
    (120, [], 0),
    (120, ["--fail-above", "0.5"], 2),
    (None, ["--fail-above", "1.1"], 1),
])  # fmt: skip
def test_the_status_of_the_command(tmp_path, monkeypatch, capsys, after_us, words, status):
    failing = {"subject": "a", "shape": "A", "tokens": 1, "case": "dram", "failure": "gone"}
    row = failing if after_us is None else product(after_us, "a")
    for name, rows in (("before", [product(100, "a"), product(100, "b")]), ("after", [row, product(100, "b")])):
        (tmp_path / name).write_text(json.dumps(document(rows)))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "before"), str(tmp_path / "after"), *words])
    got = 0
    try:
        compare.main()
    except SystemExit as stopped:
        got = stopped.code
    assert got == status
    printed = capsys.readouterr()
    if status == 2:
        assert "--fail-above: expected at least 1, got 0.5" in printed.err
    elif after_us is None:
        assert "fails now: a A 1 dram: gone" in printed.out
    else:
        assert f"x{after_us / 100:.2f}" in printed.out


def test_a_file_that_is_no_result_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("not json")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "text"), str(tmp_path / "text")])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2 and "compare.py: error:" in capsys.readouterr().err
