"""Progress of a quantization run: the protocol, and two ways to show it in a terminal or a log.

`quantize` calls the methods of one object in this order: on_plan once; for each block on_block_start,
on_module for every matrix it packed, on_block_end; on_module for the matrices outside the blocks; on_done
once.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


class Progress:
    """The protocol, and a progress that shows nothing."""

    def on_plan(self, plan: Any) -> None:
        """plan: the `Plan` about to be carried out."""

    def on_block_start(self, index: int, total: int, name: str) -> None:
        """index counts from 0; total: blocks to calibrate; name: the block's full module name."""

    def on_module(self, row: dict[str, Any]) -> None:
        """row: one entry of `Report.modules`."""

    def on_block_end(self, index: int, total: int, name: str) -> None:
        """The block is packed."""

    def on_done(self, report: Any) -> None:
        """report: the finished `Report`."""

    def on_window(self, done: int, total: int) -> None:
        """`sensitivity.measure` only: windows on which groups of modules have been measured."""


class PlainProgress(Progress):
    """One line an event, for logs and pipes. stream: default standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._start = time.monotonic()
        self._left = TimeLeft()

    def on_plan(self, plan: Any) -> None:
        self._start = time.monotonic()
        self._write(f"plan    {plan_line(plan)}")

    def on_module(self, row: dict[str, Any]) -> None:
        self._write(f"module  {module_line(row)}")

    def on_block_start(self, index: int, total: int, name: str) -> None:
        self._left.start(index)

    def on_block_end(self, index: int, total: int, name: str) -> None:
        elapsed, left = time.monotonic() - self._start, self._left.seconds(index, total)
        self._write(f"block   {index + 1}/{total} {name} · {clock(elapsed)} elapsed · {clock(left)} left")

    def on_done(self, report: Any) -> None:
        self._write(f"done    {done_line(report)}")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class RichProgress(Progress):
    """A table line a matrix above a bar with the time left. Needs rich; ImportError without it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(file=stream if stream is not None else sys.stderr)
        self._bar = Bar(
            BarColumn(bar_width=24), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task: Any = None
        self._start = time.monotonic()
        self._left = TimeLeft()

    def on_plan(self, plan: Any) -> None:
        self._start = time.monotonic()
        self._print(f"plan    {plan_line(plan)}")

    def on_block_start(self, index: int, total: int, name: str) -> None:
        self._left.start(index)
        if self._task is None:
            self._task = self._bar.add_task(f"0/{total} blocks", total=total)
            self._bar.start()

    def on_module(self, row: dict[str, Any]) -> None:
        self._print(f"        {module_line(row)}")

    def on_block_end(self, index: int, total: int, name: str) -> None:
        elapsed, left = time.monotonic() - self._start, self._left.seconds(index, total)
        text = f"{index + 1}/{total} blocks · {clock(elapsed)} elapsed · {clock(left)} left"
        self._bar.update(self._task, completed=index + 1, description=text)

    def on_done(self, report: Any) -> None:
        self._bar.stop()
        self._print(f"done    {done_line(report)}")

    def _print(self, line: str) -> None:
        # Module names and numbers are data: neither markup nor something to wrap or colour.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class TimeLeft:
    """The time left, from the blocks done so far: what comes before the first block is not part of their
    pace."""

    def __init__(self) -> None:
        self._first: float | None = None

    def start(self, index: int) -> None:
        if index == 0 or self._first is None:
            self._first = time.monotonic()
            self._begin = index

    def seconds(self, index: int, total: int) -> float:
        if self._first is None:
            return 0.0
        return (time.monotonic() - self._first) / (index + 1 - self._begin) * (total - index - 1)


def terminal_progress(stream: TextIO | None = None) -> Progress:
    """RichProgress when the stream (default standard error) is a terminal and rich is there, else
    PlainProgress."""
    stream = stream if stream is not None else sys.stderr
    if stream.isatty():
        try:
            return RichProgress(stream)
        except ImportError:
            pass
    return PlainProgress(stream)


def plan_line(plan: Any) -> str:
    """The plan in a line: `28 matrices · 7.3 → 2.4 MB · 4.25 bits/weight`."""
    return (
        f"{len(plan.quantized)} matrices · {megabytes(plan.parameter_bytes)} → "
        f"{megabytes(plan.packed_parameter_bytes)} MB · {plan.bits_per_weight:.2f} bits/weight"
    )


def module_line(row: dict[str, Any]) -> str:
    """One row of a report in a line of aligned columns."""
    rows, cols = row["shape"]
    error = "-" if row["relative_error"] is None else f"{row['relative_error']:.4f}"
    damp = "-" if row["damp"] is None else f"{row['damp']:g}"
    alone = "" if row["kl_divergence"] is None else f"  KL {row['kl_divergence']:.5f} by itself"
    fallback = f"  {row['fallback']}" if row["fallback"] else ""
    return (
        f"{row['name']:<36} {f'{rows}×{cols}':>12}  {row['format']}  {error:>6}  "
        f"{damp:>5}  {row['seconds']:.1f}s{alone}{fallback}"
    )


def done_line(report: Any) -> str:
    """The result in a line."""
    fallbacks = sum(1 for row in report.modules if row["fallback"])
    return (
        f"{len(report.modules)} matrices in {clock(report.seconds)} · {megabytes(report.parameter_bytes)} → "
        f"{megabytes(report.packed_parameter_bytes)} MB" + (f" · {fallbacks} with a fallback" if fallbacks else "")
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, hours when there are any: `0:04`, `1:02:09`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
