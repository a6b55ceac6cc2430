"""`lowbit head`: another head (or embedding) in a folder that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.terminal import DebugOption, JsonOption, Terminal

if TYPE_CHECKING:
    import torch

    from lowbit import PackedMatrix

PARTS = ("head", "embedding", "both")


def head(
    path: Annotated[str, typer.Argument(help="Folder of a model that lowbit wrote.", metavar="OUT")],
    bits: Annotated[str, typer.Option(help="16: as it is in --from; 8, 4, 3, 2 or trit: rounded to nearest.")] = "16",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Folder of the original model, or a .safetensors file with the weight. Default: OUT itself, if its "
            "weight is a float one.",
            metavar="ORIGINAL",
        ),
    ] = None,
    part: Annotated[
        str, typer.Option(help="head, embedding, or both, which then share one table where ORIGINAL has one.")
    ] = "head",
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale, a multiple of 16; -1: a whole row.")
    ] = 128,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replace the head of a quantized model, for example by the 16-bit one of the original.

    The folder is rewritten in one step; a failure leaves it as it was. A head that shared its table with the embedding
    becomes one of its own: the embedding keeps the table.
    """
    terminal = Terminal(json)

    import lowbit
    from lowbit.checkpoint import native, quantization_config
    from lowbit.cli import torch_options
    from lowbit.cli.quantize import width
    from lowbit.models import embedding_and_head, set_weights
    from lowbit.report import human_bytes

    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    wanted = width(bits)
    if wanted not in (16, 8, 4, 3, 2, "trit"):
        raise ValueError(f"bits: expected 16, 8, 4, 3, 2 or trit, got {bits!r}")
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    described, where = quantization_config(folder)
    if described is None or described.get("quant_method") != native.QUANT_METHOD:
        found = None if described is None else described.get("quant_method")
        raise ValueError(f"{where}: quant_method: expected lowbit, got {found!r}")
    origin = torch_options.model_folder(source) if source and not Path(source).is_file() else Path(source or folder)
    model = lowbit.load(folder, in_memory=False)
    names = dict(zip(("embedding", "head"), embedding_and_head(model), strict=True))
    chosen = {name: names[name] for name in (PARTS[:2] if part == "both" else (part,))}
    for kind, name in chosen.items():
        if name is None:
            raise ValueError(f"{path}: expected a model with a {kind}, found none")
    before = {name: _described(model.get_submodule(name)) for name in chosen.values()}
    floats = [_float_weight(origin, name) for name in chosen.values()]
    if len(floats) == 2 and _equal(*floats):
        weights = dict.fromkeys(chosen.values(), _packed(floats[0], wanted, group_size))
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = True
    else:
        weights = {n: _packed(f, wanted, group_size) for n, f in zip(chosen.values(), floats, strict=True)}
    set_weights(model, weights)
    after = {name: _described(model.get_submodule(name)) for name in chosen.values()}
    lowbit.save(model, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name in chosen.values():
        terminal.line("head" if name == names["head"] else "embedding", f"{name}: {before[name]} → {after[name]}")
    terminal.line("done", f"{folder} · {human_bytes(size)} of weights", style="bold green")
    if json:
        modules = {name: {"before": before[name], "after": after[name]} for name in chosen.values()}
        terminal.emit({"path": path, "modules": modules, "bytes": size})


def _float_weight(origin: Path, name: str) -> torch.Tensor:
    import torch

    from lowbit import load_weight

    weight = load_weight(origin, name)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"{origin}: {name}: expected a float weight, got {weight.format}: name the original model with --from"
        )
    return weight


def _packed(weight: torch.Tensor, bits: int | str, group_size: int) -> PackedMatrix | torch.Tensor:
    from lowbit import PackedMatrix

    if bits == 16:
        return weight
    format = bits if bits == "trit" else f"int{bits}"
    group_size = group_size if group_size < weight.shape[1] else -1
    return PackedMatrix.from_float(weight, format, group_size, clip=bits in (2, 3, 4))


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())


def _described(module: Any) -> str:
    packed = getattr(module, "packed", None)
    return str(module.weight.dtype).removeprefix("torch.") if packed is None else packed.format
