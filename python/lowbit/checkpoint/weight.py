"""One weight at a time: the packed matrix or the float table of a module, out of a folder or a file, and into a file.

What a module's load() does with a path, and how a head that was trained by itself is kept:

    save_weight(head, "head.safetensors", "lm_head");  model.lm_head.load("head.safetensors")

Weights are mapped and used where they lie.
"""

import os
from pathlib import Path

import torch

from ..matrix import PackedMatrix
from . import gptq, native
from .safe_write import COMMIT, write_file
from .safetensors_map import Weights, serialize
from .strict_json import parse_json_bytes


def load_weight(path: str | os.PathLike, name: str = "") -> PackedMatrix | torch.Tensor:
    """The weight [rows, cols] of module `name` in a model folder (lowbit, GPTQ or plain) or in a .safetensors file:
    a PackedMatrix, or a float tensor as it is stored.

    Of a head that is tied to the embedding and therefore has no tensors of its own, the table that both share. In a
    single file that has no such module the name does not matter if it holds one weight only.

    Raises FileNotFoundError, NotImplementedError for other kinds of folders, and ValueError naming the file, the
    module, what was expected and what is there.
    """
    path = Path(path)
    if path.is_file():
        weights = Weights(path.parent, (path.name,))
        entries, where = _entries_of(weights), str(path)
        names = _names(weights)
        name = names[0] if name not in names and len(names) == 1 else name
        return _read(weights, name, entries, where)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a model folder or a .safetensors file")
    if (path / COMMIT).exists():
        raise ValueError(f"{path / COMMIT}: a save was cut off here: lowbit.load({str(path)!r}) completes it")
    from . import quantization_config

    described, where = quantization_config(path)
    weights = Weights(path, gptq.weight_files(path))
    method = None if described is None else described.get("quant_method")
    if method == gptq.QUANT_METHOD and f"{name}.qweight" in weights:
        return gptq.read_module(name, weights, gptq.Settings(described, where))
    if method not in (None, native.QUANT_METHOD, gptq.QUANT_METHOD):
        raise NotImplementedError(f"{where}: quant_method: expected lowbit, gptq or none, got {method!r}")
    entries = native.parse_entries(described, where) if method == native.QUANT_METHOD else {}
    if f"{name}.weight" not in weights and name not in entries:
        name = _tied_to(path, name) or name
    return _read(weights, name, entries, str(path))


def save_weight(weight: PackedMatrix | torch.Tensor, path: str | os.PathLike, name: str = "lm_head") -> None:
    """Writes one weight, under the name of a module, to a .safetensors file that `load_weight` and load() read."""
    if isinstance(weight, PackedMatrix):
        matrix = weight.cpu()
        tensors = native.named_parts(name, matrix)
        entry = native.ModuleEntry(matrix.format, matrix.cols, matrix.group_size)
        metadata = native.file_metadata(native.quantization_config({name: entry}), set(tensors))
    elif isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2:
        tensors, metadata = {f"{name}.weight": weight.detach()}, {"format": "pt"}
    else:
        raise TypeError(f"weight: expected a PackedMatrix or a float tensor [rows, cols], got {_shown(weight)}")
    write_file(path, serialize(tensors, metadata))


def _read(weights: Weights, name: str, entries: dict, where: str) -> PackedMatrix | torch.Tensor:
    entry = entries.get(name)
    if entry is not None and entry.shared_with is not None and f"{name}.weight" not in weights:
        name = entry.shared_with
        entry = entries[name]
    key = f"{name}.weight"
    if key not in weights:
        shown = ", ".join(_names(weights)[:5])
        raise ValueError(f"{where}: {name or 'weight'}: expected a weight of that name, found {shown or 'no weights'}")
    if entry is not None and native.is_packed(name, weights):
        return native.read_matrix(name, entry, weights, in_memory=False)
    found = weights.entry(key)
    if not found.dtype.is_floating_point or len(found.shape) != 2:
        raise ValueError(
            f"{weights.path(key)}: {key}: expected floats [rows, cols], or an entry in the lowbit metadata, "
            f"got {found.dtype} {list(found.shape)}"
        )
    return weights[key]


def _entries_of(weights: Weights) -> dict:
    entries = {}
    for file in weights.files:
        if (text := file.metadata.get(native.METADATA_KEY)) is not None:
            where = f"{file.path}: metadata: {native.METADATA_KEY}"
            entries |= native.parse_entries(parse_json_bytes(text.encode(), where), where)
    return entries


def _names(weights: Weights) -> list[str]:
    """Of the modules with a two-dimensional weight or a packed one."""
    names = (key.rpartition(".") for key in weights if len(weights.entry(key).shape) in (2, 3))
    return [name for name, _, part in names if part == "weight"]


def _tied_to(folder: Path, name: str) -> str | None:
    """The module that `name` shares its weight with, by the model's own configuration; None: with none."""
    import transformers

    from ..integrations.transformers import meta_model

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    pairs = getattr(meta_model(config, str(folder)), "all_tied_weights_keys", {})
    found = {**{source: target for target, source in pairs.items()}, **pairs}.get(f"{name}.weight")
    return None if found is None else found.removesuffix(".weight")


def _shown(thing: object) -> str:
    return f"{thing.dtype} {list(thing.shape)}" if isinstance(thing, torch.Tensor) else type(thing).__name__
