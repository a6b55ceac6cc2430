"""`lowbit eval`: perplexity, and distance from a reference model, on a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.cli.terminal import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    Terminal,
    TernaryOption,
    ThreadsOption,
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of the model.", metavar="MODEL")],
    against: Annotated[str | None, typer.Option(help="Folder of the reference, usually the unquantized model.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 text file; repeatable. Default: Python library source.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens a window; 0: the model's maximum, at most 2048.")] = 0,
    max_windows: Annotated[int, typer.Option(min=0, help="Stop after so many windows; 0: the whole text.")] = 0,
    dtype: DtypeOption = "auto",
    ternary: TernaryOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure perplexity, and distance from a reference.

    The text is cut into windows that do not overlap; the first token of each is not scored. With --against:
    KL divergence is the mean over all positions of KL(reference || model), in nats; top-1 agreement the share
    of positions where both find the same token likeliest.
    """
    terminal = Terminal(json)

    from lowbit.cli import torch_options
    from lowbit.evaluate import encode

    folder = torch_options.model_folder(model)
    reference_folder = torch_options.model_folder(against) if against else None
    texts, source = read_texts(text)
    torch_options.set_threads(threads)
    tokens = encode(torch_options.load_tokenizer(folder), texts)
    loaded = torch_options.load_model(folder, dtype, ternary, device)
    reference = torch_options.load_model(reference_folder, dtype, device=device) if reference_folder else None
    terminal.line("text", f"{source} · {len(tokens):,} tokens")
    figures = measure(terminal, loaded, tokens, reference, context, max_windows)
    if json:
        terminal.emit({"model": model, "against": against, "text": source, **figures})
    else:
        show(terminal, figures)


def read_texts(paths: list[str] | None) -> tuple[list[str], str]:
    """The texts and what to call them; source text of Python's library when no file is given."""
    from lowbit import evaluate, sample_text

    if paths:
        return evaluate.read_texts(paths), ", ".join(paths)
    return (
        sample_text.evaluation_text(),
        "source text of Python's standard library (give your own with --text)",
    )


def measure(
    terminal: Terminal, model: Any, tokens: Any, reference: Any, context: int, max_windows: int
) -> dict[str, Any]:
    """Evaluation.to_dict() with a progress bar; context and max_windows 0 mean the default and everything."""
    from lowbit.evaluate import default_context
    from lowbit.evaluate import evaluate as evaluate_model

    context = context or default_context(model)
    if max_windows:
        tokens = tokens[: context * max_windows]
    with terminal.progress("windows") as progress:
        return evaluate_model(model, tokens, reference=reference, context=context, progress=progress.update).to_dict()


def show(terminal: Terminal, figures: dict[str, Any]) -> None:
    from lowbit.report import human_bytes, human_figure

    terminal.line(
        "windows",
        f"{figures['windows']} of {figures['context']} tokens · {figures['tokens']:,} tokens scored",
    )
    if figures["kl_divergence"] is None:
        terminal.line(
            "model",
            f"perplexity {human_figure(figures['perplexity'])} · {human_bytes(figures['bytes'])} · "
            f"{figures['tokens_per_second']:.0f} tokens/s",
        )
        return
    terminal.table(
        ("", "perplexity", "bytes", "tokens/s"),
        [
            (
                name,
                human_figure(figures[f"{prefix}perplexity"]),
                human_bytes(figures[f"{prefix}bytes"]),
                f"{figures[f'{prefix}tokens_per_second']:.0f}",
            )
            for name, prefix in (("reference", "reference_"), ("model", ""))
        ],
        numbers=("perplexity", "bytes", "tokens/s"),
    )
    terminal.line("KL", f"{human_figure(figures['kl_divergence'])} nats per token, KL(reference || model)")
    terminal.line("top-1", f"{figures['top1_agreement']:.2%} of positions agree")
