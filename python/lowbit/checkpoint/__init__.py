"""Models from files and to files: `load` reads lowbit, GPTQ, BitNet and plain folders, `save` writes them.

A folder is a Hugging Face one: config.json, safetensors, tokenizer files. Nothing here reads or writes pickle.
"""

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from . import bitnet, gptq, native
from .safe_write import finish_interrupted, read_manifest, verify, write_files
from .safetensors_map import INDEX, Weights, serialize
from .strict_json import parse_json
from .ternary_choice import CHOICES, hold_ternary
from .weight import load_weight, save_weight

FORMATS = ("lowbit", "gptq", "gptq_v2", "bitnet", "bitnet_auto")
_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_LINEAR_CLASSES = {"bitnet": "bitlinear", "bitnet_auto": "autobitlinear"}

# Files of a model's folder that travel with it when it is saved elsewhere.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_WEIGHT_FILES = re.compile(
    r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|quantize_config\.json"
    r"|gptq_model-\d+bit-.*g\.safetensors"
)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def load(
    path: str | os.PathLike,
    *,
    in_memory: bool | None = None,
    on_demand: bool = False,
    ternary: str = "auto",
    strict: bool = True,
):
    """The Transformers model in a folder, on the CPU, in evaluation mode; modules are packed where the files are so.

    The weights are mapped and used where they lie, so the model appears at once and other processes share its pages.
    Saving over the folder is safe meanwhile (files are replaced, not rewritten); cutting a mapped file short is not.
    in_memory: True copies codes, a matrix at a time, to anonymous memory with huge pages, which decode-bound kernels
        read faster; False never does; None copies when the codes take 64 MiB or more, the system offers huge pages and
        the memory is available. Codes of GPTQ and BitNet checkpoints are always converted into memory.
    on_demand: read nothing but the files' headers now. A module's tensors are mapped when it is first used, and their
        values checked then; a model larger than memory opens, and the system takes back what it needs. For lowbit
        folders; not with in_memory=True.
    ternary: how matrices stored as trits are held: "trit" as they are; "int2" converted, 2 bits a weight; "auto" by
        what was measured (`ternary_choice`), and as trits where in_memory is False. Saving writes trits again.
    strict: False only warns of tensors that the model has no use for.
    A save that was interrupted after its commit is completed first.

    Raises FileNotFoundError for a missing file, NotImplementedError for an unknown quant_method or width, and
    ValueError, naming the file and the tensor, for anything that is not as docs/formats.md says.
    """
    if ternary not in CHOICES:
        raise ValueError(f"ternary: expected one of {', '.join(CHOICES)}, got {ternary!r}")
    if on_demand and in_memory:
        raise ValueError("on_demand: expected without in_memory=True, which reads everything")
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with config.json")
    finish_interrupted(folder)
    described, where = quantization_config(folder)
    weights = Weights(folder, gptq.weight_files(folder))
    config = _transformers_config(folder, len(weights))

    from ..integrations import transformers as integration

    if described is None:
        return integration.load_plain(folder, config, weights)
    method = described.get("quant_method")
    if on_demand and method != native.QUANT_METHOD:
        raise ValueError(f"{where}: on_demand: expected a lowbit folder, got {method}, which has to be converted")
    if method == native.QUANT_METHOD:
        packed = native.read_packed(weights, described, where, in_memory, on_demand)
    elif method == gptq.QUANT_METHOD:
        skeleton = integration.meta_model(config, str(folder))
        packed = gptq.read_packed(weights, described, where, skeleton)
    elif method == bitnet.QUANT_METHOD:
        settings = bitnet.Settings.parse(described, where)
        online = integration.bitnet_linears(config, settings.skipped, str(folder)) if settings.online else ()
        packed = bitnet.read_packed(weights, settings, online)
    else:
        raise NotImplementedError(f"{where}: quant_method: expected lowbit, gptq or bitnet, got {method!r}")
    config.quantization_config = native.quantization_config(packed.entries)
    model, unexpected = integration.build_model(config, packed, folder)
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
        message = f"{folder}: expected tensors of {type(model).__name__} only, got {len(unexpected)} others: {shown}"
        if strict:
            raise ValueError(f"{message} (strict=False leaves them)")
        warnings.warn(message, stacklevel=2)
    hold_ternary(model, "trit" if ternary == "auto" and (on_demand or in_memory is False) else ternary)
    return model


def save(model, path, format: str = "lowbit", tokenizer=None, max_shard_size: int | str | None = None) -> None:
    """Writes a model to a folder as one step: a crash leaves the old folder or the new one (see safe_write).

    format: "lowbit"; or, for other tools and of packed linear layers only, "gptq" (version 1), "gptq_v2", or "bitnet"
        (linear class bitlinear) or "bitnet_auto" (autobitlinear), which hold ternary layers.
    tokenizer: saved too; without one, the tokenizer files of the folder that the model was loaded from are copied.
    max_shard_size: bytes, or text as "5GB"; None writes one file.

    Equal models make equal bytes: saving what was loaded from a folder of the same format reproduces every file.
    Raises ValueError naming the module that the format cannot hold, TypeError for something without a config.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise TypeError(f"model: expected a Transformers model, got {type(model).__name__}")
    for name, _, _ in native.packed_modules(model):
        if name.endswith((".base_layer", ".original_module")):  # where PEFT puts what an adapter stands in front of
            raise ValueError(
                f"{name}: expected a model without adapters, got {type(model).__name__}: its save_pretrained() writes "
                "the adapter, unload() or merge_and_unload() gives a model"
            )
    folder = Path(path)
    if format == "lowbit":
        described, tensors = native.describe(model)
        described = described if described["modules"] else None
    elif format in _GPTQ_VERSIONS:
        described, tensors = gptq.describe(model, _GPTQ_VERSIONS[format])
    else:
        described, tensors = bitnet.describe(model, _LINEAR_CLASSES[format])
    files = _companions(model, tokenizer)
    files["config.json"] = _config_json(model, described)
    if format in _GPTQ_VERSIONS:
        files[gptq.LEGACY_CONFIG] = gptq.legacy_config(described)
    files.update(_weight_contents(tensors, described if format == "lowbit" else None, _bytes(max_shard_size)))
    write_files(folder, files, stale=_stale(folder, files))


def quantization_config(folder: str | os.PathLike) -> tuple[dict | None, str]:
    """(the quantization_config of a folder, or None for a plain model; where it was found, for messages).

    Raises FileNotFoundError without config.json, ValueError where it is not as expected.
    """
    folder = Path(folder)
    config = parse_json(folder / "config.json")
    where = f"{folder / 'config.json'}: quantization_config"
    described = config.get("quantization_config")
    if described is None and (folder / gptq.LEGACY_CONFIG).is_file():
        where = str(folder / gptq.LEGACY_CONFIG)
        described = {"quant_method": gptq.QUANT_METHOD, **parse_json(folder / gptq.LEGACY_CONFIG)}
    if described is not None and not isinstance(described, dict):
        raise ValueError(f"{where}: expected an object, got {type(described).__name__}")
    return described, where


def _transformers_config(folder: Path, tensors: int):
    import transformers

    _check_depth(parse_json(folder / "config.json"), tensors, folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged configuration fails in its own way for every model type
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return config


def _check_depth(config: Mapping, tensors: int, where: Path) -> None:
    """A layer costs memory even without weights, so a configuration may not claim more layers than tensors."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors, where)
        elif key in _LAYER_COUNTS and isinstance(value, int) and value > tensors:
            raise ValueError(f"{where}: {key}: expected at most the number of tensors, {tensors}, got {value}")


def _config_json(model, described: Mapping | None) -> bytes:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    values = json.loads(config.to_json_string())
    values.pop("quantization_config", None)
    if described is not None:
        values["quantization_config"] = described
    if native.split_ties(model)[1]:
        for level in (values, values.get("text_config")):
            if isinstance(level, dict) and level.get("tie_word_embeddings"):
                level["tie_word_embeddings"] = False
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _companions(model, tokenizer) -> dict[str, bytes]:
    files = {}
    source = Path(getattr(model.config, "_name_or_path", "") or "/nonexistent")
    if tokenizer is not None:
        files.update(_saved_files(tokenizer))
    elif source.is_dir():
        files.update((name, (source / name).read_bytes()) for name in _COMPANIONS if (source / name).is_file())
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        files.update(_saved_files(model.generation_config))
    return files


def _saved_files(thing) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        thing.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _weight_contents(tensors: dict[str, torch.Tensor], described: Mapping | None, limit: int | None) -> dict:
    shards = _shards(tensors, limit)
    contents, weight_map = {}, {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        metadata = {"format": "pt"} if described is None else native.file_metadata(described, set(names))
        contents[file] = serialize({name: tensors[name] for name in names}, metadata)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        contents[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return contents


def _shards(tensors: Mapping[str, torch.Tensor], limit: int | None) -> list[list[str]]:
    """Names of tensors file by file, in the order of the layers; the tensors of one module stay together."""
    modules: dict[str, list[str]] = {}
    for name in tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    shards, size = [[]], 0
    for module in sorted(modules, key=_natural):
        names = sorted(modules[module])
        added = sum(tensors[name].numel() * tensors[name].itemsize for name in names)
        if shards[-1] and limit is not None and size + added > limit:
            shards.append([])
            size = 0
        shards[-1].extend(names)
        size += added
    return shards


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _bytes(size: int | str | None) -> int | None:
    if size is None or (type(size) is int and size > 0):
        return size
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"max_shard_size: expected a positive number of bytes or text as '5GB', got {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _stale(folder: Path, files: Mapping) -> list[str]:
    """Files of an earlier model in the folder that the new one would leave behind."""
    if not folder.is_dir():
        return []
    finish_interrupted(folder)
    weights = [name for name in os.listdir(folder) if _WEIGHT_FILES.fullmatch(name)]
    return sorted({*weights, *(read_manifest(folder) or {})} - set(files))


__all__ = ["FORMATS", "load", "load_weight", "quantization_config", "save", "save_weight", "verify"]
