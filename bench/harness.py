"""Timing for the benchmarks: alternating slices, a bandwidth probe beside each, workers in processes of their own.

A benchmark measures several subjects (ours and the peers) on a machine whose memory bandwidth drifts, because other
tenants share it. So nothing is measured once: a row is a number of rounds, a round gives every subject a slice of some
tens of milliseconds, and a read-bandwidth probe runs between any two slices. What is compared is what happened in the
same round. Each library runs in a process of its own (two OpenMP runtimes in one process fight over the cores) and is
driven through a line of JSON a question over a pipe.

Standard library only: the workers run it under whatever interpreter has their library.
"""

from __future__ import annotations

import datetime
import json
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

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BUSY_SHARE = 0.08  # of one core, taken by other processes or by the hypervisor, above which a slice is repeated
CLOCK_TICKS = 2  # /proc/stat counts ticks of 10 ms: less than this many is not evidence of anything
PROBE_BYTES = 256 << 20
SETTLE_SECONDS = 0.005  # thread pools spin for a few milliseconds after their last task


# ---- statistics ----


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie: the nearest rank, no interpolation."""
    if not values:
        raise ValueError("quantile: expected at least one value, got none")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(rounds: list[dict], bytes_read: int) -> dict:
    """A row's figures from its rounds.

    Each round is {"us": median of its slice, "calls": timed calls, "probe": bytes/s read around the slice, "other":
    share of a core that others took}. Quiet rounds are preferred: busy ones count only if there is nothing else.
    The share of the bandwidth is the median of the rounds' shares, not a quotient of medians: the probe and the
    slice that drifted together stay together.
    """
    if not rounds:
        raise ValueError("rounds: expected at least one, got none")
    quiet = [r for r in rounds if r["other"] <= BUSY_SHARE]
    used = quiet or rounds
    times = [r["us"] for r in used]
    return {
        "us": statistics.median(times),
        "us_min": min(times),
        "us_p90": quantile(times, 0.9),
        "calls": sum(r["calls"] for r in used),
        "rounds_used": len(used),
        "rounds": len(rounds),
        "quiet": bool(quiet),
        "bytes": bytes_read,
        "gbps": statistics.median(bytes_read / r["us"] for r in used) * 1e-3,
        "probe_gbps": statistics.median(r["probe"] for r in used) * 1e-9,
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


def document(bench: str, settings: dict, versions: dict, not_installed: dict, rows: list[dict], probe: dict) -> dict:
    """The result file's contents; table.py and compare.py read this."""
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

    Returns the seconds of each timed call and the position to go on from.
    """
    for _ in range(warm_up):
        calls[position % len(calls)]()
        position += 1
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
    """Gives every subject a slice in each of `rounds` rounds, the probe between any two.

    slices: subject -> its worker and its slice, which returns the seconds of each call. A slice that others disturbed
    is repeated up to `retries` times and the quietest attempt counts. Returns the rounds of each subject, as
    summarise() reads them; a subject whose slice raised WorkerError has {"failure": its message} as its only round.
    """
    results: dict[str, list[dict]] = {name: [] for name in slices}
    before = probe()
    for _ in range(rounds):
        for name, (worker, run) in slices.items():
            if results[name] and "failure" in results[name][0]:
                continue
            attempts: list[dict] = []
            try:
                while not attempts or (attempts[-1]["other"] > BUSY_SHARE and len(attempts) <= retries):
                    measured = _measure(worker, run)
                    time.sleep(SETTLE_SECONDS)
                    after = probe()
                    attempts.append({**measured, "probe": (before + after) / 2})
                    before = after
                results[name].append(min(attempts, key=lambda attempt: attempt["other"]))
            except WorkerError as failure:
                results[name] = [{"failure": str(failure)}]
    return results


def _measure(worker: Worker, run: Callable[[], list[float]]) -> dict:
    """One slice, and how much of a core others took meanwhile."""
    busy, own, start = _busy_seconds(), worker.cpu_seconds + time.process_time(), time.perf_counter()
    seconds = run()
    wall = time.perf_counter() - start
    own = worker.cpu_seconds + time.process_time() - own
    other = other_share(_busy_seconds() - busy, own, wall)
    return {"us": statistics.median(seconds) * 1e6, "calls": len(seconds), "other": round(other, 3)}
