"""Busy machines, short runs: what is measured again, marked or left out. Slices, probes and clocks are fabricated."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402
import matmul  # noqa: E402
import run  # noqa: E402
from budget import Budget  # noqa: E402

from lowbit import benchmark  # noqa: E402


def slice_round(us: float, probe: float = 1e10, other: float = 0.0, spread: float = 0.0) -> dict:
    return {"us": us, "calls": 3, "probe": probe, "other": other, "spread": spread}


class FakeWorker:
    cpu_seconds = 0.0


class Machine:
    """A machine whose clock moves only when something runs on it, and whose probes say what the test wants."""

    def __init__(self, monkeypatch, probes=None):
        self.time, self.order = 0.0, []
        self.probes = itertools.repeat(1e10) if probes is None else iter(probes)
        monkeypatch.setattr(harness.time, "monotonic", lambda: self.time)
        monkeypatch.setattr(harness.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(harness, "_busy_seconds", lambda: 0.0)

    def probe(self) -> float:
        return next(self.probes)

    def subject(self, name: str, us: float, turn_seconds: float = 0.1):
        def take() -> list[float]:
            self.time += turn_seconds
            self.order.append(name)
            return [us * 1e-6]

        return FakeWorker(), take

    def budget(self, seconds: float) -> Budget:
        return Budget(seconds, now=lambda: self.time)


# ---- which rounds count ----


@pytest.mark.parametrize("rounds, used, quiet", [
    # One round of five at another speed of the machine: four agree.
    ([(100, 30), (101, 31), (70, 50), (100, 32), (99, 30)], [100, 101, 100, 99], True),
    # Two states, and no majority: everything is shown, and marked.
    ([(100, 30), (70, 50)], [100, 70], False),
    ([(100, 30), (70, 50), (101, 30), (71, 50)], [100, 70, 101, 71], False),
    # Every round at a speed of its own.
    ([(100, 10), (90, 20), (80, 40)], [100, 90, 80], False),
    # Just within and just beyond a spread of 20% (the median of two is their mean).
    ([(100, 10.0), (90, 12.2)], [100, 90], True),
    ([(100, 10.0), (90, 12.3)], [100, 90], False),
])  # fmt: skip
def test_rounds_at_different_speeds_are_not_averaged_in_silence(rounds, used, quiet):
    chosen, trusted = harness.settle([slice_round(us, probe * 1e9) for us, probe in rounds])
    assert (sorted(r["us"] for r in chosen), trusted) == (sorted(used), quiet)


def test_a_round_whose_own_probes_differ_does_not_count():
    drifting = slice_round(500, spread=harness.PROBE_SPREAD + 0.01)
    assert harness.disturbed(drifting) and not harness.disturbed(slice_round(500, spread=harness.PROBE_SPREAD))
    figures = harness.summarise([slice_round(100), drifting, slice_round(102)], 1000)
    assert (figures["us"], figures["rounds_used"], figures["rounds"], figures["quiet"]) == (101, 2, 3, True)
    alone = harness.summarise([drifting], 1000)
    assert (alone["us"], alone["quiet"], alone["probe_spread"]) == (500, False, 0.21)


def test_the_row_tells_the_spread_of_the_probes_that_count():
    rounds = [slice_round(100, 30e9), slice_round(100, 33e9), slice_round(60, 90e9)]
    figures = harness.summarise(rounds, 1000)
    assert figures["probe_spread"] == pytest.approx(3 / 31.5, abs=1e-3)
    assert harness.summarise([slice_round(1, 10e9), slice_round(1, 30e9)], 1)["probe_spread"] == 1.0


# ---- what is measured again ----


def test_a_slice_beside_drifting_probes_is_repeated(monkeypatch):
    machine = Machine(monkeypatch, probes=[10e9, 20e9, 20e9, 20e9])
    rounds = harness.alternate({"a": machine.subject("a", 100)}, 1, machine.probe)
    assert machine.order == ["a", "a"]
    assert [(r["probe"], r["spread"]) for r in rounds["a"]] == [(20e9, 0.0)]


def test_a_slice_that_stays_disturbed_is_kept_and_its_row_marked(monkeypatch):
    machine = Machine(monkeypatch, probes=itertools.cycle([10e9, 20e9]))
    rounds = harness.alternate({"a": machine.subject("a", 100)}, 2, machine.probe, retries=2)
    # Two rounds of three attempts each, and two again because they did not settle.
    assert len(machine.order) == 4 * 3
    assert harness.summarise(rounds["a"], 1000)["quiet"] is False


def test_rounds_that_disagree_are_followed_by_more(monkeypatch):
    # Two rounds at 30 and 50 GB/s, both calm; the third agrees with the second, and settles it.
    machine = Machine(monkeypatch, probes=[30e9, 30e9, 50e9, 50e9, 50e9, 50e9])
    slices = {"a": machine.subject("a", 100)}
    rounds = harness.alternate(slices, 2, machine.probe, retries=2)
    figures = harness.summarise(rounds["a"], 1000)
    assert (figures["rounds"], figures["rounds_used"], figures["quiet"]) == (3, 2, True)
    assert figures["probe_gbps"] == 50


@pytest.mark.parametrize("probes, attempts, busy", [
    ([10, 10, 10, 10], 1, False),
    ([10, 10, 12.5, 12.5, 11, 11, 11, 11], 2, False),
    ([10, 10, 12.5, 12.5] * 3, 3, True),
])  # fmt: skip
def test_lowbit_bench_repeats_and_then_marks(monkeypatch, probes, attempts, busy):
    values = iter(probes)
    monkeypatch.setattr(benchmark, "_probe", lambda plan: next(values))
    monkeypatch.setattr(benchmark, "_seconds_of_others", lambda: 0.0)
    row = benchmark._time_beside_probe([lambda: None], benchmark.Plan(seconds=0.0))
    assert (row["attempts"], row["busy"]) == (attempts, busy)
    assert next(values, None) is None


# ---- short of time ----


def test_a_budget_passes_on_what_a_part_leaves_over():
    now = [0.0]
    budget = Budget(100, now=lambda: now[0])
    parts = budget.parts([1, 1, 2])
    assert next(parts).left() == 25
    now[0] = 4  # the first part took 4 seconds
    assert next(parts).left() == pytest.approx(32)
    now[0] = 90  # the second took far more than its share
    last = next(parts)
    assert last.left() == 10
    now[0] = 101
    assert last.left() == budget.left() == 0


def test_no_budget_is_no_limit():
    budget = Budget()
    assert not budget.limited and budget.left() == math.inf
    assert [part.left() for part in budget.parts([1, 2])] == [math.inf, math.inf]
    with pytest.raises(ValueError, match="seconds: expected more than 0, got 0"):
        Budget(0)


def test_rounds_are_what_fits(monkeypatch):
    machine = Machine(monkeypatch)
    turns = harness.Alternation({name: machine.subject(name, 100, turn_seconds=0.5) for name in "ab"}, machine.probe)
    budget = machine.budget(3.2)
    turns.first(budget)
    turns.more(4, budget)
    assert {name: len(made) for name, made in turns.results.items()} == {"a": 3, "b": 3}
    assert machine.time <= 3.2


def test_a_first_turn_is_not_repeated_where_time_is_short_but_followed_by_more(monkeypatch):
    machine = Machine(monkeypatch, probes=[10e9, 20e9, 20e9, 20e9, 20e9, 20e9])
    turns = harness.Alternation({"a": machine.subject("a", 100)}, machine.probe)
    turns.first(machine.budget(9))
    assert [r["spread"] for r in turns.results["a"]] == [pytest.approx(0.667, abs=1e-3)]
    turns.more(0, machine.budget(9))
    assert [r["spread"] for r in turns.results["a"]][1:] == [0.0]
    assert harness.settle(turns.results["a"])[1]


def test_slow_subjects_get_fewer_rounds_after_the_others(monkeypatch):
    machine = Machine(monkeypatch)
    slices = {"slow": machine.subject("slow", 1, turn_seconds=4.0), "quick": machine.subject("quick", 1)}
    turns = harness.Alternation(slices, machine.probe, seconds={"slow": 3.0})
    turns.first(machine.budget(60))
    turns.more(4, machine.budget(60))
    assert machine.order == ["quick", "slow", *["quick"] * 4, "slow"]
    assert (len(turns.results["slow"]), len(turns.results["quick"])) == (harness.SLOW_ROUNDS, 5)
    assert turns.seconds == {"slow": pytest.approx(4.0), "quick": pytest.approx(0.1)}


def test_without_a_budget_slow_subjects_get_every_round(monkeypatch):
    machine = Machine(monkeypatch)
    rounds = harness.alternate({"slow": machine.subject("slow", 1, turn_seconds=9.0)}, 5, machine.probe)
    assert len(rounds["slow"]) == 5


def test_what_does_not_fit_is_left_out_with_a_reason(monkeypatch):
    machine = Machine(monkeypatch)
    slices = {"slow": machine.subject("slow", 1, turn_seconds=8.0), "quick": machine.subject("quick", 1)}
    turns = harness.Alternation(slices, machine.probe, seconds={"slow": 40.0})
    turns.first(machine.budget(5))
    turns.more(2, machine.budget(5))
    assert turns.results["slow"] == [{"left_out": "no time left for a turn of 40.0 s"}]
    assert machine.order == ["quick"] * 3
    assert not harness.was_measured(turns.results["slow"])


def test_a_doubtful_guess_leaves_nothing_out(monkeypatch):
    machine = Machine(monkeypatch)
    turns = harness.Alternation({"a": machine.subject("a", 1)}, machine.probe, seconds={"a": 6.0})
    turns.first(machine.budget(2))
    assert machine.order == ["a"] and turns.seconds == {"a": pytest.approx(0.1)}


def test_without_any_time_everything_is_left_out(monkeypatch):
    machine = Machine(monkeypatch)
    turns = harness.Alternation({"a": machine.subject("a", 1), "b": machine.subject("b", 1)}, machine.probe)
    budget = machine.budget(1)
    machine.time = 2
    turns.first(budget)
    turns.more(4, budget)
    assert turns.results == {"a": [{"left_out": "no time left"}], "b": [{"left_out": "no time left"}]}


def test_a_guess_grows_with_the_tokens_only_beyond_the_slice():
    assert matmul.guess(0.11, 16, 512, slice_seconds=0.06) == pytest.approx(0.11)
    assert matmul.guess(1.11, 128, 512, slice_seconds=0.06) == pytest.approx(4.11)


def test_a_run_within_minutes_measures_all_threads_first_and_one_after():
    planned = run.stages(cpus=2, last_level_cache_bytes=32 << 20)
    assert [stage.file for stage in planned] == [
        "matmul_2_threads.json",
        "gather_2_threads.json",
        "matmul_1_thread.json",
        "gather_1_thread.json",
    ]
    assert [stage.file for stage in run.stages(1, 0)] == ["matmul_1_thread.json", "gather_1_thread.json"]
    many = run.stages(64, 512 << 20)[0].given
    assert int(many[many.index("--megabytes") + 1]) * 1_000_000 >= 4 * (512 << 20)
    assert run.last_level_cache({"caches": {"L1": "32K", "L2": "1024K", "L3": "32768K"}}) == 32 << 20
    assert run.last_level_cache({"caches": {}}) == 0


def test_every_cell_of_shape_a_has_its_time():
    assert {tokens for tokens, _ in matmul.CELLS} == set(matmul.TOKENS)
    assert {case for _, case in matmul.CELLS} == {"dram", "warm"}
    assert next(iter(matmul.CELLS)) == (1, "dram")


def test_what_was_left_out_is_told():
    left = [{"subject": "peer", "tokens": 512, "case": case, "left_out": "no time"} for case in ("dram", "warm")]
    left.append({"subject": "other", "ids": 0, "case": "table", "left_out": "no time"})
    contents = {"bench": "matmul", "settings": {"threads": 2}, "left_out": left}
    assert run.left_out_lines(contents) == [
        "matmul, 2 thread(s): no time for peer: 512 tokens dram, 512 tokens warm",
        "matmul, 2 thread(s): no time for other: 0 ids table",
    ]


@pytest.mark.parametrize("words", [["--write", "README.md"], ["--only", "matmul"]])
def test_the_readme_is_written_by_the_full_run_only(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    assert "expected --full" in capsys.readouterr().err
