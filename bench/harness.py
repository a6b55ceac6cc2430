"""Timing for the benchmarks: alternating slices, a bandwidth probe beside each, workers in processes of their own.

A benchmark measures several subjects (ours and the peers) on a machine whose memory bandwidth drifts, because other
tenants share it. So nothing is measured once: a row is a number of rounds, a round gives every subject a slice of some
tens of milliseconds, and a read-bandwidth probe runs between any two slices. What is compared is what happened in the
same round. Each library runs in a process of its own (two OpenMP runtimes in one process fight over the cores) and is
driven through a line of JSON a question over a pipe.

Busy machines: what was disturbed is measured again, and if that does not help the row is marked. Rounds between which
the machine changed its speed are never averaged in silence (disturbed(), settle()).

Standard library only: the workers run it under whatever interpreter has their library.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from budget import Budget

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BUSY_SHARE = 0.08  # of one core, taken by other processes or by the hypervisor, above which a slice is repeated
PROBE_SPREAD = 0.20  # (largest - smallest) / median of probes that are compared, above which the machine has drifted
CLOCK_TICKS = 2  # /proc/stat counts ticks of 10 ms: less than this many is not evidence of anything
PROBE_BYTES = 256 << 20
SETTLE_SECONDS = 0.005  # thread pools spin for a few milliseconds after their last task
STALE_SECONDS = 0.1  # a probe older than this is none of the slice that follows
WARM_UP_SECONDS = 0.25  # a call that took longer has woken all there is to wake
SLOW_SECONDS = 1.0  # a subject whose turn takes longer gets SLOW_ROUNDS where time is short, after all the others
SLOW_ROUNDS = 2
DOUBT = 4  # an expected turn is from fewer tokens, perhaps in a bad moment: only one that is so far off is left out


# ---- statistics ----


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie: the nearest rank, no interpolation."""
    if not values:
        raise ValueError("quantile: expected at least one value, got none")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def probe_spread(probes: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(probes) - min(probes)) / statistics.median(probes)


def disturbed(measured: dict) -> bool:
    """Whether others took CPU time during a slice, or the machine drifted between the probes before and after it."""
    return measured["other"] > BUSY_SHARE or measured["spread"] > PROBE_SPREAD


def settle(rounds: list[dict]) -> tuple[list[dict], bool]:
    """(the rounds that count, whether they are to be trusted).

    Of the rounds that nothing disturbed the largest set whose probes agree (within PROBE_SPREAD) counts, if that is
    more than half of them: a machine that changed its speed halfway is one machine or the other, not their average.
    Otherwise all of them count (the disturbed ones only if there is nothing else), and the row must be marked.
    """
    calm = sorted((r for r in rounds if not disturbed(r)), key=lambda r: r["probe"])
    best: list[dict] = []
    for first in range(len(calm)):
        for last in range(first + len(best), len(calm)):
            window = calm[first : last + 1]
            if probe_spread([r["probe"] for r in window]) <= PROBE_SPREAD:
                best = window
    return (best, True) if 2 * len(best) > len(calm) else (calm or rounds, False)


def summarise(rounds: list[dict], bytes_read: int) -> dict:
    """A row's figures from those of its rounds that settle() lets count; "quiet": False marks it as not to be trusted.

    Each round is {"us": median of its slice, "calls": timed calls, "probe": bytes/s read around the slice, "spread": of
    the probes before and after it, "other": share of a core that others took}. The share of the bandwidth is the
    median of the rounds' shares, not a quotient of medians: the probe and the slice that drifted together stay
    together.
    """
    if not rounds:
        raise ValueError("rounds: expected at least one, got none")
    used, quiet = settle(rounds)
    times = [r["us"] for r in used]
    return {
        "us": statistics.median(times),
        "us_min": min(times),
        "us_p90": quantile(times, 0.9),
        "calls": sum(r["calls"] for r in used),
        "rounds_used": len(used),
        "rounds": len(rounds),
        "quiet": quiet,
        "bytes": bytes_read,
        "gbps": statistics.median(bytes_read / r["us"] for r in used) * 1e-3,
        "probe_gbps": statistics.median(r["probe"] for r in used) * 1e-9,
        "probe_spread": round(max([probe_spread([r["probe"] for r in used]), *(r["spread"] for r in used)]), 3),
        "share": statistics.median(bytes_read / (r["us"] * 1e-6) / r["probe"] for r in used),
    }


# ---- the machine and the result file ----


def _first(pattern: str, text: str, default: str = "") -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else default


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def machine() -> dict:
    """What the figures depend on: CPU, caches, memory, the page settings and the kernel."""
    info = _read("/proc/cpuinfo")
    flags = set(_first(r"^flags\s*:\s*(.*)$", info).split())
    wanted = (
        "avx2",
        "avx512f",
        "avx512bw",
        "avx512vbmi",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
        "amx_bf16",
    )
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(str(index / "type"))
        if kind != "Instruction":
            caches["L" + _read(str(index / "level"))] = _read(str(index / "size"))
    return {
        "cpu": _first(r"^model name\s*:\s*(.*)$", info, platform.machine()),
        "family": _first(r"^cpu family\s*:\s*(.*)$", info),
        "model": _first(r"^model\s*:\s*(.*)$", info),
        "cpus": len(os.sched_getaffinity(0)),
        "features": [f for f in wanted if f in flags],
        "caches": caches,
        "memory_gb": round(int(_first(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), "0")) / 1e6, 1),
        "virtual": "hypervisor" in flags,
        "huge_pages": _first(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "kernel": platform.release(),
    }


def machine_name(description: dict) -> str:
    """A folder name: 'amd-epyc-family25-model17-2cpu'."""
    words = f"{description['cpu']} family{description['family']} model{description['model']} {description['cpus']}cpu"
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def commit() -> dict:
    """The commit measured, and whether the tree held changes that the commit does not."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def document(
    bench: str,
    settings: dict,
    versions: dict,
    not_installed: dict,
    rows: list[dict],
    probe: dict,
    *,
    left_out: list[dict] | None = None,
    multiply_gops: dict | None = None,
) -> dict:
    """The result file's contents; table.py, compare.py and plot.py read this.

    left_out: what there was no time for, as rows are described. multiply_gops: of the vector and tile units, by kind.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "schema": SCHEMA,
        "bench": bench,
        "date": now,
        **commit(),
        "machine": machine(),
        "settings": settings,
        "versions": versions,
        "not_installed": not_installed,
        "probe_gbps": probe,
        "multiply_gops": multiply_gops or {},
        "left_out": left_out or [],
        "rows": rows,
    }


def load(path: str | os.PathLike) -> dict:
    """Reads a result file. Raises ValueError if it is not one."""
    contents = json.loads(Path(path).read_text())
    if not isinstance(contents, dict) or contents.get("schema") != SCHEMA:
        found = contents.get("schema") if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"{path}: schema: expected {SCHEMA}, got {found}")
    return contents


def save(contents: dict, path: str | os.PathLike | None = None) -> Path:
    """Writes a result file; without a path, results/<machine>/<bench>.json."""
    target = Path(path) if path else RESULTS / machine_name(contents["machine"]) / f"{contents['bench']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(contents, indent=1) + "\n")
    return target


# ---- the probe ----


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from DRAM right now (one pass over a huge-page arena)."""
    from lowbit import _C

    return _C.read_bandwidth(PROBE_BYTES, threads) * 1e9


def multiply_rates(threads: int) -> dict[str, float]:
    """10^9 operations a second that the vector units do on registers alone, by type; without those they lack."""
    from lowbit import _C

    rates = {kind: _C.multiply_rate(kind, threads) for kind in ("int8", "bf16", "tiles")}
    return {kind: round(rate, 1) for kind, rate in rates.items() if rate > 0}


# ---- other people's use of the CPUs ----


def _busy_seconds() -> float:
    """CPU seconds that the whole machine has been busy, time stolen by the hypervisor included."""
    fields = [int(v) for v in _read("/proc/stat").splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _wait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def other_share(busy: float, own: float, wall: float) -> float:
    """Share of one core that others took; 0 where the kernel's clock is too coarse to tell."""
    other = busy - own
    return other / wall if other >= CLOCK_TICKS / os.sysconf("SC_CLK_TCK") else 0.0


# ---- workers ----


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its own."""


class Worker:
    """A child process that answers questions: a JSON object a line, in and out."""

    def __init__(self, command: list[str], threads: int, timeout: float = 600.0):
        """Starts `command`. threads: the size of its pools, by OMP_NUM_THREADS. timeout: seconds for one answer."""
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
        self.timeout = timeout
        self.cpu_seconds = 0.0  # that the answers so far have taken
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: str, **details):
        """Its answer. Raises WorkerError if it reports a failure, takes too long or is gone."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None and pipe_out is not None
        try:
            pipe_in.write(json.dumps({"question": question, **details}) + "\n")
            pipe_in.flush()
        except BrokenPipeError:
            raise WorkerError(f"{question}: the worker has ended with status {self.process.wait()}") from None
        if not select.select([pipe_out], [], [], self.timeout)[0]:
            self.process.kill()
            raise WorkerError(f"{question}: no answer within {self.timeout:.0f} s")
        line = pipe_out.readline()
        if not line:
            raise WorkerError(f"{question}: the worker has ended with status {self.process.wait()}")
        reply = json.loads(line)
        if "failure" in reply:
            raise WorkerError(reply["failure"])
        self.cpu_seconds += reply["cpu"]
        return reply["answer"]

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def serve(handlers: dict[str, Callable]) -> None:
    """The child's side: answers questions from stdin until it closes. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        details = json.loads(line)
        before = _own_seconds()
        try:
            answer = handlers[details.pop("question")](**details)
            reply = {"answer": answer, "cpu": _own_seconds() - before}
        except Exception as failure:  # any failure of a library is a result to report, not the end of the run
            reply = {"failure": f"{type(failure).__name__}: {failure}"[:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _own_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def time_slice(calls: list[Callable], position: int, seconds: float, warm_up: int) -> tuple[list[float], int]:
    """Times `calls` one by one, round robin from `position`, for `seconds` and at least one call.

    Before that, `warm_up` calls, or as many as take WARM_UP_SECONDS. Returns the seconds of each timed call and the
    position to go on from.
    """
    begin = time.perf_counter()
    for _ in range(warm_up):
        calls[position % len(calls)]()
        position += 1
        if time.perf_counter() - begin > WARM_UP_SECONDS:
            break
    taken = []
    end = time.perf_counter() + seconds
    while True:
        call = calls[position % len(calls)]
        position += 1
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        taken.append(stop - start)
        if stop >= end:
            return taken, position


def alternate(
    slices: dict[str, tuple[Worker, Callable[[], list[float]]]],
    rounds: int,
    probe: Callable[[], float],
    retries: int = 2,
) -> dict[str, list[dict]]:
    """Gives every subject a slice in each of `rounds` rounds, the probe between any two, and then up to as many again
    to those whose rounds do not settle(). Arguments and result are those of Alternation."""
    turns = Alternation(slices, probe, retries)
    turns.first()
    turns.more(rounds - 1)
    return turns.results


def was_measured(rounds: list[dict]) -> bool:
    """Whether a subject's rounds are rounds, not the reason why there are none."""
    return rounds[0].keys().isdisjoint(("failure", "left_out"))


class Alternation:
    """Subjects that take turns. Rounds may come in several goes, so that a run short of time can measure everything
    once before it measures anything more often.

    slices: subject -> its worker and its slice, which returns the seconds of each call. A slice that was disturbed is
    repeated up to `retries` times and the quietest attempt counts. seconds: subject -> what a turn is expected to take,
    brought up to date here; slow ones come last.

    results: subject -> its rounds, as summarise() reads them. One whose slice raised WorkerError has {"failure": its
    message} as its only round, one that was left out {"left_out": the reason}.
    """

    def __init__(self, slices: dict, probe: Callable[[], float], retries: int = 2, seconds: dict | None = None):
        self.slices, self.probe, self.retries = slices, probe, retries
        self.seconds: dict[str, float] = dict(seconds or {})
        self.results: dict[str, list[dict]] = {name: [] for name in slices}
        self.before, self.probed = 0.0, -math.inf  # the probe after the last slice, and when that was

    def first(self, budget: Budget | None = None) -> None:
        """A turn for each that fits; without repetitions where time is short, because more() follows."""
        budget = budget or Budget()
        for name in self._order():
            if budget.left() <= self.seconds.get(name, 0.0) / DOUBT:
                turn = f" for a turn of {self.seconds[name]:.1f} s" if name in self.seconds else ""
                self.results[name] = [{"left_out": f"no time left{turn}"}]
            else:
                self._take(name, budget, 0 if budget.limited else self.retries)

    def more(self, rounds: int, budget: Budget | None = None) -> None:
        """`rounds` more for each, and up to one more than that for those which have not settled, while time lasts. With
        a limit those slower than SLOW_SECONDS get SLOW_ROUNDS in all, after the others."""
        budget = budget or Budget()
        order = [name for name in self._order() if was_measured(self.results[name])]
        slow = [name for name in order if budget.limited and self.seconds[name] > SLOW_SECONDS]
        quick = [name for name in order if name not in slow]
        for names, count in ((quick, rounds), (slow, SLOW_ROUNDS - 1)):
            for _ in range(count):
                self._round(names, budget)
            for _ in range(count + 1):
                self._round([name for name in names if not settle(self.results[name])[1]], budget)

    def _order(self) -> list[str]:
        """As given, but the slow ones last."""
        seconds = {name: self.seconds.get(name, 0.0) for name in self.slices}
        return sorted(self.slices, key=lambda name: seconds[name] if seconds[name] > SLOW_SECONDS else 0.0)

    def _round(self, names: list[str], budget: Budget) -> None:
        """A turn for each, if there is time for all of them: a row's rounds are those of its neighbours, too."""
        names = [name for name in names if was_measured(self.results[name])]
        if sum(self.seconds[name] for name in names) <= budget.left():
            for name in names:
                self._take(name, budget, self.retries)

    def _take(self, name: str, budget: Budget, retries: int) -> None:
        worker, run = self.slices[name]
        attempts: list[dict] = []
        start = time.monotonic()
        if start - self.probed > STALE_SECONDS:  # other things were done meanwhile
            self.before = self.probe()
        try:
            while not attempts or (disturbed(attempts[-1]) and len(attempts) <= retries):
                begin = time.monotonic()
                measured = _measure(worker, run)
                time.sleep(SETTLE_SECONDS)
                after = self.probe()
                spread = round(probe_spread([self.before, after]), 3)
                attempts.append({**measured, "probe": (self.before + after) / 2, "spread": spread})
                self.before, self.probed = after, time.monotonic()
                if budget.left() < time.monotonic() - begin:
                    break
            self.results[name].append(min(attempts, key=lambda attempt: attempt["other"] + attempt["spread"]))
        except WorkerError as failure:
            self.results[name] = [{"failure": str(failure)}]
        self.seconds[name] = (time.monotonic() - start) / max(1, len(attempts))


def _measure(worker: Worker, run: Callable[[], list[float]]) -> dict:
    """One slice, and how much of a core others took meanwhile."""
    busy, own, start = _busy_seconds(), worker.cpu_seconds + time.process_time(), time.perf_counter()
    seconds = run()
    wall = time.perf_counter() - start
    own = worker.cpu_seconds + time.process_time() - own
    other = other_share(_busy_seconds() - busy, own, wall)
    return {"us": statistics.median(seconds) * 1e6, "calls": len(seconds), "other": round(other, 3)}
