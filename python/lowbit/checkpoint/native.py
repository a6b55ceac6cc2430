"""lowbit's own checkpoints: docs/formats.md section 1, "On disk".

    config.json           the model's configuration, with quantization_config {quant_method: "lowbit", format_version,
                          modules: {name: {format, cols, group_size, activations, kind[, shared_with, rms_norm_eps]}}}
    model.safetensors     <module>.weight (codes), .weight_scale, .weight_zero, .weight_perm beside the plain tensors;
                          metadata "lowbit" repeats the quantization_config of the modules in the file. Or shards with
                          model.safetensors.index.json
    lowbit-manifest.json  size and SHA-256 of every file

A table that two modules use (a tied head) is stored once: the second module's entry says shared_with and has no
tensors. Whether a module is packed is decided by what lies in the file, module by module: replacing its packed tensors
by a float `weight` is enough for it to load plain.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import nn
from ..matrix import FORMATS, PackedMatrix, empty_codes
from .safetensors_map import ALIGNMENT, Weights
from .strict_json import parse_json_bytes

QUANT_METHOD = "lowbit"
FORMAT_VERSION = 1
METADATA_KEY = "lowbit"
PARTS = ("weight", "weight_scale", "weight_zero", "weight_perm")

# Below this, a model's codes stay in the caches or nearly so, and the size of its pages does not matter.
_HUGE_PAGE_GAIN_BYTES = 64 << 20


@dataclass(frozen=True)
class ModuleEntry:
    """What config.json says of one packed module; cols is K, group_size is in columns.

    rms_norm_eps: of the RMSNorm in front of a linear layer (a BitNet module), or None without one.
    """

    format: str
    cols: int
    group_size: int
    activations: str = "float"
    kind: str = "linear"
    shared_with: str | None = None
    rms_norm_eps: float | None = None

    def to_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class PackedWeights:
    """A checkpoint after reading: what is packed, what shares it, and every tensor of the model by its full name.

    checked: whether values of scales, zeros and permutations were looked at; if not, each module does when first used.
    """

    entries: dict[str, ModuleEntry]
    matrices: dict[str, PackedMatrix]
    shared: dict[str, str]  # module -> the module whose matrix it uses
    tensors: dict[str, torch.Tensor]
    checked: bool = True


# ---- reading ----


def parse_entries(quantization_config: Mapping, where: str) -> dict[str, ModuleEntry]:
    """The modules of a lowbit quantization_config. Raises ValueError that names `where`, the module and the field."""
    version = quantization_config.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise ValueError(f"{where}: format_version: expected {FORMAT_VERSION}, got {version!r}")
    modules = quantization_config.get("modules")
    if not isinstance(modules, Mapping):
        raise ValueError(f"{where}: modules: expected an object, got {type(modules).__name__}")
    entries = {name: _parse_entry(value, f"{where}: modules: {name}") for name, value in modules.items()}
    for name, entry in entries.items():
        source = entries.get(entry.shared_with)
        if entry.shared_with is not None and (source is None or source.shared_with is not None):
            raise ValueError(
                f"{where}: modules: {name}: shared_with: expected a module that owns its tensors, "
                f"got {entry.shared_with!r}"
            )
    return entries


def _parse_entry(value: object, where: str) -> ModuleEntry:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    allowed = {"format", "cols", "group_size", "activations", "kind", "shared_with", "rms_norm_eps"}
    if unknown := value.keys() - allowed:
        raise ValueError(f"{where}: expected fields among {sorted(allowed)}, got {sorted(unknown)}")
    entry = ModuleEntry(**{"format": None, "cols": None, "group_size": -1, **value})
    if not isinstance(entry.format, str) or entry.format not in FORMATS:
        raise ValueError(f"{where}: format: expected one of {', '.join(FORMATS)}, got {entry.format!r}")
    if type(entry.cols) is not int or not 1 <= entry.cols < 1 << 31:
        raise ValueError(f"{where}: cols: expected a positive integer, got {entry.cols!r}")
    if type(entry.group_size) is not int or not (entry.group_size == -1 or 1 <= entry.group_size <= entry.cols):
        raise ValueError(f"{where}: group_size: expected -1 or 1 to {entry.cols}, got {entry.group_size!r}")
    if entry.activations not in ("float", "int8"):
        raise ValueError(f"{where}: activations: expected float or int8, got {entry.activations!r}")
    if entry.kind not in ("linear", "embedding"):
        raise ValueError(f"{where}: kind: expected linear or embedding, got {entry.kind!r}")
    if not isinstance(entry.shared_with, str | None):
        raise ValueError(f"{where}: shared_with: expected the name of a module, got {entry.shared_with!r}")
    eps = entry.rms_norm_eps
    if eps is not None and not (entry.kind == "linear" and type(eps) is float and 0 <= eps < 1):
        raise ValueError(f"{where}: rms_norm_eps: expected a fraction in front of a linear layer, got {eps!r}")
    return entry


def read_packed(
    weights: Weights, quantization_config: Mapping, where: str, in_memory: bool | None, on_demand: bool = False
) -> PackedWeights:
    """Reads and checks every tensor's metadata, and every scale, zero and permutation. Codes stay in the mapped file,
    or (`in_memory`) are copied, a matrix at a time, to anonymous memory with huge pages. None: copied when the codes
    are large enough to gain from huge pages, the system offers them, and the memory is free. on_demand: nothing but
    metadata is read.
    """
    entries = parse_entries(quantization_config, where)
    _check_metadata(weights, entries)
    packed = [name for name, entry in entries.items() if entry.shared_with is None and is_packed(name, weights)]
    shared = {
        name: entry.shared_with
        for name, entry in entries.items()
        if entry.shared_with in packed and not _shares_nothing(name, entry.shared_with, weights)
    }
    _refuse_strays(weights, set(packed))
    if in_memory is None:
        in_memory = not on_demand and _copying_pays(
            sum(weights.entry(f"{name}.weight").end - weights.entry(f"{name}.weight").begin for name in packed)
        )
    matrices = {name: read_matrix(name, entries[name], weights, in_memory, not on_demand) for name in packed}
    own = {f"{name}.{part}" for name in packed for part in PARTS}
    tensors = {name: weights[name] for name in weights if name not in own}
    for name, matrix in matrices.items():
        tensors.update(named_parts(name, matrix))
    return PackedWeights(entries, matrices, shared, tensors, checked=not on_demand)


def named_parts(name: str, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
    """The tensors of a matrix under the names they have in a file."""
    return {f"{name}.{part}": tensor for part, tensor in matrix.tensors.items()}


def is_packed(name: str, weights: Weights) -> bool:
    """Whether a module that was saved packed still is. Raises ValueError where it is neither that nor float."""
    weight = weights.entry(f"{name}.weight") if f"{name}.weight" in weights else None
    packed_parts = [part for part in PARTS[1:] if f"{name}.{part}" in weights]
    if weight is not None and weight.dtype.is_floating_point and not packed_parts:
        return False
    if weight is not None and weight.dtype == torch.uint8 and "weight_scale" in packed_parts:
        return True
    found = [f"weight ({weight.dtype} {list(weight.shape)})"] if weight is not None else []
    raise ValueError(
        f"{name}: expected either weight (uint8 codes) with weight_scale, or a float weight alone; "
        f"found {', '.join(found + packed_parts) or 'neither'}"
    )


def _shares_nothing(name: str, source: str, weights: Weights) -> bool:
    """True for a module that shared a table and now has its own float weight in the file."""
    own = [part for part in PARTS if f"{name}.{part}" in weights]
    if not own:
        return False
    if own == ["weight"] and weights.entry(f"{name}.weight").dtype.is_floating_point:
        return True
    raise ValueError(
        f"{name}: expected no tensors (it shares those of {source}) or a float weight, found {', '.join(own)}"
    )


def _refuse_strays(weights: Weights, packed: set[str]) -> None:
    for tensor in weights:
        name, _, part = tensor.rpartition(".")
        if part in PARTS[1:] and name not in packed:
            raise ValueError(f"{weights.path(tensor)}: {tensor}: expected an entry for {name} in quantization_config")


def _check_metadata(weights: Weights, entries: dict[str, ModuleEntry]) -> None:
    for file in weights.files:
        text = file.metadata.get(METADATA_KEY)
        if text is None:
            continue
        where = f"{file.path}: metadata: {METADATA_KEY}"
        for name, entry in parse_entries(parse_json_bytes(text.encode(), where), where).items():
            if name not in entries:
                raise ValueError(f"{where}: {name}: expected the modules of config.json, which has no such entry")
            if entry != entries[name]:
                raise ValueError(
                    f"{where}: {name}: expected {entries[name].to_dict()} as in config.json, got {entry.to_dict()}"
                )


def read_matrix(
    name: str, entry: ModuleEntry, weights: Weights, in_memory: bool, validate: bool = True
) -> PackedMatrix:
    """The matrix of one module. validate: look at its values too."""
    codes, *sides = (weights.get(f"{name}.{part}") for part in PARTS)
    layout = {"format": entry.format, "cols": entry.cols, "group_size": entry.group_size}
    try:
        matrix = PackedMatrix(codes, *sides, **layout, validate=validate)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{weights.path(f'{name}.weight')}: {name}: {error}") from None
    if in_memory or (validate and codes.data_ptr() % ALIGNMENT):  # files that others wrote: lines across cache lines
        resident = empty_codes(codes.shape[0], codes.shape[1])
        resident.copy_(codes)
        matrix = PackedMatrix(resident, *sides, **layout, validate=False)
        weights.drop(f"{name}.weight")
    return matrix


def _copying_pays(codes_bytes: int) -> bool:
    return codes_bytes >= _HUGE_PAGE_GAIN_BYTES and _huge_pages_offered() and _available_memory() > 2 * codes_bytes


def _huge_pages_offered() -> bool:
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


# ---- writing ----


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding, PackedMatrix]]:
    """The model's packed modules in their order: (name, module, its matrix)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.packed is not None:
            yield name, module, module.packed


def describe(model: torch.nn.Module) -> tuple[dict, dict[str, torch.Tensor]]:
    """The quantization_config of a model and the tensors to write: every one once, shared tables under one name."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    modules, owners = {}, {}
    for name, module, matrix in packed_modules(model):
        kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
        owner = owners.setdefault((matrix.codes.data_ptr(), matrix.scales.data_ptr(), matrix.shape), name)
        matrix = matrix.repack(module.stored_format or matrix.format)
        entry = ModuleEntry(
            matrix.format,
            matrix.cols,
            matrix.group_size,
            getattr(module, "activations", "float"),
            kind,
            None if owner == name else owner,
            module.rms_norm.eps if kind == "linear" and module.rms_norm is not None else None,
        )
        modules[name] = entry
        for part in PARTS:
            tensors.pop(f"{name}.{part}", None)
        if owner == name:
            tensors.update(named_parts(name, matrix))
    for target in split_ties(model)[0]:
        tensors.pop(target, None)
    return quantization_config(modules), tensors


def quantization_config(modules: Mapping[str, ModuleEntry]) -> dict:
    """The value of config.json["quantization_config"]."""
    entries = {name: entry.to_dict() for name, entry in modules.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "modules": entries}


def split_ties(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The pairs {target: source} of plain weights that the configuration ties: those that are one tensor, and those
    that are not (or not any more: one side is packed, or was replaced)."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    pairs = expand(all_submodels=True) if expand else {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tied, split = {}, {}
    for target, source in pairs.items():
        first, second = tensors.get(target), tensors.get(source)
        if first is None or second is None or first.data_ptr() != second.data_ptr():
            split[target] = source
        elif first.is_floating_point():
            tied[target] = source
    return tied, split


def file_metadata(quantization_config: Mapping, names: set[str]) -> dict[str, str]:
    """Metadata of the file that holds the tensors `names`: its modules' entries, so that each file explains itself."""
    all_entries = quantization_config["modules"]
    owned = {name: entry for name, entry in all_entries.items() if f"{name}.weight" in names}
    shared = {name: entry for name, entry in all_entries.items() if entry.get("shared_with") in owned}
    described = {**quantization_config, "modules": {**owned, **shared}}
    return {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True, separators=(",", ":"))}


__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "ModuleEntry",
    "PackedWeights",
    "describe",
    "file_metadata",
    "is_packed",
    "named_parts",
    "packed_modules",
    "parse_entries",
    "quantization_config",
    "read_matrix",
    "read_packed",
    "split_ties",
]
