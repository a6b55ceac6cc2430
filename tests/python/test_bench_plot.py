"""Figures: made from what a result file holds, with every series of it, and refused where there is nothing to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402
import plot  # noqa: E402


def product(subject: str, us: float, bits: float = 4, tokens: int = 1, case: str = "dram", **changes) -> dict:
    row = {
        "subject": subject,
        "ours": subject.startswith("lowbit"),
        "bits": bits,
        "ternary": False,
        "quantizes_activations": subject.endswith("int8"),
        "shape": "A",
        "cols": 4096,
        "rows": 2048,
        "tokens": tokens,
        "case": case,
        "us": us,
        "bytes": int(4096 * 2048 * bits / 8),
        "probe_gbps": 40.0,
        "quiet": True,
    }
    return {**row, **changes}


def lookup(subject: str, ids: int, case: str, **changes) -> dict:
    row = {"subject": subject, "ours": subject.startswith("lowbit"), "bits": 4, "ids": ids, "case": case}
    return {**row, "us": 1.0, "ns_per_row": 700.0, "rows": 1000, "cols": 64, "quiet": True, **changes}


def document(bench: str, rows: list[dict], **changes) -> dict:
    settings = {"threads": 2, "table": [1000, 64]}
    contents = harness.document(bench, settings, {}, {}, rows, {"start": 40.0, "end": 40.0})
    contents["machine"] |= {"cpu": "Some CPU", "family": "1", "model": "2"}
    return contents | {"commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T00:00:00+00:00"} | changes


ROWS = [
    *(product("lowbit int4 g128, float", 100.0 * t, tokens=t, case=c) for t in (1, 16) for c in ("dram", "warm")),
    product("lowbit int4 g128, int8", 90.0),
    product("lowbit int2 g128, float", 80.0, bits=2, quiet=False),
    product("lowbit trit, int8", 50.0, bits=1.6, ternary=True),
    product("lowbit ternary as int2, int8", 60.0, bits=2, ternary=True),
    product("peer four bits", 250.0),
    product("peer dense", 50.0, bits=16),
    product("peer ternary, int8", 100.0, bits=2, ternary=True),
    product("peer of three bits", 10.0, bits=3),
    {k: v for k, v in product("peer broken", 1.0).items() if k != "us"} | {"failure": "no such instruction"},
]


def write(folder: Path, name: str, contents: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(contents))
    return str(path)


@pytest.fixture
def results(tmp_path):
    """A folder with results of both benchmarks, and of one that has no figures."""
    folder = tmp_path / "results"
    gathers = [lookup("lowbit int4 -> f32", ids, case) for ids in (1, 64) for case in ("fresh", "reused")]
    gathers += [lookup("lowbit int4 g128", 4096, "bags", bags=64), lookup("peer", 1, "fresh", quiet=False)]
    gathers += [{"subject": "peer", "ids": 0, "case": "table", "failure": "no memory"}]
    write(folder, "matmul_2_threads.json", document("matmul", ROWS, multiply_gops={"int8": 800.0, "bf16": 400.0}))
    write(folder, "gather_2_threads.json", document("gather", gathers))
    write(folder, "quality.json", document("quality", [{"bits": 4}]))
    return folder


def test_every_figure_is_written_twice(results, tmp_path):
    written = plot.draw([str(results)], tmp_path / "deep" / "figures")
    names = ["gather_2_threads_lookups", "gather_2_threads_bags"]
    names += [f"matmul_2_threads_{kind}" for kind in ("roofline", "time", "peers_1_token")]
    assert [path.name for path in written] == [f"{name}.{ending}" for name in names for ending in ("svg", "png")]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def svgs(results: Path, folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in plot.draw([str(results)], folder) if path.suffix == ".svg"}


def test_figures_hold_every_series_and_where_it_was_measured(results, tmp_path):
    drawn = svgs(results, tmp_path)
    for text in drawn.values():
        assert "Some CPU (family 1, model 2), 2 threads; commit 0123456789ab, 2026-01-02" in text
    roofline = drawn["matmul_2_threads_roofline"]
    for series in ("int4, float, 1 tokens, dram", "int4, float, 16 tokens, warm", "trit, int8, 1 tokens, dram"):
        assert f'id="{series}"' in roofline
    for roof in ("read bandwidth", "int8 peak", "bf16 peak", "float mode peak"):
        assert f'id="{roof}"' in roofline
    assert "40 GB/s read" in roofline and "int8 800" in roofline
    assert "peer" not in roofline
    assert 'id="int4, float, warm"' in drawn["matmul_2_threads_time"]
    lookups = drawn["gather_2_threads_lookups"]
    for series in ("lowbit int4 -&gt; f32, 64 ids, reused", "peer, 1 ids, fresh"):
        assert f'id="{series}"' in lookups
    assert "1,000×64" in lookups and "bags" not in lookups
    bags = drawn["gather_2_threads_bags"]
    assert 'id="lowbit int4 g128, 4096 ids, bags"' in bags and "4,096 ids in 64 bags" in bags


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    assert svgs(results, tmp_path / "a") == svgs(results, tmp_path / "b")


def test_peers_are_compared_with_their_like():
    found = [(peer["subject"], ours["subject"], ratio) for peer, ours, ratio in plot.ratios({"rows": ROWS}, 1)]
    assert found == [
        ("peer dense", "lowbit int4 g128, float", 0.5),
        ("peer ternary, int8", "lowbit trit, int8", 2.0),
        ("peer four bits", "lowbit int4 g128, float", 2.5),
    ]
    assert plot.ratios({"rows": ROWS}, 16) == []


def test_a_bar_begins_at_one_and_busy_rows_are_pale():
    rows = [*ROWS, product("busy peer", 50.0, bits=2, quiet=False)]
    figure = plot.peers(document("matmul", rows), 1)
    bars = {bar.get_gid(): bar for bar in figure.axes[0].patches}
    four = bars["peer four bits, 1 tokens"]
    assert (four.get_x(), four.get_x() + four.get_width(), four.get_alpha()) == (1, 2.5, 1.0)
    busy = bars["busy peer, 1 tokens"]
    assert (busy.get_x() + busy.get_width(), busy.get_alpha()) == (pytest.approx(50 / 80), 0.4)
    assert "0.62× ?" in {text.get_text() for text in figure.axes[0].texts}


def test_points_of_the_roofline_lie_where_the_arithmetic_says():
    figure = plot.roofline(document("matmul", ROWS, multiply_gops={"int8": 800.0}))
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    (x,), (y,) = lines["int4, float, 16 tokens, dram"].get_data()
    assert (x, y) == (pytest.approx(2 * 16 / 0.5), pytest.approx(2 * 4096 * 2048 * 16 / 1600 * 1e-3))
    # The bandwidth's roof ends where it meets the highest rate.
    assert lines["read bandwidth"].get_data()[1][-1] == pytest.approx(800)
    assert list(lines["float mode peak"].get_data()[1]) == [400, 400]


def test_older_results_have_no_multiply_rate_and_say_so():
    contents = document("matmul", ROWS)
    del contents["multiply_gops"], contents["left_out"]
    texts = {text.get_text() for text in plot.roofline(contents).axes[0].texts}
    assert "multiply rate: not measured in this file" in texts


def test_the_shape_with_most_rows_is_shown():
    rows = [*ROWS, product("lowbit int4 g128, float", 1.0, shape="B", rows=11008)]
    assert {row["shape"] for row in plot.products({"rows": rows})} == {"A"}


@pytest.mark.parametrize("contents, message", [
    (document("quality", []), "expected results of matmul or gather, found none"),
    (document("matmul", []), "expected at least one measured product"),
    (document("matmul", [product("peer", 1.0)]), "expected products of lowbit's"),
    (document("gather", []), "expected at least one measured lookup"),
    ({"schema": 99}, "schema: expected 1"),
])  # fmt: skip
def test_results_without_figures_are_refused_and_nothing_is_written(tmp_path, contents, message):
    write(tmp_path / "in", "some.json", contents)
    with pytest.raises(ValueError, match=message):
        plot.draw([str(tmp_path / "in")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_named_file_without_figures_is_refused(tmp_path):
    path = write(tmp_path, "quality.json", document("quality", []))
    with pytest.raises(ValueError, match="bench: expected matmul or gather, got quality"):
        plot.draw([path], tmp_path / "out")


def test_two_machines_are_not_drawn_together(tmp_path):
    other = document("matmul", ROWS)
    other["machine"] = other["machine"] | {"cpu": "Another CPU"}
    paths = [write(tmp_path, "a.json", document("matmul", ROWS)), write(tmp_path, "b.json", other)]
    with pytest.raises(ValueError, match="machine: expected one in all files, got another-cpu"):
        plot.draw(paths, tmp_path / "out")
    again = write(tmp_path / "elsewhere", "a.json", document("matmul", ROWS))
    with pytest.raises(ValueError, match="got two a"):
        plot.draw([paths[0], again], tmp_path / "out")


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "none.json"), "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        plot.main()
    assert stopped.value.code == 2
    assert "none.json" in capsys.readouterr().err
