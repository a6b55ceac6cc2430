"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, vLLM and Transformers exchange them: docs/formats.md section 2.

Reading takes versions 1 and 2 and the planar 3-bit form, one file or shards, current and legacy names. Which module is
quantized is decided by the tensors in the file; the configuration (with its `dynamic` rules) says only how.
Writing gives versions 1 and 2, `config.json` and `quantize_config.json`. act-order's column order becomes the
PackedMatrix's perm on reading, and g_idx again on writing.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import models, nn
from ..matrix import PackedMatrix
from .native import ModuleEntry, PackedWeights, named_parts, packed_modules, split_ties
from .safetensors_map import Weights

QUANT_METHOD = "gptq"
LEGACY_CONFIG = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")

_VERSIONS = {"gptq": 1, "gptq_v2": 2, "gptq_p": 2}
_FORMATS = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
_SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
# Linear layers that vLLM fuses into one, whose rule must match the fused name too.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


# ---- reading ----


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names under which a folder may hold all weights in one file, the preferred first."""
    return ("model.safetensors", *sorted(path.name for path in folder.glob("gptq_model-*bit-*g.safetensors")))


def read_packed(weights: Weights, quantization_config: Mapping, where: str, model: torch.nn.Module) -> PackedWeights:
    """Converts a GPTQ checkpoint, module by module. `model` (which may be on the meta device) tells embeddings from
    linear layers: GPTQModel groups a quantized embedding along the vocabulary, which no PackedMatrix does, so it is
    read as the float table that it stands for.

    Raises ValueError naming the module for tensors that are missing, or that do not fit each other or the
    configuration; NotImplementedError for widths and formats that lowbit does not have.
    """
    config = Settings(quantization_config, where)
    names = sorted({name for name, _, part in (key.rpartition(".") for key in weights) if part in PARTS[:2]})
    entries, matrices = {}, {}
    tensors = {}
    for name in names:
        try:
            matrix = _read_module(name, weights, config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_any_path(name, weights)}: {name}: {error}") from None
        if isinstance(_submodule(model, name), torch.nn.Embedding):
            tensors[f"{name}.weight"] = matrix.unpack(matrix.scales.dtype).t().contiguous()
        else:
            entries[name] = ModuleEntry(matrix.format, matrix.cols, matrix.group_size)
            matrices[name] = matrix
            tensors.update(named_parts(name, matrix))
        for part in PARTS:
            if f"{name}.{part}" in weights:
                weights.drop(f"{name}.{part}")
    consumed = {f"{name}.{part}" for name in names for part in PARTS}
    tensors.update((key, weights[key]) for key in weights if key not in consumed)
    return PackedWeights(entries, matrices, {}, tensors)


class Settings:
    """bits, group_size and version of each module, out of a GPTQ quantization_config."""

    def __init__(self, quantization_config: Mapping, where: str):
        values = {_SYNONYMS.get(key, key): value for key, value in quantization_config.items()}
        self.where = where
        self.format = values.get("checkpoint_format", values.get("format")) or "gptq"
        if self.format not in _VERSIONS:
            raise NotImplementedError(
                f"{where}: checkpoint_format: expected {', '.join(_VERSIONS)}, got {self.format!r}"
            )
        if values.get("pack_dtype", "int32") != "int32":
            raise NotImplementedError(f"{where}: pack_dtype: expected 'int32', got {values['pack_dtype']!r}")
        self.version = _VERSIONS[self.format]
        self.bits, self.group_size = self._checked(values.get("bits"), values.get("group_size", -1), where)
        self.rules = self._rules(values.get("dynamic") or {})

    def of(self, name: str) -> tuple[int, int]:
        """(bits, group_size) of a module; the first rule that matches wins, as in GPTQModel."""
        for pattern, override in self.rules:
            if pattern.match(name):
                bits, group_size = override.get("bits", self.bits), override.get("group_size", self.group_size)
                return self._checked(bits, group_size, f"{self.where}: dynamic: {pattern.pattern}")
        return self.bits, self.group_size

    def _rules(self, dynamic: object) -> list[tuple[re.Pattern, Mapping]]:
        if not isinstance(dynamic, Mapping):
            raise ValueError(f"{self.where}: dynamic: expected an object, got {type(dynamic).__name__}")
        rules = []
        for text, override in dynamic.items():
            if text.startswith("-:"):
                continue  # "not quantized", which the file itself says
            try:
                pattern = re.compile(text.removeprefix("+:"))
            except re.error as error:
                raise ValueError(f"{self.where}: dynamic: {text}: expected a regular expression: {error}") from None
            if not isinstance(override, Mapping):
                raise ValueError(f"{self.where}: dynamic: {text}: expected an object, got {override!r}")
            rules.append((pattern, {_SYNONYMS.get(key, key): value for key, value in override.items()}))
        return rules

    @staticmethod
    def _checked(bits: object, group_size: object, where: str) -> tuple[int, int]:
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"{where}: bits: expected an integer from 1 to 8, got {bits!r}")
        if bits not in _FORMATS:
            raise NotImplementedError(f"{where}: bits: expected one of {', '.join(map(str, _FORMATS))}, got {bits}")
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ValueError(f"{where}: group_size: expected -1 or a positive integer, got {group_size!r}")
        return bits, group_size


def _read_module(name: str, weights: Weights, config: Settings) -> PackedMatrix:
    missing = [part for part in PARTS[:3] if f"{name}.{part}" not in weights]
    if missing:
        raise ValueError(f"expected qweight, qzeros and scales, but {', '.join(missing)} is not in the files")
    if f"{name}.weight" in weights:
        raise ValueError("expected either qweight or weight, found both")
    bits, group_size = config.of(name)
    qweight, qzeros, scales = (weights[f"{name}.{part}"] for part in PARTS[:3])
    g_idx = weights.get(f"{name}.g_idx")
    if config.format == "gptq_p" and bits == 3:
        qweight, qzeros = _contiguous3(qweight, 0, "qweight"), _contiguous3(qzeros, 1, "qzeros")
    if qweight.ndim == 2:
        group_size = min(group_size, qweight.shape[0] * 32 // bits)
    return PackedMatrix.from_gptq(
        qweight, qzeros, scales, g_idx, bits=bits, group_size=group_size, version=config.version
    )


def _contiguous3(planar: torch.Tensor, dim: int, name: str) -> torch.Tensor:
    """Planar 3-bit words (per 32 codes two words of their low two bits, one of their high bits) as the bit stream."""
    if planar.dtype != torch.int32 or planar.ndim != 2 or planar.shape[dim] % 3:
        raise ValueError(f"{name}: expected int32 words in threes, got {planar.dtype} {list(planar.shape)}")
    words = planar.movedim(dim, -1).long().unflatten(-1, (-1, 3)) & 0xFFFFFFFF
    place = torch.arange(32)
    low = torch.gather(words, -1, (place // 16).expand(*words.shape[:-1], 32)) >> (place % 16 * 2) & 3
    codes = low | (words[..., 2:] >> place & 1) << 2
    bits = (codes.unsqueeze(-1) >> torch.arange(3) & 1).flatten(-2).unflatten(-1, (3, 32))
    stream = (bits << torch.arange(32)).sum(-1).flatten(-2)
    return stream.where(stream < 1 << 31, stream - (1 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def _submodule(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _any_path(name: str, weights: Weights) -> Path:
    return next(weights.path(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in weights)


# ---- writing ----


def describe(model: torch.nn.Module, version: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The quantization_config of a model and the tensors to write, for version 1 or 2.

    Raises ValueError naming the module that the format cannot hold: an embedding, rows or columns that are no multiple
    of 32, a zero point of 0 in version 1; or for a model without packed linear layers.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    matrices = {}
    for name, module, matrix in packed_modules(model):
        if isinstance(module, nn.Embedding):
            raise ValueError(
                f"{name}: GPTQ checkpoints hold linear layers: expected a float embedding, got {matrix}; "
                "save in the lowbit format, or load a float table into it"
            )
        if module.rms_norm is not None:
            raise ValueError(f"{name}: rms_norm: expected none, which a GPTQ checkpoint has no place for")
        for part in ("weight", "weight_scale", "weight_zero", "weight_perm"):
            tensors.pop(f"{name}.{part}", None)
        try:
            tensors.update((f"{name}.{part}", tensor) for part, tensor in matrix.to_gptq(version).items())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        matrices[name] = matrix
    if not matrices:
        raise ValueError("expected a model with packed linear layers, found none")
    for target in split_ties(model)[0]:
        tensors.pop(target, None)
    return _quantization_config(model, matrices, version), tensors


def _quantization_config(model: torch.nn.Module, matrices: dict[str, PackedMatrix], version: int) -> dict:
    from .. import __version__

    bits, group_size = _commonest(matrices)
    format = {1: "gptq", 2: "gptq_v2"}[version]
    config = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(matrix.perm is not None for matrix in matrices.values()),
        "sym": all(matrix.zeros is None for matrix in matrices.values()),
        "lm_head": "lm_head" in matrices,
        "quant_method": QUANT_METHOD,
        "format": format,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lowbit:{__version__}"]},
    }
    overrides = {name: _override(matrix, bits, group_size) for name, matrix in matrices.items()}
    skipped = {
        name: None
        for name, module in model.named_modules()
        if name not in matrices and _is_plain_linear(module) and not name.endswith("lm_head")
    }
    if dynamic := _dynamic_rules({**overrides, **skipped}):
        config["dynamic"] = dynamic
    return config


def _commonest(matrices: Mapping[str, PackedMatrix]) -> tuple[int, int]:
    """(bits, group_size) that most modules have; a single group a row is -1 unless it equals the others' size."""
    sizes = Counter((m.bits, m.group_size) for m in matrices.values() if m.group_size < m.cols)
    if not sizes:
        return Counter(m.bits for m in matrices.values()).most_common(1)[0][0], -1
    return sizes.most_common(1)[0][0]


def _override(matrix: PackedMatrix, bits: int, group_size: int) -> dict:
    override = {"bits": matrix.bits} if matrix.bits != bits else {}
    if matrix.group_size != (matrix.cols if group_size == -1 else min(group_size, matrix.cols)):
        override["group_size"] = -1 if matrix.group_size == matrix.cols else matrix.group_size
    return override


def _is_plain_linear(module: torch.nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.packed is None
    return models.has_matrix(module) and not models.is_table(module)


def _dynamic_rules(decisions: Mapping[str, dict | None]) -> dict[str, dict]:
    """One rule for each module that differs: None is skipped, {} is as the whole model, else what to override."""
    rules = {}
    for name, override in decisions.items():
        if override == {}:
            continue
        parent, _, leaf = name.rpartition(".")
        spellings = [leaf]
        for fused, parts in _FUSED.items():
            siblings = [f"{parent}.{part}" for part in parts]
            if leaf in parts and all(decisions.get(sibling, {}) == override for sibling in siblings):
                spellings.append(fused)
        last = re.escape(leaf) if len(spellings) == 1 else f"(?:{'|'.join(map(re.escape, spellings))})"
        prefix = f"{re.escape(parent)}\\." if parent else ""
        rules[f"{'-' if override is None else '+'}:^{prefix}{last}$"] = override or {}
    return rules


def legacy_config(quantization_config: dict) -> bytes:
    """quantize_config.json: the same settings where older readers look for them."""
    return (json.dumps(quantization_config, indent=2, sort_keys=True) + "\n").encode()
