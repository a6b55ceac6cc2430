"""`lowbit quantize`: a model folder in, a smaller one out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.terminal import DebugOption, DeviceOption, DtypeOption, JsonOption, Terminal, ThreadsOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.cli.terminal import Progress
    from lowbit.quantize import Plan, Recipe, Report
    from lowbit.quantize.allocate import Budget

_MEASURED_WINDOWS = 8  # on which a budget measures attention, MLP and tables in every format, a forward pass each
FORMATS = ("lowbit", "gptq", "gptq_v2", "bitnet", "bitnet_auto")

# The options that quantize and ternarize share.
HeadBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of the output head, or trit; 16 leaves it. Default: 8 where it is the embedding too, or 16."
    ),
]
EmbedBitsOption = Annotated[
    str | None, typer.Option(help="Of the token embedding, or trit; 16 leaves it. Default: as for the head.")
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN=CHANGE, for modules whose name matches: 'embed_tokens=8', 'down_proj=8:g64', "
        "'lm_head=skip'. Repeatable; the first match decides."
    ),
]
CorrectionOption = Annotated[
    str | None,
    typer.Option(
        help="Of the weights for what the layers before have lost: none or least_squares; default: least_squares "
        "up to 4 bits, if there are 4096 tokens.",
    ),
]
ActivationsOption = Annotated[str, typer.Option(help="Of the quantized layers at run time: float or int8.")]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(help="Text file or folder of texts; repeatable. Default: source text of Python's library."),
]
ContextOption = Annotated[int, typer.Option(min=0, help="Tokens a window; 0: the model's maximum, at most 2048.")]
SamplesOption = Annotated[int, typer.Option(min=0, help="Calibrate on so many windows; 0: the whole text.")]
FormatOption = Annotated[
    str,
    typer.Option(help="lowbit; gptq or gptq_v2 for other tools; bitnet or bitnet_auto for ternary in Transformers."),
]
FormatsOption = Annotated[
    str,
    typer.Option(help="What --budget chooses from: widths, or changes as rules have them, 'trit,2:g64,8'; 16: as is."),
]
TextOption = Annotated[list[str] | None, typer.Option(help="Evaluate on this UTF-8 text file afterwards; repeatable.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
ReportOption = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and report.json to OUT.")]


def quantize(
    invocation: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder of the model, or its name on the Hugging Face hub.", metavar="MODEL")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")],
    bits: Annotated[
        str, typer.Option(help="2, 3, 4, 8 or trit (ternary); 16 leaves the linear layers as they are.")
    ] = "4",
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale, a multiple of 16; -1: a whole row.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Without or with stored zero points.")
    ] = True,
    head_bits: HeadBitsOption = None,
    embed_bits: EmbedBitsOption = None,
    embed: Annotated[
        str, typer.Option(help="own; or from-head: the embedding uses the head's table, if that costs little.")
    ] = "own",
    embed_bound: Annotated[
        float, typer.Option(help="The most KL divergence that --embed from-head may cost; inf: whatever it costs.")
    ] = 0.1,
    rule: RuleOption = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="JSON file with all of the recipe, as sensitivity -o writes it, instead of its options."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Choose a format for every module: '2.5bits' a weight, or '120MB' for the whole model; rules go first."
        ),
    ] = None,
    formats: FormatsOption = "trit,2,3,4,8",
    method: Annotated[str, typer.Option(help="gptq, or rtn: round to nearest, without calibration.")] = "gptq",
    order: Annotated[str, typer.Option(help="Column order of the solver: none, act or gar.")] = "gar",
    damp: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal added to it.")] = 0.01,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Search the clipping of every group; default: up to 4 bits.")
    ] = None,
    correction: CorrectionOption = None,
    scale_dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
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
    """Quantize a model with GPTQ and write it, with a report."""
    terminal = Terminal(json)
    check_output(output, model, force, format)
    _check_alone(invocation, "recipe", (*_WIDTHS, "rule", "budget", "formats", *_RECIPE_OPTIONS))
    _check_alone(invocation, "budget", _WIDTHS)

    import lowbit
    from lowbit.quantize.allocate import parse_budget

    wanted = parse_budget(budget) if budget else None
    made = (
        read_recipe(recipe)
        if recipe
        else lowbit.Recipe(
            bits=width(bits),
            group_size=group_size,
            symmetric=symmetric,
            head_bits=width(head_bits, format),
            embed_bits=width(embed_bits, format),
            embed_from_head=_from_head(embed),
            embed_bound=embed_bound,
            rules=rule or {},
            method=method,
            order=order,
            damp=damp,
            clip=clip,
            correction=correction,
            scale_dtype=scale_dtype,
            activations=activations,
        )
    )
    run(
        terminal,
        model,
        output,
        made,
        budget=wanted,
        formats=formats.split(","),
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


_WIDTHS = ("bits", "head_bits", "embed_bits", "embed")
_RECIPE_OPTIONS = (
    *("group_size", "symmetric", "method", "order", "damp", "clip", "correction", "scale_dtype", "activations"),
)


def _check_alone(invocation: typer.Context, option: str, others: tuple[str, ...]) -> None:
    """ValueError: options given beside one that says the same."""
    if invocation.params[option] is None:
        return
    for other in others:
        if invocation.get_parameter_source(other).name == "COMMANDLINE":
            raise ValueError(f"--{option}: expected without --{other.replace('_', '-')}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file. ValueError: not one."""
    import json

    from lowbit import Recipe

    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a recipe in JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a recipe, a JSON object, got {type(values).__name__}")
    return Recipe.from_dict(values)


def width(bits: str | None, format: str = "lowbit") -> int | str | None:
    """An option's width as a recipe takes it. Left open, a table stays where the format of the files has none."""
    if bits is None:
        return None if format == "lowbit" else 16
    return int(bits) if bits.isdigit() else bits


def _from_head(embed: str) -> bool:
    if embed not in ("own", "from-head"):
        raise ValueError(f"embed: expected own or from-head, got {embed!r}")
    return embed == "from-head"


def run(
    terminal: Terminal,
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    calibration: list[str] | None,
    context: int,
    samples: int,
    format: str,
    text: list[str] | None,
    report: bool,
    dtype: str,
    device: str,
    threads: int,
    budget: Budget | None = None,
    formats: Sequence[str] = (),
) -> None:
    """What quantize and ternarize do with a recipe: load, quantize, save, evaluate, report. With a budget the recipe is
    completed by the formats that it allows, and what they cost is measured on windows held out of the calibration."""
    import lowbit
    from lowbit import doctor
    from lowbit.cli import torch_options
    from lowbit.evaluate import read_texts

    folder = torch_options.model_folder(model)
    calibrated = recipe.needs_calibration or budget is not None
    data, source = calibration_text(calibration) if calibrated else (None, "none (rounded to nearest)")
    texts = read_texts(text) if text else []
    torch_options.set_threads(threads)
    terminal.line("doctor", doctor.summary(doctor.examine()))

    loaded = torch_options.load_float_model(folder, dtype, device)
    tokenizer = torch_options.load_tokenizer(folder) if calibrated or texts else None
    choice = None
    if budget is not None:
        from lowbit.cli import sensitivity

        data, held_out = sensitivity.windows(loaded, data, tokenizer, context, samples)
        measured = sensitivity.measure(terminal, loaded, data, formats, recipe, "kinds", held_out[:_MEASURED_WINDOWS])
        choice = sensitivity.choose(terminal, measured, budget, recipe)
        recipe = choice.recipe
    with terminal.progress("blocks") as bar:
        result = lowbit.quantize(
            loaded,
            data,
            recipe,
            tokenizer=tokenizer,
            context=None if budget else context or None,
            max_windows=None if budget else samples or None,
            progress=_Shown(terminal, bar, format, source),
        )
    lowbit.save(loaded.cpu(), output, format=format, tokenizer=tokenizer)
    evaluation = verified = None
    if choice is not None:
        reference = torch_options.load_float_model(folder, dtype, device)
        verified = sensitivity.verify(terminal, loaded.to(device), reference, held_out)
        del reference
    if texts:
        del loaded  # measured is what was written
        evaluation = _evaluate(terminal, folder, output, tokenizer, texts, dtype, device)
    written = _report(model, output, result, source, evaluation)
    if choice is not None:
        written["budget"] = {"budget": str(budget), **choice.to_dict(), **verified}
    page = None
    if report:
        from lowbit.report import write_report

        page, _ = write_report(written, output)
    terminal.line("done", _summary(written, page), style="bold green")
    if terminal.json:
        terminal.emit({**written, "report": str(page) if page else None})


def check_output(output: Path, model: str, force: bool, format: str) -> None:
    """Raises before any work for a folder that must not be written, or an unknown file format."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: expected a folder, got a file")
    if output.is_dir() and Path(model).is_dir() and output.samefile(model):
        raise ValueError(f"{output}: expected another folder than the model's own")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise FileExistsError(f"{output}: not empty (--force writes into it)")
    output.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work


def calibration_text(paths: list[str] | None) -> tuple[Any, str]:
    """What to calibrate on, and what to call it."""
    from lowbit import evaluate, sample_text

    if paths and len(paths) == 1:
        return Path(paths[0]), paths[0]
    if paths:
        return evaluate.read_texts(paths), ", ".join(paths)
    texts = sample_text.calibration_text()
    return texts, (
        f"{sum(map(len, texts)):,} characters of {len(texts)} modules of Python's standard library "
        "(give text of your own with --calibration)"
    )


def _evaluate(
    terminal: Terminal, folder: Path, output: Path, tokenizer: Any, texts: list[str], dtype: str, device: str
) -> dict[str, Any]:
    from lowbit.cli import evaluate, torch_options
    from lowbit.evaluate import encode

    reference = torch_options.load_model(folder, dtype, device=device)
    quantized = torch_options.load_model(output, dtype, device=device)
    return evaluate.measure(terminal, quantized, encode(tokenizer, texts), reference, context=0, max_windows=0)


def _report(model: str, output: Path, result: Report, source: str, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The report as lowbit.report describes it."""
    import lowbit

    weights = sum(row["shape"][0] * row["shape"][1] for row in result.modules)
    packed_bits = sum(row["shape"][0] * row["shape"][1] * row["bits_per_weight"] for row in result.modules)
    return {
        "model": model,
        "output": str(output),
        "version": lowbit.__version__,
        "recipe": result.recipe,
        "calibration": {"source": source, **(result.calibration or {})},
        "modules": result.modules,
        "kept": result.kept,
        "unpatched": result.unpatched,
        "totals": {
            "modules": len(result.modules),
            "bytes_before": result.parameter_bytes,
            "bytes_after": result.packed_parameter_bytes,
            "bits_per_weight": packed_bits / weights if weights else None,
            "seconds": result.seconds,
        },
        "evaluation": evaluation,
    }


def _summary(report: dict[str, Any], page: Path | None) -> str:
    from lowbit.report import human_bytes, human_figure

    totals, figures = report["totals"], report["evaluation"]
    before, after = human_bytes(totals["bytes_before"]), human_bytes(totals["bytes_after"])
    parts = [f"{before} → {after} in {totals['seconds']:.1f} s"]
    if figures:
        before, after = human_figure(figures["reference_perplexity"]), human_figure(figures["perplexity"])
        parts += [
            f"perplexity {before} → {after}",
            f"KL {human_figure(figures['kl_divergence'])}",
            f"{figures['reference_tokens_per_second']:.0f} → {figures['tokens_per_second']:.0f} tokens/s",
        ]
    fallbacks = sum(1 for row in report["modules"] if row["fallback"])
    if fallbacks:
        parts.append(f"{fallbacks} with a fallback")
    parts.append(f"report {page}" if page else report["output"])
    return " · ".join(parts)


def _check_plan(plan: Plan, format: str) -> None:
    """Raises, before any work, where a format of others cannot hold what is planned."""
    bitnet = format.startswith("bitnet")
    for module in plan.quantized:
        if module.is_table:
            raise ValueError(f"{module.name}: format {format} holds linear layers only: leave it at 16 bits")
        if (module.spec.format == "trit") != bitnet:
            held = "ternary matrices" if bitnet else "integer codes"
            raise ValueError(f"{module.name}: format {format} holds {held} only, got {module.spec.format}")
        if bitnet and not module.spec.per_tensor:
            raise ValueError(f"{module.name}: format {format} holds one scale a matrix (absmean), got one a group")


class _Shown:
    """Told by lowbit.quantize what happens (the methods of lowbit.quantize.Progress); prints it."""

    def __init__(self, terminal: Terminal, bar: Progress, format: str, source: str) -> None:
        self._terminal, self._bar, self._format, self._source = terminal, bar, format, source

    def on_plan(self, plan: Plan) -> None:
        from lowbit.report import human_bytes, split_names

        if self._format != "lowbit":
            _check_plan(plan, self._format)
        self._terminal.line(
            "plan",
            f"{len(plan.quantized)} of {len(plan.modules)} matrices · {human_bytes(plan.parameter_bytes)} → "
            f"{human_bytes(plan.packed_parameter_bytes)} · {plan.bits_per_weight:.2f} bits/weight",
        )
        self._terminal.line("text", self._source)
        names = [module.name for module in plan.quantized]
        self._split = dict(zip(names, split_names(names), strict=True))
        widest = max((len(rest) for _, rest in self._split.values()), default=0)
        shapes = max((len(_shape(module.shape)) for module in plan.quantized), default=0)
        self._table = self._terminal.stream(
            ("layer", "module", "shape", "bits", "rel.err", "damp", "time", ""),
            (5, widest, shapes, 4, 7, 5, 6, 0),
            numbers=("layer", "bits", "rel.err", "damp", "time"),
        )

    def on_block_start(self, index: int, total: int, name: str) -> None:
        self._bar.update(index, total)

    def on_module(self, row: dict[str, Any]) -> None:
        from lowbit.report import human_figure

        layer, rest = self._split[row["name"]]
        note = row["fallback"] or {"rtn": "rounded to nearest", "exact": "ternary already"}.get(row["method"], "")
        if row["kl_divergence"] is not None:
            note = ", ".join(filter(None, [note, f"KL {row['kl_divergence']:.2g} by itself"]))
        self._table.row(
            (
                "" if layer is None else str(layer),
                rest,
                _shape(row["shape"]),
                row["format"].removeprefix("int"),
                "-" if row["relative_error"] is None else f"{row['relative_error']:.4f}",
                human_figure(row["damp"]),
                f"{row['seconds']:.2f}s",
                note,
            ),
            style="yellow" if row["fallback"] else None,
        )

    def on_block_end(self, index: int, total: int, name: str) -> None:
        self._bar.update(index + 1, total)

    def on_done(self, report: Report) -> None:
        if report.embed_from_head is not None:
            self._terminal.line("embedding", f"the head's table; by itself that costs KL {report.embed_from_head:.2g}")
        for parameter in report.unpatched:
            self._terminal.warn(
                f"{parameter['name']} {_shape(parameter['shape'])} is no matrix of a module: left as it is"
            )


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return "×".join(map(str, shape))
