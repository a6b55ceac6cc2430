"""What every command prints with: labelled lines, tables and progress for people, JSON for programs.

Without --json everything goes to stdout; with it stdout carries JSON alone and people read stderr. On a
terminal there is colour and a live progress bar; in a pipe or a file the same lines come plain, without a
single escape code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as this process may use.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[
    str,
    typer.Option(help="Type of activations and of unquantized weights: auto (as stored), float32, bfloat16, float16."),
]
TernaryOption = Annotated[
    str,
    typer.Option(help="Ternary matrices in memory: trit (1.6 bits), int2 (2 bits), auto (by what was measured)."),
]

PLAIN_SECONDS = 5.0
_LABEL_WIDTH = 10


class Terminal:
    """Output of one run of one command."""

    def __init__(self, json: bool) -> None:
        self.json = json
        self.console = _Console(stderr=json, highlight=False, emoji=False, markup=False)
        self.live = self.console.is_terminal

    def print(self, text: str = "", style: str | None = None) -> None:
        # soft_wrap: a long line is the terminal's to break; rich would cut it at 80 columns in a pipe.
        self.console.print(text, style=style, soft_wrap=True)

    def line(self, label: str, text: str, style: str = "bold cyan") -> None:
        """`  label     text`."""
        from rich.text import Text

        self.console.print(Text.assemble("  ", (f"{label:<{_LABEL_WIDTH}}", style), text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.line("warning", text, style="bold yellow")

    def emit(self, value: dict[str, Any], indent: int | None = 2) -> None:
        """The JSON object of a command (indent None: one line)."""
        from lowbit.report import to_json

        sys.stdout.write(to_json(value, indent) + "\n")
        sys.stdout.flush()

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
        """A table whose rows are all known; columns named in `numbers` are right-aligned."""
        rows = [list(row) for row in rows]
        widths = [max(len(title), *(len(row[i]) for row in rows), 0) for i, title in enumerate(titles)]
        stream = self.stream(titles, widths, numbers)
        for row in rows:
            stream.row(row)

    def stream(self, titles: Sequence[str], widths: Sequence[int], numbers: Sequence[str] = ()) -> StreamTable:
        """A table whose rows come one by one; prints its head now."""
        return StreamTable(self, titles, [max(w, len(t)) for w, t in zip(widths, titles, strict=True)], numbers)

    @contextmanager
    def progress(self, noun: str, lines: bool = True) -> Iterator[Progress]:
        """`with terminal.progress("blocks") as p: p.update(done, total)`: a bar on a terminal; elsewhere,
        with `lines`, a line every PLAIN_SECONDS and at the end."""
        progress = Progress(self, noun, lines)
        try:
            yield progress
        finally:
            progress.close()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process here; main() has an exit code for a reader that goes away.
        raise BrokenPipeError


class StreamTable:
    def __init__(
        self, terminal: Terminal, titles: Sequence[str], widths: Sequence[int], numbers: Sequence[str]
    ) -> None:
        self._terminal, self._widths = terminal, widths
        self._right = [title in numbers for title in titles]
        self.row(titles, style="dim")

    def row(self, cells: Sequence[str], style: str | None = None) -> None:
        padded = [
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(cells, self._widths, self._right, strict=True)
        ]
        self._terminal.print("  " + "  ".join(padded).rstrip(), style=style)


class Progress:
    """A bar under the lines that are printed meanwhile; closing removes it."""

    def __init__(self, terminal: Terminal, noun: str, lines: bool) -> None:
        self._terminal, self._noun, self._lines = terminal, noun, lines
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if terminal.live:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn(" "),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[figures]}"),
                console=terminal.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, figures=noun)
            self._bar.start()

    def update(self, done: float, total: float) -> None:
        elapsed = time.monotonic() - self._start
        figures = f"{done:g}/{total:g} {self._noun} · {human_time(elapsed)} elapsed"
        if 0 < done < total:
            figures += f" · {human_time(elapsed / done * (total - done))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, figures=figures)
        elif self._lines and (done >= total or time.monotonic() - self._last_line >= PLAIN_SECONDS):
            self._terminal.print(f"  {figures}")
            self._last_line = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def human_time(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: "0:12", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
