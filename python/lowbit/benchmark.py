"""How fast the kernels are on this machine, beside what its memory can deliver at that moment.

A case is a verb on a matrix of one format and shape with a number of tokens (gather: of ids). It is timed
  warm   on one matrix, again and again: what the caches hold is read from them
  dram   on copies that together exceed `rotate_bytes`, in turn: every call reads its weights from memory
Calls go through PackedMatrix, so a row is what a Python caller gets, output allocation included.

Ternary matrices have one scale, as ternary models are trained, and are measured as trits ("trit") and held as int2 with
zero point 1 ("trit-int2").

Beside each timing a probe reads memory as fast as it can (`_C.read_bandwidth`), twice before and twice after.
When the probes differ by more than BUSY_SPREAD of their median, or other processes needed CPUs that our
threads were on, the row is timed again, up to ATTEMPTS times, the quietest attempt is kept, and if that one
is not quiet either the row says `busy`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit import _C, abi
from lowbit.abi import empty_codes, normalise_group_size
from lowbit.matrix import PackedMatrix

FORMATS = (*abi.FORMATS, "trit-int2")
BUSY_SPREAD = 0.20
BUSY_CPUS = 0.10
ATTEMPTS = 3
_MIN_CALLS = 5
_MAX_CALLS = 20_000


@dataclass(frozen=True)
class Plan:
    """What to measure. shape: (rows, cols) of the matrix; times in seconds, sizes in bytes."""

    formats: Sequence[str] = FORMATS
    verbs: Sequence[str] = ("matmul", "gather")
    shape: tuple[int, int] = (4096, 4096)
    tokens: Sequence[int] = (1, 16, 128)
    ids: Sequence[int] = (1, 64, 4096)
    group_size: int = 128
    activations: str = "float"
    dtype: torch.dtype = torch.float32
    rotate_bytes: int = 500_000_000
    probe_bytes: int = 512 << 20
    seconds: float = 0.3

    def rows(self) -> int:
        """How many rows `measure` will give."""
        counts = {"matmul": len(self.tokens), "gather": len(self.ids)}
        return 2 * len(self.formats) * sum(counts[verb] for verb in self.verbs)


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """One dict a row, as each is measured.

    verb, format, rows, cols, group_size, tokens (gather: ids), activations, case, kernel, isa, threads
    microseconds (median), microseconds_min, microseconds_p90, calls
    bytes             codes, scales and zeros that a call reads; gather: of its rows, and the rows it writes
    gb_per_s          bytes / median time
    probe_gb_per_s    median of the probes beside the row;  probe_spread: (largest - smallest) / median
    share             gb_per_s / probe_gb_per_s (above 1 where the caches help)
    contended_cpus    CPUs' worth of time that other processes took from those our threads need
    busy, attempts    see above
    """
    for name in plan.formats:
        matrices = _copies(name, plan)
        for verb in plan.verbs:
            for tokens in plan.tokens if verb == "matmul" else plan.ids:
                for case, used in (("warm", matrices[:1]), ("dram", matrices)):
                    calls, touched = _calls(verb, used, tokens, plan)
                    timing = _time_beside_probe(calls, plan)
                    gb_per_s = touched / timing["microseconds"] * 1e-3
                    yield {
                        "verb": verb,
                        "format": name,
                        "rows": plan.shape[0],
                        "cols": plan.shape[1],
                        "group_size": used[0].group_size,
                        "tokens": tokens,
                        "activations": plan.activations if verb == "matmul" else None,
                        "case": case,
                        "kernel": _C.last_kernel(verb),
                        "isa": _C.isa(),
                        "threads": _C.threads(),
                        "bytes": touched,
                        "gb_per_s": gb_per_s,
                        "share": gb_per_s / timing["probe_gb_per_s"],
                        **timing,
                    }


def _copies(name: str, plan: Plan) -> list[PackedMatrix]:
    """Enough copies of one random matrix to exceed rotate_bytes, in memory of lowbit's own (huge pages)."""
    first = _random_matrix(name, plan)
    copies = [first]
    for _ in range(1, -(-plan.rotate_bytes // first.nbytes)):
        memory = empty_codes(first.rows, first.codes.shape[1]).copy_(first.codes)
        sides = first.scales.clone(), None if first.zeros is None else first.zeros.clone()
        layout = {"format": first.format, "cols": first.cols, "group_size": first.group_size}
        copies.append(PackedMatrix(memory, *sides, **layout, validate=False))
    return copies


def _random_matrix(name: str, plan: Plan) -> PackedMatrix:
    generator = torch.Generator().manual_seed(0)
    if name.startswith("trit"):
        codes = torch.randint(3, plan.shape, dtype=torch.uint8, generator=generator)
        trits = PackedMatrix.from_codes(codes, torch.full((1, 1), 0.01), format="trit")
        return trits.repack("int2") if name == "trit-int2" else trits
    rows, cols = plan.shape
    codes = torch.randint(1 << abi.FORMATS[name], plan.shape, dtype=torch.uint8, generator=generator)
    groups = -(-cols // normalise_group_size(plan.group_size, cols))
    scales = (torch.rand(rows, groups, generator=generator) / 100 + 0.001).half()
    return PackedMatrix.from_codes(codes, scales, format=name, group_size=plan.group_size)


def _calls(verb: str, matrices: list[PackedMatrix], tokens: int, plan: Plan) -> tuple[list[Callable[[], Any]], int]:
    """Thunks to call in turn, one a matrix, and the bytes that one of them touches."""
    generator = torch.Generator().manual_seed(tokens)
    rows, cols = plan.shape
    if verb == "matmul":
        x = torch.randn(tokens, cols, generator=generator).to(plan.dtype)
        return [lambda w=w: w.matmul(x, activations=plan.activations) for w in matrices], matrices[0].nbytes
    out = torch.empty(tokens, cols, dtype=plan.dtype)
    ids = [torch.randint(rows, (tokens,), generator=generator) for _ in matrices]
    calls = [lambda w=w, i=i: w.gather(i, dtype=plan.dtype, out=out) for w, i in zip(matrices, ids, strict=True)]
    return calls, tokens * matrices[0].nbytes // rows + out.nbytes


def _time_beside_probe(calls: list[Callable[[], Any]], plan: Plan) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    quietest = float("inf")
    for attempt in range(1, ATTEMPTS + 1):
        start, others = time.perf_counter(), _seconds_of_others()
        probes = [_probe(plan), _probe(plan)]
        seconds = sorted(_time(calls, plan.seconds))
        probes += [_probe(plan), _probe(plan)]
        others = (_seconds_of_others() - others) / (time.perf_counter() - start)
        contended = max(0.0, others - max(0, (os.cpu_count() or 1) - _C.threads()))
        middle = statistics.median(probes)
        spread = (max(probes) - min(probes)) / middle
        if spread + contended < quietest:
            quietest = spread + contended
            kept = {
                "microseconds": statistics.median(seconds) * 1e6,
                "microseconds_min": seconds[0] * 1e6,
                "microseconds_p90": seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))] * 1e6,
                "calls": len(seconds),
                "probe_gb_per_s": middle,
                "probe_spread": spread,
                "contended_cpus": contended,
                "busy": spread > BUSY_SPREAD or contended > BUSY_CPUS,
            }
        kept["attempts"] = attempt
        if not kept["busy"]:
            break
    return kept


def _seconds_of_others() -> float:
    """CPU time that the machine has spent on anything but this process (time stolen by the host included)."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _probe(plan: Plan) -> float:
    rate = _C.read_bandwidth(plan.probe_bytes, _C.threads())
    if rate <= 0:
        raise MemoryError(f"bandwidth probe: no memory for {plan.probe_bytes} bytes")
    return rate


def _time(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of single calls, each thunk in turn, for `seconds` in all after each has run once."""
    for call in calls:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_CALLS or (time.perf_counter() < end and len(times) < _MAX_CALLS):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
