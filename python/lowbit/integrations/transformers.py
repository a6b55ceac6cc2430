"""lowbit checkpoints in Hugging Face Transformers.

Importing this module registers quant_method "lowbit", so that AutoModelForCausalLM.from_pretrained(FOLDER) and
save_pretrained(FOLDER) work on models with packed modules. `lowbit.load` builds its models the same way: Transformers
creates the model on the meta device, the quantizer below puts the packed modules in, and Transformers fills the rest,
recomputing the buffers that no file holds (rotary frequencies, position ids).
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
import transformers
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import models, nn
from ..checkpoint import native
from ..checkpoint.safe_write import COMMIT
from ..checkpoint.safetensors_map import Weights
from ..checkpoint.strict_json import parse_json
from ..matrix import PackedMatrix

_given: ContextVar[native.PackedWeights | None] = ContextVar("lowbit_packed_weights", default=None)


@register_quantization_config(native.QUANT_METHOD)
class LowbitConfig(QuantizationConfigMixin):
    """quantization_config of a lowbit checkpoint; `modules` as docs/formats.md section 1 says."""

    def __init__(self, format_version: int = native.FORMAT_VERSION, modules: Mapping | None = None, **other):
        self.__dict__.update(other)
        self.quant_method = native.QUANT_METHOD
        self.format_version = format_version
        self.modules = dict(modules or {})


@register_quantizer(native.QUANT_METHOD)
class LowbitQuantizer(HfQuantizer):
    """Puts packed modules into a model that Transformers is loading. Only for checkpoints that are packed already."""

    requires_calibration = True  # Transformers then refuses to quantize a float model with this config

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._packed = _given.get()
        self._keep_dtypes = self._packed is not None

    def get_new_dtype(self, converter, param, dtype):
        # lowbit.load gives every tensor in the dtype that the model shall have; scales keep theirs in any case, since
        # their buffers were made from the file.
        return None if self._keep_dtypes else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        # Transformers calls this under torch.device("meta"), but packed modules are real from the start.
        with torch.device("cpu"):
            if self._packed is None:
                if not checkpoint_files:
                    raise ValueError("lowbit: expected a checkpoint in a folder, got a state dict: use lowbit.load")
                folder = Path(checkpoint_files[0]).parent
                if (folder / COMMIT).exists():
                    raise ValueError(
                        f"{folder / COMMIT}: a save was cut off here: lowbit.load({str(folder)!r}) completes it"
                    )
                where = f"{folder / 'config.json'}: quantization_config"
                described = self.quantization_config.to_dict()
                self._packed = native.read_packed(Weights(folder), described, where, in_memory=False)
            _install(model, self._packed)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, matrix in self._packed.matrices.items():
            module = model.get_submodule(name)
            # Transformers assigns the tensors that it read, perhaps onto another device.
            module.load(
                PackedMatrix(
                    module.weight,
                    module.weight_scale,
                    module.weight_zero,
                    module.weight_perm,
                    format=matrix.format,
                    cols=matrix.cols,
                    group_size=matrix.group_size,
                    validate=False,
                )
            )
        for name, source in self._packed.shared.items():
            model.get_submodule(name).load(model.get_submodule(source).packed)
        self._packed = None
        return model

    def get_state_dict_and_metadata(self, model):
        described, tensors = native.describe(model)
        self.quantization_config = LowbitConfig(**described)
        model.config.quantization_config = self.quantization_config
        return tensors, native.file_metadata(described, set(tensors))

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside packed weights: matmul passes gradients to its activations

    @property
    def is_compileable(self) -> bool:
        return True


def build_model(config: transformers.PreTrainedConfig, packed: native.PackedWeights, folder: Path):
    """(A Transformers model in evaluation mode, on the CPU, that uses the given tensors where they lie; the names of
    tensors that it has no use for).

    Raises ValueError naming the folder when the tensors and the configuration do not fit each other.
    """
    where = str(folder)
    model_class = _model_class(config, where)
    dtype = _dtype(config, packed)
    for name in packed.entries.keys() - packed.matrices.keys() - packed.shared.keys():
        # A float weight that someone put in the place of a packed one, perhaps in a dtype of their own.
        if f"{name}.weight" in packed.tensors:
            packed.tensors[f"{name}.weight"] = packed.tensors[f"{name}.weight"].to(dtype)
    token = _given.set(packed)
    try:
        with _quietly():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=packed.tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error
    finally:
        _given.reset(token)
    for name, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{where}: {name}: shape: expected {list(expected)}, got {list(found)}")
    if info["missing_keys"]:
        shown = ", ".join(sorted(info["missing_keys"])[:5])
        raise ValueError(f"{where}: {shown}: expected by the model, not found in the files")
    _remember_folder(model, folder)
    return model, sorted(info["unexpected_keys"])


def load_plain(folder: Path, config: transformers.PreTrainedConfig):
    """A model without packed modules, read by Transformers itself. Raises ValueError where that fails."""
    model_class = _model_class(config, str(folder))
    try:
        with _quietly():
            return model_class.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error
    except Exception as error:  # damaged files fail in their own way for every model type
        raise ValueError(f"{folder}: {error}") from error


def meta_model(config: transformers.PreTrainedConfig, where: str):
    """The modules of a model without any memory for their weights."""
    model_class = _model_class(config, where)
    with torch.device("meta"):
        return model_class(config)


def bitnet_linears(config: transformers.PreTrainedConfig, skipped: list[str] | None, where: str) -> set[str]:
    """Names of the linear layers that Transformers makes BitNet layers, given `modules_to_not_convert`."""
    model = meta_model(config, where)
    keep = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    try:
        return {name for name in names if should_convert_module(name, keep)}
    except re.error as error:
        raise ValueError(f"{where}: modules_to_not_convert: expected regular expressions: {error}") from None


def _install(model, packed: native.PackedWeights) -> None:
    matrices, activations = {}, {}
    for name, source in [*((name, name) for name in packed.matrices), *packed.shared.items()]:
        matrix, entry = packed.matrices[source], packed.entries[name]
        module = _original(model, name, entry)
        _settle_bias(name, module, packed.tensors, matrix.rows)
        matrices[name], activations[name] = matrix, entry.activations
    _untie(model, set(matrices))
    models.patch(model, matrices, activations=activations)
    for name, matrix in matrices.items():
        if (eps := packed.entries[name].rms_norm_eps) is not None:
            model.get_submodule(name).rms_norm = nn.RMSNorm(matrix.cols, eps)
    for name in packed.shared:
        model.get_submodule(name).unload()  # filled after loading, so that no file needs to hold its tensors


def _original(model, name: str, entry: native.ModuleEntry) -> torch.nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: expected a module of {type(model).__name__}, which has none of that name") from None
    if not models.has_matrix(module):
        raise ValueError(f"{name}: expected a linear layer or an embedding, got {type(module).__name__}")
    kind = "embedding" if models.is_table(module) else "linear"
    if kind != entry.kind:
        raise ValueError(f"{name}: kind: expected {kind} (a {type(module).__name__}), got {entry.kind}")
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor) and scale.is_meta:
        # Scaled embeddings keep the number beside the buffer, which has no value yet on the meta device.
        if not hasattr(module, "scalar_embed_scale"):
            raise NotImplementedError(
                f"{name}: expected {type(module).__name__} to tell its scale (scalar_embed_scale)"
            )
        module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=scale.dtype)
    return module


def _settle_bias(name: str, module: torch.nn.Module, tensors: dict[str, torch.Tensor], rows: int) -> None:
    """A checkpoint may hold a bias that the model lacks: zeros (written by early AutoGPTQ) are dropped, others kept."""
    bias = tensors.get(f"{name}.bias")
    if bias is None or getattr(module, "bias", None) is not None:
        return
    if models.is_table(module) or bias.shape != (rows,) or not bias.is_floating_point():
        raise ValueError(
            f"{name}.bias: expected floats [{rows}] of a linear layer, got {bias.dtype} {list(bias.shape)}"
        )
    if bias.count_nonzero() == 0:
        del tensors[f"{name}.bias"]
    else:
        module.bias = torch.nn.Parameter(torch.empty_like(bias, device="meta"))


def _untie(model, packed_names: set[str]) -> None:
    """Takes packed tables out of Transformers' own tying, which shares parameters: ours share matrices."""
    split = False
    for target, source in list(model.all_tied_weights_keys.items()):
        names = {target.rpartition(".")[0], source.rpartition(".")[0]}
        if names & packed_names:
            del model.all_tied_weights_keys[target]
            split |= not names <= packed_names
    if split:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _remember_folder(model, folder: Path) -> None:
    """So that saving the model can copy its tokenizer, and generation starts from the folder's settings."""
    model.config._name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        parse_json(folder / "generation_config.json")
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def _model_class(config: transformers.PreTrainedConfig, where: str):
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if names or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where}: architectures: expected a model class of transformers, got {names or type(config)}")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _dtype(config: transformers.PreTrainedConfig, packed: native.PackedWeights) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (t.dtype for n, t in packed.tensors.items() if t.is_floating_point() and not n.endswith(".weight_scale"))
    return next(floats, torch.float32)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, and no report of what is missing or left over: here that is an error or a warning."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
