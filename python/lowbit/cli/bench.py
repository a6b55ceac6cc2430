"""`lowbit bench`: lowbit's kernels on this machine."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from lowbit.cli.terminal import DebugOption, Terminal, ThreadsOption


def bench(
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="int2, int3, int4, int8, trit, trit-int2 (ternary held as int2); repeatable. All by default."
        ),
    ] = None,
    verb: Annotated[list[str] | None, typer.Option(help="matmul, gather; repeatable. Both by default.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a matmul, ids of a gather; repeatable.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Rows and columns (out and in features), as 4096x11008.")] = None,
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale; -1: the whole row. Ternary: one scale.")
    ] = 128,
    activations: Annotated[str, typer.Option(help="float (16-bit fixed point) or int8.")] = "float",
    dtype: Annotated[str, typer.Option(help="Type of inputs and outputs: float32, bfloat16 or float16.")] = "float32",
    threads: ThreadsOption = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller matrices and shorter runs: a first impression.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a row, one row a line, on stdout.")] = False,
    debug: DebugOption = False,
) -> None:
    """Time the kernels on this machine.

    From the caches (warm) and from memory (dram), beside a probe of the memory's bandwidth: share is GB/s
    divided by what the probe reached right before and after. A row is marked busy when, three times in a row,
    the probes differed by more than 20% or other processes needed our CPUs.
    """
    terminal = Terminal(json)

    from lowbit import _C, benchmark
    from lowbit.cli.torch_options import parse_dtype, set_threads

    for name, given, known in (
        ("format", format, benchmark.FORMATS),
        ("verb", verb, ("matmul", "gather")),
        ("activations", [activations], ("float", "int8")),
    ):
        for value in given or ():
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    set_threads(threads)
    quick_sizes = {"rotate_bytes": 64_000_000, "probe_bytes": 128 << 20, "seconds": 0.05}
    plan = benchmark.Plan(
        formats=format or benchmark.FORMATS,
        verbs=verb or ("matmul", "gather"),
        shape=_parse_shape(shape) if shape else (1024, 1024) if quick else (4096, 4096),
        tokens=tokens or ((1, 16) if quick else (1, 16, 128)),
        ids=tokens or ((1, 64) if quick else (1, 64, 4096)),
        group_size=group_size,
        activations=activations,
        dtype=parse_dtype(dtype),
        **(quick_sizes if quick else {}),
    )
    rows, cols = plan.shape
    terminal.line(
        "bench",
        f"{rows}×{cols} · group size {plan.group_size} · {activations} activations · {dtype} · {_C.isa()} · "
        f"{_C.threads()} threads · dram: {plan.rotate_bytes / 1e6:.0f} MB in rotation",
    )
    kernels = [name for name, _ in _C.kernels()]
    numbers = ("tokens", "µs", "GB/s", "probe", "share")
    table = terminal.stream(
        ("verb", "format", "tokens", "case", "µs", "GB/s", "probe", "share", "kernel", ""),
        (6, 9, 6, 4, 9, 6, 6, 5, max(map(len, kernels)), 0),
        numbers,
    )
    busy = 0
    with terminal.progress("rows", lines=False) as progress:
        for done, row in enumerate(benchmark.measure(plan), 1):
            if json:
                terminal.emit(row, indent=None)
            table.row(
                (
                    row["verb"],
                    row["format"],
                    str(row["tokens"]),
                    row["case"],
                    f"{row['microseconds']:.1f}",
                    f"{row['gb_per_s']:.2f}",
                    f"{row['probe_gb_per_s']:.1f}",
                    f"{row['share']:.2f}",
                    row["kernel"],
                    _busy(row) if row["busy"] else "",
                ),
                style="yellow" if row["busy"] else None,
            )
            busy += row["busy"]
            progress.update(done, plan.rows())
    if busy:
        terminal.warn(f"{busy} of {plan.rows()} rows were timed while the machine was busy: do not compare them")


def _busy(row: dict[str, Any]) -> str:
    return f"busy: probes differ by {row['probe_spread']:.0%}, {row['contended_cpus']:.1f} CPUs lost to others"


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(f"shape: expected ROWSxCOLS such as 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])
