"""`lowbit ternarize`: a model whose matrices are {-s, 0, s}, in 1.6 bits a weight."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.quantize import (
    ActivationsOption,
    CalibrationOption,
    ContextOption,
    CorrectionOption,
    EmbedBitsOption,
    ForceOption,
    FormatOption,
    HeadBitsOption,
    ReportOption,
    RuleOption,
    SamplesOption,
    TextOption,
    check_output,
    run,
    width,
)
from lowbit.cli.terminal import DebugOption, DeviceOption, DtypeOption, JsonOption, Terminal, ThreadsOption

if TYPE_CHECKING:
    from lowbit import Recipe

METHODS = ("exact", "absmean", "gptq")


def ternarize(
    model: Annotated[
        str, typer.Argument(help="Folder of the model, or its name on the Hugging Face hub.", metavar="MODEL")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")],
    method: Annotated[
        str,
        typer.Option(
            help="exact: pack the matrices that are ternary already and report the others; absmean: round by mean|w|, "
            "for models trained so (MatMulFreeLM, BitNet); gptq: solve, for models trained dense."
        ),
    ] = "exact",
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Only modules whose name matches: 'mlp', 'down_proj'. Repeatable; default: all in the blocks."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale, a multiple of 16; -1: a row; 0: the matrix. Default: 0 with absmean, 128 "
            "with gptq."
        ),
    ] = None,
    head_bits: HeadBitsOption = "16",
    embed_bits: EmbedBitsOption = "16",
    rule: RuleOption = None,
    correction: CorrectionOption = None,
    activations: ActivationsOption = "float",
    calibration: CalibrationOption = None,
    context: ContextOption = 0,
    samples: SamplesOption = 0,
    format: FormatOption = "lowbit",
    text: TextOption = None,
    force: ForceOption = False,
    report: ReportOption = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ternarize a model, or pack one that is ternary, and write it.

    Without a method, a model with no ternary matrix is reported on, matrix by matrix, and not packed.
    A matrix whose nonzero weights have one magnitude is packed as it is by every method: nothing is ternarized twice.
    """
    terminal = Terminal(json)
    check_output(output, model, force, format)

    recipe = _recipe(method, modules, group_size, head_bits, embed_bits, rule, correction, activations)
    if method == "exact":
        _require_ternary(terminal, model, dtype)
    run(
        terminal,
        model,
        output,
        recipe,
        calibration=calibration,
        context=context,
        samples=samples,
        format=format,
        text=text,
        report=report,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def _require_ternary(terminal: Terminal, model: str, dtype: str) -> None:
    """Nothing to pack is the usual case for weights kept in 16 bits, and no reason to write a copy: unless a matrix of
    the blocks is ternary, a report of how far each is from it, and ValueError."""
    from lowbit.cli import torch_options
    from lowbit.models import find_targets, weight_matrix
    from lowbit.quantize.ternary import is_ternary, ternary_state

    loaded = torch_options.load_float_model(torch_options.model_folder(model), dtype)
    linears = {t.name: weight_matrix(t.module) for t in find_targets(loaded) if "linear" in t.kinds}
    if any(map(is_ternary, linears.values())):
        return
    states = {name: ternary_state(weight) for name, weight in linears.items()}
    numbers = ("values", "zeros by the mean", "error by the mean")
    terminal.table(
        ("module", *numbers),
        [(name, f"{s.values:,}", f"{s.zeros:.0%}", f"{s.relative_error:.2f}") for name, s in states.items()],
        numbers=numbers,
    )
    if terminal.json:
        terminal.emit({"model": model, "matrices": [{"name": name, **asdict(s)} for name, s in states.items()]})
    nearest = min(states, key=lambda name: states[name].relative_error, default=None)
    found = "it has no linear layers" if nearest is None else f"the nearest, {nearest}, has {states[nearest]}"
    raise ValueError(
        f"{model}: expected ternary matrices, but {found}; --method absmean rounds the weights of a model that was "
        "trained with ternary ones, --method gptq solves for those of any model"
    )


def _recipe(
    method: str,
    modules: list[str] | None,
    group_size: int | None,
    head_bits: str,
    embed_bits: str,
    rules: list[str] | None,
    correction: str | None,
    activations: str,
) -> Recipe:
    import lowbit

    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if group_size is None:
        group_size = 128 if method == "gptq" else 0
    if group_size == 0 and method == "gptq":
        raise ValueError("group_size: expected a multiple of 16 or -1 with gptq, got 0")
    return lowbit.Recipe(
        bits=16 if modules else "trit",
        group_size=group_size or -1,
        per_tensor=group_size == 0,
        head_bits=width(head_bits),
        embed_bits=width(embed_bits),
        rules=[*(rules or []), *(f"{pattern}=trit" for pattern in modules or [])],
        method={"absmean": "rtn"}.get(method, method),
        correction=correction,
        activations=activations,
    )
