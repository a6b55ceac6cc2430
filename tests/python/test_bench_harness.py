"""The benchmarks' own machinery: statistics, alternation, the worker protocol, result files and tables. No timings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402
import table  # noqa: E402
from peers import llama_cpp  # noqa: E402
from worker import Library  # noqa: E402

from lowbit import _C  # noqa: E402

ECHO = """
import sys
sys.path.insert(0, {bench!r})
import harness
def fail(): raise LookupError("no such thing")
def noisy(): print("a library's banner"); return 1
harness.serve({{"echo": lambda value: [value, value], "fail": fail, "noisy": noisy, "end": lambda: sys.exit(3)}})
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(bench=str(BENCH)))
    with harness.Worker([sys.executable, str(script)], threads=1, timeout=60) as started:
        yield started


def slice_round(us: float, probe: float = 1e10, other: float = 0.0, spread: float = 0.0) -> dict:
    return {"us": us, "calls": 3, "probe": probe, "other": other, "spread": spread}


# ---- statistics ----


@pytest.mark.parametrize("share, expected", [(0.0, 1.0), (0.5, 3.0), (0.9, 4.0), (1.0, 4.0)])
def test_quantile_is_a_value_of_the_list(share, expected):
    assert harness.quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_quantile_of_nothing():
    with pytest.raises(ValueError, match="expected at least one value"):
        harness.quantile([], 0.5)


def test_share_pairs_each_slice_with_the_probe_beside_it():
    # The machine slowed a little for two rounds: time and probe drift together, the share does not.
    rounds = [slice_round(100, 1e10), slice_round(110, 1e10 / 1.1), slice_round(110, 1e10 / 1.1)]
    figures = harness.summarise(rounds, bytes_read=900_000)
    assert figures["share"] == pytest.approx(0.9)
    assert figures["us"] == 110
    assert figures["gbps"] == pytest.approx(900 / 110)
    assert figures["probe_gbps"] == pytest.approx(10 / 1.1)
    assert figures["probe_spread"] == pytest.approx(0.1, abs=1e-3)
    assert (figures["rounds"], figures["calls"], figures["quiet"]) == (3, 9, True)


def test_busy_rounds_count_only_if_there_is_nothing_else():
    noisy = slice_round(900, other=harness.BUSY_SHARE * 2)
    mixed = harness.summarise([noisy, slice_round(100), noisy], 1000)
    assert (mixed["us"], mixed["rounds_used"], mixed["rounds"], mixed["quiet"]) == (100, 1, 3, True)
    busy = harness.summarise([noisy], 1000)
    assert (busy["us"], busy["quiet"]) == (900, False)


def test_summary_of_nothing():
    with pytest.raises(ValueError, match="rounds"):
        harness.summarise([], 1)


def test_other_share_ignores_what_the_clock_cannot_resolve():
    assert harness.other_share(busy=1.01, own=1.0, wall=0.05) == 0.0
    assert harness.other_share(busy=1.5, own=1.0, wall=1.0) == pytest.approx(0.5)
    assert harness.other_share(busy=1.0, own=1.2, wall=1.0) == 0.0


def test_time_slice_rotates_and_goes_on_where_it_stopped():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    taken, position = harness.time_slice(calls, position=0, seconds=0.0, warm_up=2)
    assert (len(taken), position, seen) == (1, 3, [0, 1, 2])
    harness.time_slice(calls, position, seconds=0.0, warm_up=0)
    assert seen[-1] == 0


# ---- workers ----


def test_worker_answers_and_reports_failures(worker):
    assert worker.ask("echo", value="π") == ["π", "π"]
    with pytest.raises(harness.WorkerError, match="LookupError: no such thing"):
        worker.ask("fail")
    assert worker.ask("echo", value=2) == [2, 2]


def test_what_a_library_prints_does_not_break_the_protocol(worker):
    assert worker.ask("noisy") == 1
    assert worker.ask("echo", value=3) == [3, 3]


def test_worker_that_ends(worker):
    with pytest.raises(harness.WorkerError, match="ended with status 3"):
        worker.ask("end")


def test_alternate_takes_turns_and_probes_between(worker):
    order = []

    def probe() -> float:
        order.append("probe")
        return 2e10

    def run(name: str):
        def take() -> list[float]:
            order.append(name)
            return [1e-3, 3e-3, 2e-3]

        return take

    results = harness.alternate({"a": (worker, run("a")), "b": (worker, run("b"))}, rounds=2, probe=probe, retries=0)
    assert order == ["probe", *["a", "probe", "b", "probe"] * 2]
    assert [len(results[name]) for name in "ab"] == [2, 2]
    assert results["a"][0]["us"] == pytest.approx(2000)
    assert results["a"][0]["probe"] == 2e10


def test_alternate_goes_on_without_a_subject_that_fails(worker):
    results = harness.alternate(
        {"good": (worker, lambda: [1e-3]), "bad": (worker, lambda: worker.ask("fail"))}, 3, lambda: 1e10, retries=0
    )
    assert results["bad"] == [{"failure": "LookupError: no such thing"}]
    assert len(results["good"]) == 3


# ---- result files ----


def matmul_row(subject: str, us: float, **changes) -> dict:
    row = {
        "subject": subject,
        "ours": subject.startswith("lowbit"),
        "bits": 4,
        "quantizes_activations": False,
        "shape": "A",
        "cols": 4096,
        "rows": 4096,
        "tokens": 1,
        "case": "dram",
        "error": 4e-5,
        "kernel": None,
        **harness.summarise([slice_round(us)], 8_900_000),
    }
    return {**row, **changes}


def document(bench: str, rows: list[dict], **settings) -> dict:
    probe = {"start": 30.0, "end": 31.0}
    return harness.document(bench, {"threads": 2, **settings}, {"lowbit": "0.1.0"}, {"vllm": "missing"}, rows, probe)


def test_document_says_where_it_comes_from(tmp_path):
    contents = document("matmul", [matmul_row("lowbit int4", 300)])
    path = harness.save(contents, tmp_path / "deep" / "matmul.json")
    assert harness.load(path) == json.loads(json.dumps(contents))
    for field in ("schema", "bench", "date", "commit", "dirty", "machine", "settings", "versions", "not_installed"):
        assert field in contents
    assert contents["machine"]["cpus"] >= 1
    assert set(contents["machine"]) >= {"cpu", "features", "caches", "memory_gb", "huge_pages", "kernel"}


@pytest.mark.parametrize("text", ["[]", '{"schema": 99}', "{}"])
def test_load_refuses_other_files(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="schema: expected 1"):
        harness.load(path)


def test_machine_name_is_a_folder_name():
    description = {"cpu": "Intel(R) Xeon(R) @ 2.10GHz", "family": "6", "model": "143", "cpus": 2}
    assert harness.machine_name(description) == "intel-xeon-2-10ghz-family6-model143-2cpu"


def test_committed_results_are_readable():
    for path in sorted((BENCH / "results").glob("*/*.json")):
        if path.parent.name.startswith("nvidia-"):
            continue  # test_bench_gpu.py
        contents = harness.load(path)
        assert table.markdown([contents])
        assert path.parent.name == harness.machine_name(contents["machine"])


# ---- tables ----


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_matmul_table():
    rows = [
        matmul_row("peer", 600, error=None, quantizes_activations=True),
        matmul_row("lowbit int4", 1445.2),
        matmul_row("lowbit int4", 150, case="warm"),
        matmul_row("lowbit int4", 900, tokens=16),
        matmul_row("busy", 700, quiet=False),
        {k: matmul_row("broken", 1)[k] for k in ("subject", "ours", "bits", "quantizes_activations", "shape")}
        | {"cols": 4096, "rows": 4096, "tokens": 1, "case": "dram", "failure": "no such instruction"},
    ]
    one, more = table.matmul(document("matmul", rows)).split("\n\n")
    lines = [cells(line) for line in one.splitlines()]
    assert lines[0] == ["one token, µs (share of bandwidth)", "4096×4096", "A, in cache", "error"]
    assert lines[2] == ["lowbit int4", "1,445 (0.62)", "150", "4.0e-05"]
    assert [line[0] for line in lines[2:]] == ["lowbit int4", "busy", "broken", "peer"]
    assert lines[3][1] == "700? (1.27)"
    assert lines[4][1] == "failed"
    assert lines[5][1:] == ["600 (1.48)", "", ""]
    assert cells(more.splitlines()[2]) == ["lowbit int4", "900"]


def test_gather_table():
    row = {
        "subject": "lowbit int4 -> bf16",
        "ours": True,
        "bits": 4,
        "output": "bf16",
        "ids": 64,
        "case": "reused",
        "ns_per_row": 512.4,
        **harness.summarise([slice_round(33)], 1000),
    }
    failed = {"subject": "peer", "ids": 0, "case": "table", "failure": "no memory"}
    lines = table.gather(document("gather", [row, failed], table=[10, 4])).splitlines()
    assert cells(lines[0]) == ["lookups, ns a row", "64 ids, same output"]
    assert [cells(line) for line in lines[2:]] == [["lowbit int4 -> bf16", "512"]]
    bags = {**row, "case": "bags", "bags": 64, "rows": 10, "cols": 4, "subject": "lowbit int4"}
    operator = {**row, "case": "op", "ids": 1, "ns_per_row": 9000.0}
    lookups, sums = table.gather(document("gather", [bags, row, failed, operator], table=[10, 4])).split("\n\n")
    assert cells(lookups.splitlines()[0]) == ["lookups, ns a row", "64 ids, same output", "1 ids, as an operator"]
    assert cells(sums.splitlines()[0])[1:] == ["10×4, 64 ids in 64"]
    assert cells(sums.splitlines()[2]) == ["lowbit int4", f"512 ({row['share']:.2f})"]


def test_model_table():
    row = {
        "subject": "torch bf16",
        "ours": False,
        "what": "decode",
        "tokens": 32,
        "tokens_per_second": 12.34,
        "resident_mb": 2600.0,
        "disk_bytes": 2_471_000_000,
        "load_seconds": 1.26,
        **harness.summarise([slice_round(81_000)], 1000),
    }
    failed = {"subject": "lowbit", "ours": True, "what": "decode", "tokens": 32, "failure": "gone"}
    contents = document("model", [row, failed], layers=16, bits=4, head_bits=8)
    lines = table.model(contents).splitlines()
    assert cells(lines[0])[1:] == ["decode 32, tokens/s", "resident MB", "files MB", "load s"]
    assert cells(lines[2]) == ["torch bf16", "12.3", "2,600", "2,471", "1.3"]
    assert cells(lines[3]) == ["lowbit", "failed", "", "", ""]


def test_quality_table():
    row = {"bits": 4, "group_size": 128, "variant": "defaults", "reference_perplexity": 29.2537}
    row |= {"increase_percent": 0.4, "kl_divergence": 0.0045}
    rounded = row | {"variant": "round to nearest", "increase_percent": -0.004, "kl_divergence": 0.013}
    other = rounded | {"bits": 2, "group_size": 64}
    contents = document("quality", [rounded, row, other], model="tiny", elsewhere={"peer": {"4": 0.28, "2": 21}})
    lines = table.quality(contents).splitlines()
    assert cells(lines[0]) == ["tiny: rise of perplexity from 29.254 (KL)", "round to nearest", "defaults", "peer"]
    assert cells(lines[2]) == ["4 bits, groups of 128", "-0.00% (0.01300)", "+0.40% (0.00450)", "+0.28%"]
    assert cells(lines[3]) == ["2 bits, groups of 64", "-0.00% (0.01300)", "", "+21.00%"]
    assert "bandwidth" not in table.origin(contents | {"probe_gbps": {}})


def test_markdown_tells_the_origin_and_what_was_not_measured():
    text = table.markdown([document("matmul", [matmul_row("lowbit int4", 300)])])
    assert "30.0 GB/s at the start" in text
    assert "Not installed, so not measured: vllm." in text
    assert "Left out" not in text
    short = document("matmul", [matmul_row("lowbit int4", 300)])
    short["left_out"] = [{"subject": "peer"}, {"subject": "peer"}, {"subject": "other"}]
    assert "Left out for want of time: 3 rows of peer, other." in table.markdown([short])
    with pytest.raises(ValueError, match="bench"):
        table.markdown([document("solver", [])])


def test_replace_between_touches_nothing_else():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.replace_between(text, "new")
    assert once == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.replace_between(once, "new") == once


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END} {table.BEGIN}", f"{table.BEGIN * 2} {table.END}"])
def test_replace_between_needs_the_markers(text):
    with pytest.raises(ValueError, match="expected one"):
        table.replace_between(text, "new")


def test_grid_refuses_ragged_lines():
    with pytest.raises(ValueError, match="expected 2 cells"):
        table.grid(["a", "b"], [["1"]])


# ---- the probes ----


def test_multiply_rates_are_of_what_the_machine_has():
    features = _C.cpu_features().split()
    wanted = ["int8"] * ("avx2" in features) + ["bf16"] * ("avx512bf16" in features)
    wanted += ["tiles"] * (_C.isa_missing("amx") == "")
    assert list(harness.multiply_rates(1)) == wanted
    for kind, threads in (("int4", 1), ("", 1), ("int8", 0), ("int8", -1), ("int8", 100_000)):
        assert _C.multiply_rate(kind, threads) == 0


# ---- the subjects ----


@pytest.mark.parametrize("module, name, largest_error", [
    ("ours", "lowbit int4 g128, float", 3e-4),
    ("ours", "lowbit int3 g128, int8", 1.5e-2),
    ("torch", "torch bf16", 5e-3),
])  # fmt: skip
def test_a_matmul_subject_answers_every_question(module, name, largest_error):
    with harness.Worker([sys.executable, str(BENCH / "worker.py"), module], threads=1, timeout=120) as library:
        described = library.ask("describe")
        assert name in [subject["name"] for subject in described["matmul"]]
        assert described["versions"]["torch"]
        made = library.ask("weights", name=name, cols=256, rows=96, megabytes=1)
        assert made["bytes"] > 256 * 96 * 2 / 8
        assert 0 < library.ask("error", name=name, tokens=3) < largest_error
        for case in ("dram", "warm"):
            taken = library.ask("matmul", name=name, tokens=3, case=case, seconds=0.001)
            assert taken and min(taken) > 0
        library.ask("release")
        with pytest.raises(harness.WorkerError, match="KeyError"):
            library.ask("error", name=name, tokens=3)


def test_a_call_of_several_products_is_divided_by_their_number(monkeypatch):
    """Also when another number of tokens, whose graph holds other products, was measured in between."""

    class Graph:
        matrices_per_call = 0

        def calls(self, tokens):
            self.matrices_per_call = 10 if tokens == 1 else 2
            return [lambda: None]

    monkeypatch.setattr(harness, "time_slice", lambda calls, position, seconds, warm_up: ([1.0], position))
    library = Library("no library")
    library.module, library.held = None, {"graph": Graph()}
    taken = [library.matmul("graph", tokens, "dram", seconds=0.0) for tokens in (1, 16, 1)]
    assert taken == [[0.1], [0.5], [0.1]]


def test_a_gather_subject_answers_every_question():
    name = "lowbit int4 -> bf16"
    with harness.Worker([sys.executable, str(BENCH / "worker.py"), "ours"], threads=1, timeout=120) as library:
        assert name in [subject["name"] for subject in library.ask("describe")["gather"]]
        made = library.ask("table", name=name, cols=256, rows=512)
        assert made == {"row_bytes": 128 + 2 * 2, "reuses_output": True, "has_op": True}
        for case in ("fresh", "reused", "op"):
            assert min(library.ask("gather", name=name, count=5, case=case, seconds=0.001)) > 0


@pytest.mark.parametrize("module, name, row_bytes", [
    ("ours", "lowbit int4 g128", 128 + 2 * 2),
    ("torch", "torch f32", 1024),
    ("torch", "torch quantized 4-bit", 128 + 4),
])  # fmt: skip
def test_a_subject_sums_bags(module, name, row_bytes):
    with harness.Worker([sys.executable, str(BENCH / "worker.py"), module], threads=1, timeout=120) as library:
        assert name in [subject["name"] for subject in library.ask("describe")["bags"]]
        assert library.ask("bag_table", name=name, cols=256, rows=512) == {"row_bytes": row_bytes}
        assert min(library.ask("bags", name=name, count=32, bags=4, seconds=0.001)) > 0


def test_a_library_that_is_not_installed_is_reported():
    command = [sys.executable, str(BENCH / "worker.py"), "no_such_library"]
    missing = pytest.raises(harness.WorkerError, match="no_such_library")
    with harness.Worker(command, threads=1) as library, missing:
        library.ask("describe")


@pytest.mark.parametrize("kind", sorted(llama_cpp.KINDS))
def test_the_file_that_llama_cpp_is_given(tmp_path, kind):
    """Every matrix of the shape, in the types asked for, as lowbit's own strict reader sees them."""
    pytest.importorskip("gguf")
    from lowbit.checkpoint.gguf import GgufFile

    shape = {"num_hidden_layers": 2, "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    shape["tie_word_embeddings"] = kind == "llama-1b"
    for name, types in llama_cpp.KINDS[kind].items():
        path = tmp_path / name
        size, embedding = llama_cpp.write_gguf(str(path), shape, *types)
        opened = GgufFile(path)
        assert size == path.stat().st_size and 300 * 256 * 4 // 8 < embedding < 300 * 256 * 9 // 8
        tensors = {tensor: entry.type for tensor, entry in opened.tensors.items()}
        assert len(tensors) == 2 * 9 + 2 + (kind != "llama-1b")
        assert {tensors["blk.1.ffn_down.weight"], tensors["token_embd.weight"]} == {types[0], types[1]}


def test_without_llama_bench_it_is_said(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PROGRAM", "")
    with pytest.raises(LookupError, match="LLAMA_BENCH names no llama-bench"):
        llama_cpp.LlamaCpp(2).describe()
