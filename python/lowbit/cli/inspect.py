"""`lowbit inspect`: what a model's files hold, module by module, read from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.terminal import DebugOption, JsonOption, Terminal, ThreadsOption

if TYPE_CHECKING:
    import torch

    from lowbit.checkpoint.safetensors_map import Weights

_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def inspect(
    path: Annotated[str, typer.Argument(help="A model folder, or one .safetensors file in it.", metavar="MODEL")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with the manifest's SHA-256 first.")
    ] = False,
    costs: Annotated[
        bool,
        typer.Option(
            "--costs",
            help="What the embedding and the head cost at 16, 8 and 4 bits: bytes, time a token, KL divergence.",
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(help="With --costs: the original model, to measure KL divergence from. Default: MODEL as it is."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="With --costs: UTF-8 text file; repeatable. Default: Python library source."),
    ] = None,
    threads: ThreadsOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a model's modules, from its files.

    Format, shape, group size, bits per weight, bytes, range of the scales. Reads lowbit, GPTQ and BitNet
    checkpoints and plain ones; no model is built and no weight is unpacked, unless --costs asks for it.
    """
    terminal = Terminal(json)

    from lowbit.checkpoint import safe_write
    from lowbit.report import human_bytes

    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: no such model folder or file")
    verified = safe_write.verify(folder if folder.is_dir() else folder.parent) if verify else None
    facts = examine(folder)
    facts["verified_files"] = verified
    if costs:
        facts["costs"] = _costs(terminal, folder, against, text, threads)
    if json:
        terminal.emit(facts)
        return
    terminal.table(
        ("module", "format", "shape", "group", "bits/weight", "bytes", "scales", "extras"),
        [_cells(module) for module in facts["modules"]],
        numbers=("group", "bits/weight", "bytes"),
    )
    totals = facts["totals"]
    terminal.print()
    for name, group in totals["formats"].items():
        terminal.line(
            name, f"{_count(group['modules'], 'module')} · {group['weights']:,} weights · {human_bytes(group['bytes'])}"
        )
    terminal.line(
        "other", f"{_count(totals['other_tensors'], 'tensor')} (norms, biases) · {human_bytes(totals['other_bytes'])}"
    )
    terminal.line(
        "total",
        f"{human_bytes(totals['bytes'])} · {totals['bits_per_weight']:.2f} bits/weight over all matrices",
    )
    if verified is not None:
        terminal.line("verified", f"{_count(len(verified), 'file')} with the size and SHA-256 of the manifest")
    if costs:
        _show_costs(terminal, facts["costs"])


_COST_WINDOWS = 16


def _costs(
    terminal: Terminal, folder: Path, against: str | None, text: list[str] | None, threads: int
) -> dict[str, Any]:
    """{"against", "text", "tokens", "threads", "choices": [Cost as a dict]} of a folder."""
    from lowbit import _C
    from lowbit.cli import evaluate, torch_options
    from lowbit.costs import measure
    from lowbit.evaluate import default_context, encode, windows

    if not folder.is_dir():
        raise ValueError(f"{folder}: --costs: expected the folder of a model, got a file")
    torch_options.set_threads(threads)
    texts, source = evaluate.read_texts(text)
    ids = encode(torch_options.load_tokenizer(folder), texts)
    model = torch_options.load_model(folder)
    reference = torch_options.load_model(torch_options.model_folder(against)) if against else None
    context = min(default_context(model), 512)
    pieces = windows(ids[: context * _COST_WINDOWS], context)
    with terminal.progress("choices") as progress:
        choices = measure(model, pieces, reference, progress=progress.update)
    return {
        "against": against,
        "text": source,
        "tokens": sum(map(len, pieces)),
        "threads": _C.threads(),
        "choices": [choice.to_dict() for choice in choices],
    }


def _show_costs(terminal: Terminal, costs: dict[str, Any]) -> None:
    from lowbit.report import human_bytes, human_figure

    terminal.print()
    titles = ("part", "format", "bytes", "µs a token", "KL", "")
    terminal.table(
        titles,
        [
            (
                choice["part"],
                choice["format"],
                human_bytes(choice["bytes"]),
                f"{choice['microseconds']:.1f}",
                human_figure(choice["kl_divergence"]),
                "now" if choice["now"] else "",
            )
            for choice in costs["choices"]
        ],
        numbers=titles[2:5],
    )
    reference = costs["against"] or "the model as it is"
    terminal.line(
        "KL", f"nats a position from {reference}, on {costs['tokens']:,} tokens of {costs['text']}; packed by rounding"
    )


def examine(path: Path) -> dict[str, Any]:
    """{"path", "quant_method", "modules": [...], "totals"} of a folder or a .safetensors file.

    A module is a dict: name, format ("int4", "gptq int4", "bitnet", "float32", ...), shape [rows, cols], group_size,
    bits_per_weight, bytes, scales [smallest, largest] or None, zeros, perm (whether stored), shared_with
    (name of the owner, or None).
    ValueError, naming file and tensor, for contents that contradict themselves; FileNotFoundError.
    """
    from lowbit.checkpoint import bitnet, gptq, quantization_config
    from lowbit.checkpoint.native import QUANT_METHOD, parse_entries
    from lowbit.checkpoint.safetensors_map import Weights

    folder = path if path.is_dir() else path.parent
    weights = Weights(folder, (path.name,) if path.is_file() else gptq.weight_files(folder))
    settings, where = quantization_config(folder)
    method = (settings or {}).get("quant_method")
    entries = parse_entries(settings, where) if method == QUANT_METHOD else {}
    ternary = bitnet.Settings.parse(settings, where) if method == bitnet.QUANT_METHOD else None

    modules, other = [], []
    for tensor in weights:
        name, _, part = tensor.rpartition(".")
        entry = entries.get(name)
        if part == "weight" and entry is not None and not weights.entry(tensor).dtype.is_floating_point:
            modules.append(_packed_module(name, entry, weights))
        elif part == "weight" and ternary and not weights.entry(tensor).dtype.is_floating_point:
            modules.append(_bitnet_module(name, ternary.linear_class, weights))
        elif part == "qweight":
            modules.append(_gptq_module(name, settings or {}, weights))
        elif (
            part == "weight" and len(weights.entry(tensor).shape) == 2 and weights.entry(tensor).dtype.is_floating_point
        ):
            modules.append(_float_module(name, weights))
        elif not ((entry is not None or ternary) and part.startswith("weight_")) and not (
            part in _GPTQ_PARTS and f"{name}.qweight" in weights
        ):
            other.append(tensor)
    known = {module["name"]: module for module in modules}
    for name, entry in entries.items():
        if entry.shared_with in known and name not in known:
            modules.append({**known[entry.shared_with], "name": name, "bytes": 0, "shared_with": entry.shared_with})
    modules.sort(key=lambda module: _natural(module["name"]))
    return {
        "path": str(path),
        "quant_method": method,
        "modules": modules,
        "totals": _totals(modules, sum(_bytes(weights, tensor) for tensor in other), len(other)),
    }


def _packed_module(name: str, entry: Any, weights: Weights) -> dict[str, Any]:
    scale = f"{name}.weight_scale"
    if scale not in weights:
        where = weights.path(f"{name}.weight")
        raise ValueError(f"{where}: {name}: expected weight_scale beside packed weight, found none")
    parts = [f"{name}.{part}" for part in ("weight", "weight_scale", "weight_zero", "weight_perm")]
    return _module(
        name,
        entry.format,
        (weights.entry(f"{name}.weight").shape[0], entry.cols),
        sum(_bytes(weights, part) for part in parts if part in weights),
        group_size=entry.cols if entry.group_size == -1 else entry.group_size,
        scales=_range(weights[scale]),
        zeros=f"{name}.weight_zero" in weights,
        perm=f"{name}.weight_perm" in weights,
    )


def _gptq_module(name: str, settings: dict[str, Any], weights: Weights) -> dict[str, Any]:
    where = f"{weights.path(f'{name}.qweight')}: {name}"
    for part in ("qzeros", "scales"):
        if f"{name}.{part}" not in weights:
            raise ValueError(f"{where}: expected {part} beside qweight, found none")
    words, scales = weights.entry(f"{name}.qweight").shape, weights.entry(f"{name}.scales").shape
    bits = settings.get("bits", settings.get("w_bit", settings.get("wbits")))
    if f"{name}.g_idx" in weights and len(words) == 2:
        # What is in the file decides; the settings may be overridden module by module.
        cols = weights.entry(f"{name}.g_idx").shape[0]
        bits = words[0] * 32 // max(cols, 1)
    if bits not in (2, 3, 4, 8) or len(words) != 2 or len(scales) != 2 or not scales[0]:
        raise ValueError(
            f"{where}: expected 2-D qweight and scales of 2, 3, 4 or 8 bits, "
            f"got {list(words)}, {list(scales)} and {bits}"
        )
    cols = words[0] * 32 // bits
    group_size = settings.get("group_size")
    if type(group_size) is not int or group_size < 1 or -(-cols // group_size) != scales[0]:
        group_size = -(-cols // scales[0])
    parts = [f"{name}.{part}" for part in _GPTQ_PARTS]
    index = weights.get(f"{name}.g_idx")
    return _module(
        name,
        f"gptq int{bits}",
        (words[1], cols),
        sum(_bytes(weights, part) for part in parts if part in weights),
        group_size=group_size,
        scales=_range(weights[f"{name}.scales"]),
        zeros=True,
        perm=index is not None and bool((index.diff() < 0).any()),
    )


def _bitnet_module(name: str, linear_class: str, weights: Weights) -> dict[str, Any]:
    from lowbit.checkpoint import bitnet

    shape, scale = weights.entry(f"{name}.weight").shape, f"{name}.weight_scale"
    if scale not in weights or len(shape) != 2:
        found = "none" if scale not in weights else f"weight {list(shape)}"
        raise ValueError(
            f"{weights.path(f'{name}.weight')}: {name}: expected weight_scale beside 2-D weight, found {found}"
        )
    return _module(
        name,
        "bitnet",
        (4 * shape[0], shape[1]),
        _bytes(weights, f"{name}.weight") + _bytes(weights, scale),
        group_size=shape[1],
        scales=_range(bitnet.factor(weights[scale], linear_class)),
    )


def _float_module(name: str, weights: Weights) -> dict[str, Any]:
    entry = weights.entry(f"{name}.weight")
    return _module(name, str(entry.dtype).removeprefix("torch."), entry.shape, entry.end - entry.begin)


def _module(name: str, format: str, shape: tuple[int, ...], nbytes: int, **more: Any) -> dict[str, Any]:
    count = shape[0] * shape[1]
    return {
        "name": name,
        "format": format,
        "shape": list(shape),
        "group_size": None,
        "bits_per_weight": 8 * nbytes / count if count else 0.0,
        "bytes": nbytes,
        "scales": None,
        "zeros": False,
        "perm": False,
        "shared_with": None,
        **more,
    }


def _totals(modules: list[dict[str, Any]], other_bytes: int, other_tensors: int) -> dict[str, Any]:
    owners = [module for module in modules if module["shared_with"] is None]
    formats: dict[str, dict[str, int]] = {}
    for module in owners:
        group = formats.setdefault(module["format"], {"modules": 0, "weights": 0, "bytes": 0})
        group["modules"] += 1
        group["weights"] += module["shape"][0] * module["shape"][1]
        group["bytes"] += module["bytes"]
    weights = sum(group["weights"] for group in formats.values())
    matrix_bytes = sum(group["bytes"] for group in formats.values())
    return {
        "formats": formats,
        "other_tensors": other_tensors,
        "other_bytes": other_bytes,
        "bytes": matrix_bytes + other_bytes,
        "bits_per_weight": 8 * matrix_bytes / weights if weights else 0.0,
    }


def _cells(module: dict[str, Any]) -> tuple[str, ...]:
    from lowbit.report import human_bytes, human_figure

    extras = [name for name in ("zeros", "perm") if module[name]]
    if module["shared_with"]:
        extras = [f"shares {module['shared_with']}"]
    scales = module["scales"]
    return (
        module["name"],
        module["format"],
        "×".join(map(str, module["shape"])),
        str(module["group_size"] or "-"),
        f"{module['bits_per_weight']:.2f}",
        human_bytes(module["bytes"]),
        f"{human_figure(scales[0])} … {human_figure(scales[1])}" if scales else "-",
        " ".join(extras),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(weights: Weights, tensor: str) -> int:
    entry = weights.entry(tensor)
    return entry.end - entry.begin


def _range(scales: torch.Tensor) -> list[float] | None:
    """The smallest and the largest value; NaN shows as NaN."""
    return [scales.float().min().item(), scales.float().max().item()] if scales.numel() else None


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Layer 10 after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
