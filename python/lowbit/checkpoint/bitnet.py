"""BitNet checkpoints of Hugging Face Transformers (quant_method "bitnet"): docs/formats.md section 4.

A module's trits are packed four rows a byte beside one weight_scale, which divides the product in the linear class
"bitlinear" (it is 1 / mean|W|) and multiplies it in "autobitlinear", there after the bias was added: a stored bias is
in units of the scale. Both quantize activations to 8 bits a token, so the modules made here have activations "int8".
Which module is ternary is decided by the tensors in the file; only in
quantization mode "online", where the weights are floats like any others, by the names in the configuration.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .. import models, nn
from ..matrix import PackedMatrix
from .native import ModuleEntry, PackedWeights, named_parts, packed_modules, split_ties
from .safetensors_map import Weights
from .ternary_blocks import pack_rows, unpack_rows
from .ternary_matrix import TernaryMatrix, check_scales, magnitude

QUANT_METHOD = "bitnet"
LINEAR_CLASSES = ("bitlinear", "autobitlinear")
MODES = ("offline", "online")
ACTIVATIONS = "int8"

_EPS = 1e-6  # of the optional norm, where the configuration does not say


@dataclass(frozen=True)
class Settings:
    """What a BitNet quantization_config says.

    linear_class: "bitlinear" or "autobitlinear"; online: the weights are latent floats; rms_norm_eps: of the RMSNorm in
    front of every layer, or None without one; skipped: names of modules that stay float, or None for the usual ones.
    """

    linear_class: str
    online: bool
    rms_norm_eps: float | None
    skipped: list[str] | None

    @classmethod
    def parse(cls, values: Mapping, where: str) -> "Settings":
        """Raises ValueError that begins with `where` and names the field."""

        def checked(name: str, default: object, fine: bool, expected: str) -> object:
            if not fine:
                raise ValueError(f"{where}: {name}: expected {expected}, got {values.get(name, default)!r}")
            return values.get(name, default)

        linear_class = values.get("linear_class", LINEAR_CLASSES[0])
        checked("linear_class", None, linear_class in LINEAR_CLASSES, f"one of {', '.join(LINEAR_CLASSES)}")
        mode = values.get("quantization_mode", MODES[0])
        checked("quantization_mode", None, mode in MODES, f"one of {', '.join(MODES)}")
        use_norm = values.get("use_rms_norm", False)
        checked("use_rms_norm", None, isinstance(use_norm, bool), "true or false")
        eps = values.get("rms_norm_eps", _EPS)
        eps = _EPS if eps is None else eps
        checked("rms_norm_eps", None, type(eps) in (int, float) and 0 <= eps < 1, "a number from 0 to 1")
        skipped = values.get("modules_to_not_convert")
        names = skipped is None or (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped))
        checked("modules_to_not_convert", None, names, "a list of names")
        # Only one of the two classes knows the mode.
        online = mode == "online" and linear_class == "autobitlinear"
        return cls(linear_class, online, float(eps) if use_norm else None, skipped)


# ---- reading ----


def read_packed(weights: Weights, settings: Settings, online_names: Collection[str]) -> PackedWeights:
    """Converts a BitNet checkpoint, module by module.

    online_names: the linear layers that Hugging Face would ternarize at run time; used in mode "online" only. A weight
    that is ternary already keeps its scale, with a warning, where Hugging Face would shrink it.

    Raises ValueError naming file and module for tensors that are missing or are not what the format says.
    """
    matrices: dict[str, PackedMatrix] = {}
    unchanged = []
    for name in sorted({key.rpartition(".")[0] for key in weights if key.endswith((".weight", ".weight_scale"))}):
        try:
            matrix, was_ternary = _read_module(name, weights, settings, name in online_names)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_any_path(name, weights)}: {name}: {error}") from None
        if matrix is not None:
            matrices[name] = matrix.to_packed()
            weights.drop(f"{name}.weight")
        if was_ternary:
            unchanged.append(name)
    if unchanged:
        warnings.warn(
            f"{len(unchanged)} latent weights are ternary already and keep their scale, {unchanged[0]} for one; "
            "Transformers would ternarize them again and shrink it",
            stacklevel=4,
        )
    consumed = {f"{name}.{part}" for name in matrices for part in ("weight", "weight_scale")}
    tensors = {key: weights[key] for key in weights if key not in consumed}
    for name, matrix in matrices.items():
        if settings.linear_class == "autobitlinear" and f"{name}.weight_scale" in weights and f"{name}.bias" in weights:
            scale = factor(weights[f"{name}.weight_scale"], settings.linear_class)
            tensors[f"{name}.bias"] = weights[f"{name}.bias"].float() * scale.reshape(1)
        tensors.update(named_parts(name, matrix))
        if settings.rms_norm_eps is not None:
            _check_norm(name, weights, matrix.cols)
    entries = {
        name: ModuleEntry(
            matrix.format, matrix.cols, matrix.group_size, ACTIVATIONS, rms_norm_eps=settings.rms_norm_eps
        )
        for name, matrix in matrices.items()
    }
    return PackedWeights(entries, matrices, {}, tensors)


def _read_module(
    name: str, weights: Weights, settings: Settings, ternarized_online: bool
) -> tuple[TernaryMatrix | None, bool]:
    """(The module's matrix, or None for a plain one; whether it was latent and ternary already)."""
    if f"{name}.weight" not in weights:
        raise ValueError("expected weight beside weight_scale, found none")
    weight, has_scale = weights[f"{name}.weight"], f"{name}.weight_scale" in weights
    if weight.is_floating_point() and not has_scale:
        if settings.online and ternarized_online:
            return ternarize(weight)
        return None, False
    if not has_scale:
        raise ValueError(f"expected weight_scale beside weight ({weight.dtype}), found none")
    if settings.online and ternarized_online:
        raise ValueError("expected a float weight alone in quantization_mode online, found weight_scale too")
    scale = factor(weights[f"{name}.weight_scale"], settings.linear_class)
    if not weight.is_floating_point():
        return TernaryMatrix(unpack_rows(weight), scale), False
    if settings.linear_class == "bitlinear":
        raise ValueError(f"weight: expected packed trits (torch.uint8) for bitlinear, got {weight.dtype}")
    ternary = TernaryMatrix.from_float(weight)
    return TernaryMatrix(ternary.trits, ternary.scales * scale), False


def ternarize(weight: torch.Tensor) -> tuple[TernaryMatrix, bool]:
    """(What Transformers makes of a latent float weight [rows, cols] at run time, whether it was ternary already).

    In float32: s = 1 / clamp(mean|W|, 1e-5), t = clamp(round_half_even(W * s), -1, 1), and the scale is 1 / s rounded
    to the weight's dtype, as W' = t / s is. A matrix that is ternary already keeps its trits and its scale. Raises
    ValueError for NaN and infinity.
    """
    if magnitude(weight) is not None:
        return TernaryMatrix.from_float(weight), True
    wide = weight.detach().float()
    inverse = 1.0 / wide.abs().mean().clamp(min=1e-5)
    trits = (wide * inverse).round().clamp(-1, 1).to(torch.int8)
    return TernaryMatrix(trits, (1.0 / inverse).to(weight.dtype).float().reshape(1, 1)), False


def factor(stored: torch.Tensor, linear_class: str) -> torch.Tensor:
    """A module's weight_scale as the factor of its trits, float32 [1, 1].

    Raises ValueError unless it is one float, positive and finite, and so is its reciprocal where that is the factor.
    """
    if not stored.is_floating_point() or list(stored.shape) not in ([], [1]):
        raise ValueError(f"weight_scale: expected one float, [1], got {stored.dtype} {list(stored.shape)}")
    scale = stored.float().reshape(1, 1)
    check_scales(scale, "weight_scale")
    scale = 1.0 / scale if linear_class == "bitlinear" else scale
    check_scales(scale, "weight_scale: its reciprocal")
    return scale


def _check_norm(name: str, weights: Weights, cols: int) -> None:
    key = f"{name}.rms_norm.weight"
    entry = weights.entry(key) if key in weights else None
    if entry is None or not entry.dtype.is_floating_point or entry.shape != (cols,):
        found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise ValueError(f"{_any_path(name, weights)}: {key}: expected floats [{cols}] (use_rms_norm), found {found}")


def _any_path(name: str, weights: Weights):
    return next(weights.path(key) for key in (f"{name}.weight", f"{name}.weight_scale") if key in weights)


# ---- writing ----


def describe(model: torch.nn.Module, linear_class: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The quantization_config of a model and the tensors to write, for a linear class.

    Raises ValueError naming the module that the format cannot hold: an embedding, a matrix that is not ternary or has
    more than one scale, rows that are no multiple of 4, activations that are not "int8", norms in front of some layers
    only; or for a model without packed layers.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    norms, names = set(), []
    for name, module, matrix in packed_modules(model):
        try:
            parts = _module_tensors(module, matrix, linear_class, _float_dtype(model))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for part in ("weight", "weight_scale", "weight_zero", "weight_perm"):
            tensors.pop(f"{name}.{part}", None)
        tensors.update((f"{name}.{part}", tensor) for part, tensor in parts.items())
        names.append(name)
        norms.add(None if module.rms_norm is None else module.rms_norm.eps)
    if not names:
        raise ValueError("expected a model with packed linear layers, found none")
    if len(norms) > 1:
        raise ValueError(f"{names[0]}: rms_norm: expected the same norm in front of every packed layer or none")
    for target in split_ties(model)[0]:
        tensors.pop(target, None)
    eps = norms.pop()
    plain = [name for name, module in model.named_modules() if _is_plain_linear(module)]
    config = {
        "quant_method": QUANT_METHOD,
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": plain,
        "use_rms_norm": eps is not None,
        "rms_norm_eps": _EPS if eps is None else eps,
    }
    return config, tensors


def _module_tensors(
    module: nn.Linear | nn.Embedding, matrix: PackedMatrix, linear_class: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    if isinstance(module, nn.Embedding):
        raise ValueError(f"BitNet checkpoints hold linear layers: expected a float embedding, got {matrix}")
    if module.activations != ACTIVATIONS:
        raise ValueError(f"activations: expected {ACTIVATIONS}, as BitNet multiplies, got {module.activations}")
    ternary = TernaryMatrix.from_packed(matrix)
    scale = ternary.scales[:1, :1]
    if bool((ternary.scales != scale).any()):
        raise ValueError(f"scales: expected one for the matrix, got {list(ternary.scales.shape)} that differ")
    parts = {"weight": pack_rows(ternary.trits), "weight_scale": _stored_scale(scale.reshape(1), linear_class, dtype)}
    if linear_class == "autobitlinear" and module.bias is not None:
        parts["bias"] = _stored_bias(module.bias.detach().float(), parts["weight_scale"].float(), dtype)
    return parts


def _stored_scale(scale: torch.Tensor, linear_class: str, dtype: torch.dtype) -> torch.Tensor:
    """weight_scale [1]: in the model's dtype where that reads back as the same scale, else in float32.

    A reciprocal in float32 may read back one unit in the last place away; then a neighbour of it may do better.
    """
    if linear_class == "autobitlinear":
        narrow = scale.to(dtype)
        return narrow if torch.equal(narrow.float(), scale) else scale
    stored = 1.0 / scale
    around = [torch.nextafter(stored, torch.full_like(stored, end)) for end in (0.0, torch.inf)]
    candidates = [stored.to(dtype), stored, *around]
    return next((each for each in candidates if torch.equal(1.0 / each.float(), scale)), stored)


def _stored_bias(bias: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bias / scale in the model's dtype where that reads back as the same bias, else in float32."""
    stored = bias / scale
    narrow = stored.to(dtype)
    return narrow if torch.equal(narrow.float() * scale, bias) else stored


def _float_dtype(model: torch.nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _is_plain_linear(module: torch.nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.packed is None
    return models.has_matrix(module) and not models.is_table(module)
