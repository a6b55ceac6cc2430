"""`lowbit doctor`: what this machine and this build can do."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli.terminal import DebugOption, JsonOption, Terminal

KernelsOption = Annotated[bool, typer.Option("--kernels", help="Every CPU kernel, and why it is not used.")]


def doctor(kernels: KernelsOption = False, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show what this machine and build can do.

    Version, compiler, CPU features, the kernels that will run, threads, OpenMP runtimes, huge pages, GPU.
    Exit code 1 when the native library cannot be used.
    """
    from lowbit.doctor import examine, kernel_choices

    facts = examine()
    if kernels and "error" not in facts["native"]:
        facts["choices"] = kernel_choices()
    terminal = Terminal(json)
    if json:
        terminal.emit(facts)
    else:
        _show(terminal, facts)
    if "error" in facts["native"]:
        raise typer.Exit(1)


def _show(terminal: Terminal, facts: dict) -> None:
    native, packages = facts["native"], facts["packages"]
    terminal.line(
        "lowbit",
        f"{native.get('version', 'unknown version')} · Python {facts['python']} · {facts['platform']}",
    )
    terminal.line("packages", " · ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
    terminal.line("cpu", f"{facts['cpu']['model']} · {facts['cpu']['available']} CPUs for this process")
    if "error" not in native:
        terminal.line("features", native["cpu_features"] or "none that lowbit uses")
        terminal.line("build", f"{native['compiler']} · {native['library']}")
        forced = "by LOWBIT_ISA" if native["forced_isa"] else "best available"
        terminal.line("isa", f"{native['isa']} ({forced})")
        terminal.line("threads", f"{native['threads']} ({native['executor']})")
    terminal.line("openmp", ", ".join(facts["openmp"]) or "no runtime loaded")
    terminal.line("pages", f"transparent huge pages: {facts['huge_pages']}")
    terminal.line("gpu", facts["gpu"]["state"])
    if "choices" in facts:
        _show_choices(terminal, facts["choices"])
    elif "error" not in native:
        terminal.print()
        terminal.table(
            ("verb", "format", "kernel"),
            [(verb, name, kernel) for verb, chosen in native["kernels"].items() for name, kernel in chosen.items()],
        )
    for warning in facts["warnings"]:
        terminal.print()
        terminal.warn(warning)


def _show_choices(terminal: Terminal, choices: dict) -> None:
    terminal.print()
    terminal.table(
        ("verb", "format", "kernel", "state"),
        [
            (choice["verb"], choice["format"], row["name"], row["why"] or "selected")
            for choice in choices["kernels"]
            for row in choice["rows"]
        ],
    )
    tokens = choices["matmul_tokens"]
    terminal.print()
    terminal.line(
        "matmul",
        f"activations lie as tiles of 16 tokens, as rows where fewer are left than {_by_mode(tokens['tiles_from'])}; "
        f"at most {tokens['batch']} tokens at a time",
    )
    terminal.line(
        "rows",
        "of a matrix meet one token alone up to so many columns, several at once beyond them: "
        + _by_mode(tokens["own_digits"]),
    )
    for name, value in tokens["forced"].items():
        terminal.line("", f"by {name}={value}")


def _by_mode(numbers: dict[str, dict[str, int | None]]) -> str:
    """ "float mode: int2 12, int3 11; int8 mode: int2 11, int3 any"."""
    return "; ".join(
        f"{mode} mode: "
        + ", ".join(f"{name} {'any' if number is None else f'{number:,}'}" for name, number in formats.items())
        for mode, formats in numbers.items()
    )
