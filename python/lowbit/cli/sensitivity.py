"""`lowbit sensitivity`: what every part of a model loses in every format, and which formats a budget allows."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.quantize import CalibrationOption, ContextOption, SamplesOption, TextOption, calibration_text
from lowbit.cli.terminal import DebugOption, DeviceOption, DtypeOption, JsonOption, Terminal, ThreadsOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lowbit.cli.terminal import Progress
    from lowbit.quantize import Recipe
    from lowbit.quantize.allocate import Budget
    from lowbit.quantize.sensitivity import Choice, Sensitivity

_MEASURES = {
    "modules": "sum over modules of the squared error of the output, a token",
    "projections": "sum over projections of the KL divergence with that one alone quantized, shared by its modules",
    "kinds": "sum over kinds of the KL divergence with that one alone quantized, shared by its modules",
}


def sensitivity(
    model: Annotated[
        str, typer.Argument(help="Folder of the model, or its name on the Hugging Face hub.", metavar="MODEL")
    ],
    formats: Annotated[
        str,
        typer.Option(help="Widths, or changes as rules have them, separated by commas: 'trit,2:g64,8'; 16: as it is."),
    ] = "trit,2,3,4,8",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale where a format does not say.")] = 128,
    groups: Annotated[
        str,
        typer.Option(
            help="modules: each alone, by the error of its output; projections (all q_proj) and kinds (attention, mlp, "
            "head) by KL divergence with that group alone quantized."
        ),
    ] = "modules",
    budget: Annotated[
        str | None,
        typer.Option(help="Choose formats, quantize in memory and measure: '2.5bits' a weight, or '120MB' in all."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the chosen recipe, for lowbit quantize --recipe.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write charts and tables to this HTML file.")] = None,
    calibration: CalibrationOption = None,
    text: TextOption = None,
    context: ContextOption = 0,
    samples: SamplesOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what each part of a model loses in each format; with --budget, choose.

    Nothing is written but what -o and --plot name. KL divergence is measured on one calibration window in eight, held
    out, or on --text.
    """
    terminal = Terminal(json)

    import lowbit
    from lowbit.cli import torch_options
    from lowbit.evaluate import encode, read_texts
    from lowbit.quantize.allocate import pareto_curve, parse_budget
    from lowbit.quantize.calibration import token_windows

    wanted = parse_budget(budget) if budget else None
    if output is not None and wanted is None:
        raise ValueError("output: expected with --budget, which chooses the recipe")
    for path, suffix in ((output, ".json"), (plot, ".html")):
        if path is not None and (path.suffix != suffix or not path.absolute().parent.is_dir()):
            raise ValueError(f"{path}: expected a file {suffix} in a folder that is there")
    folder = torch_options.model_folder(model)
    data, source = calibration_text(calibration)
    texts = read_texts(text) if text else []
    torch_options.set_threads(threads)
    loaded = torch_options.load_float_model(folder, dtype, device)
    tokenizer = torch_options.load_tokenizer(folder)
    calibrated, held_out = windows(loaded, data, tokenizer, context, samples)
    if texts:
        held_out = token_windows(encode(tokenizer, texts), context=calibrated.shape[1])
        source += f"; measured on {', '.join(text)}"
    terminal.line("text", source)

    recipe = lowbit.Recipe(group_size=group_size)
    measured = measure(terminal, loaded, calibrated, formats.split(","), recipe, groups, held_out)
    _show(terminal, measured)
    report: dict[str, Any] = {
        "model": model,
        "version": lowbit.__version__,
        "source": source,
        **measured.to_dict(),
        "measure": _MEASURES[groups],
        "pareto": [{"bytes": point.bytes, "loss": point.loss} for point in pareto_curve(measured.items())],
        "choice": None,
    }
    if wanted is not None:
        choice = choose(terminal, measured, wanted, recipe)
        with terminal.progress("blocks") as bar:
            lowbit.quantize(loaded, calibrated, choice.recipe, progress=_Steps(bar))
        figures = verify(terminal, loaded, torch_options.load_float_model(folder, dtype, device), held_out)
        report["choice"] = {"budget": str(wanted), **choice.to_dict(), **figures}
        _tell(terminal, model, choice, output)
    if plot is not None:
        from lowbit.report import sensitivity_to_html

        plot.write_text(sensitivity_to_html(report), "utf-8")
        terminal.line("plot", str(plot))
    if json:
        terminal.emit(report)


def windows(
    model: torch.nn.Module, data: Any, tokenizer: Any, context: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration windows, and those held out of them."""
    from lowbit.quantize.sensitivity import hold_out
    from lowbit.quantize.walk import calibration_windows

    return hold_out(calibration_windows(model, data, tokenizer, context=context or None, max_windows=samples or None))


def measure(
    terminal: Terminal,
    model: torch.nn.Module,
    calibrated: torch.Tensor,
    formats: Sequence[str],
    recipe: Recipe,
    groups: str = "modules",
    held_out: torch.Tensor | None = None,
) -> Sensitivity:
    """`lowbit.quantize.sensitivity.measure` with progress bars."""
    from lowbit.quantize import sensitivity

    steps = 0 if held_out is None or groups == "modules" else len(held_out)
    with terminal.progress("blocks and windows" if steps else "blocks") as bar:
        return sensitivity.measure(
            model,
            calibrated,
            [label.strip() for label in formats],
            recipe,
            by=groups,
            evaluation=held_out,
            progress=_Steps(bar, steps),
        )


def choose(terminal: Terminal, measured: Sensitivity, budget: Budget, recipe: Recipe) -> Choice:
    """What a budget allows; told."""
    from collections import Counter

    from lowbit.quantize import sensitivity
    from lowbit.report import human_bytes

    choice = sensitivity.choose(measured, budget, recipe)
    counts = Counter(choice.formats.values())
    terminal.line(
        "budget",
        f"{budget} · {human_bytes(choice.total_bytes)} in all, {choice.bits_per_weight:.2f} bits a weight · "
        + ", ".join(f"{counts[label]} as {label}" for label in measured.formats if counts[label]),
    )
    return choice


def verify(
    terminal: Terminal, model: torch.nn.Module, reference: torch.nn.Module, held_out: torch.Tensor
) -> dict[str, Any]:
    """Perplexities, KL divergence and agreement of a quantized model on windows held out, told and returned."""
    from lowbit.evaluate import evaluate
    from lowbit.report import human_figure

    with terminal.progress("windows") as bar:
        result = evaluate(
            model, held_out.flatten(), reference=reference, context=held_out.shape[1], progress=bar.update
        )
    terminal.line(
        "verified",
        f"KL {human_figure(result.kl_divergence)} · perplexity {human_figure(result.reference_perplexity)} → "
        f"{human_figure(result.perplexity)} · {result.top1_agreement:.1%} of positions agree · "
        f"{result.windows} windows held out",
    )
    names = ("perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "windows", "context")
    return {name: getattr(result, name) for name in names}


def _show(terminal: Terminal, measured: Sensitivity) -> None:
    """The table of figures: a row a group, a column a format."""
    from lowbit.report import human_figure

    figure, name = ("kl_divergence", "group") if measured.groups else ("relative_error", "name")
    rows = measured.groups or measured.modules
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row[name], {})[row["format"]] = human_figure(row[figure])
    what = "KL divergence, that group alone quantized" if measured.groups else "relative error of the output"
    terminal.line("figures", what)
    terminal.table(
        (name, *measured.formats),
        [(each, *(found.get(label, "-") for label in measured.formats)) for each, found in cells.items()],
        numbers=measured.formats,
    )
    for row in measured.modules:
        if row["fallback"] and row["format"] == measured.formats[0]:
            terminal.warn(f"{row['name']}: {row['fallback']}")


def _tell(terminal: Terminal, model: str, choice: Choice, output: Path | None) -> None:
    """How to quantize so: the whole command, and a shorter one with a recipe file."""
    from lowbit.report import to_json

    command = f"lowbit quantize {shlex.quote(model)} -o OUT"
    rules = " ".join(f"--rule {shlex.quote(rule)}" for rule in choice.rules)
    terminal.line("rules", f"{command} --bits 16 --group-size {choice.recipe.group_size} {rules}")
    if output is not None:
        output.write_text(to_json(choice.recipe.to_dict()) + "\n", "utf-8")
        terminal.line("recipe", f"{command} --recipe {shlex.quote(str(output))}")


class _Steps:
    """Told how far it is (the methods of lowbit.quantize.Progress): blocks, then windows that are evaluated."""

    def __init__(self, bar: Progress, windows: int = 0) -> None:
        self._bar, self._windows, self._blocks = bar, windows, 0

    def on_plan(self, plan: Any) -> None:
        pass

    def on_block_start(self, index: int, total: int, name: str) -> None:
        self._bar.update(index, total + self._windows)

    def on_module(self, row: dict[str, Any]) -> None:
        pass

    def on_block_end(self, index: int, total: int, name: str) -> None:
        self._blocks = total
        self._bar.update(index + 1, total + self._windows)

    def on_window(self, done: int, total: int) -> None:
        self._bar.update(self._blocks + done, self._blocks + total)

    def on_done(self, report: Any) -> None:
        pass
