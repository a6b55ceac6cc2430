"""Adapters of Hugging Face PEFT over packed weights: `import lowbit.integrations.peft`, then PEFT as its manual says.

    model = get_peft_model(lowbit.load(FOLDER), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    model = PeftModel.from_pretrained(lowbit.load(FOLDER), ADAPTER)

LoRA layers go around `lowbit.nn.Linear` and `Embedding`, whether these hold a packed or a float weight, which stays
frozen and shared as before. A module in `modules_to_save` gets a float copy for each adapter, in the dtype of the
model's embedding, while the packed one stays where it is. Files are those that PEFT writes for the float model, and go
either way; only the tables that PEFT adds to the file of an adapter of the embedding are left out.

Merging would round the sum of a packed weight and an adapter, so it has to be asked for: `requantizing`. Options that
a packed weight has no answer to (DoRA, starts that read the weight, trainable tokens) raise NotImplementedError, files
that do not fit the model ValueError; both name the module and leave the model as it was.

Importing puts a few functions in front of methods of PEFT, at the end of this file; each leaves models without lowbit's
modules alone. Nobody else imports this module: whether adapters work should not depend on which of lowbit and PEFT was
imported first. Tried with PEFT 0.19.1, 0.20.0 and 0.21.2; older ones do not ask a layer for its shape, and those before
0.18 cannot be imported beside Transformers 5.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from .. import models
from .. import nn as lowbit_nn
from ..matrix import PackedMatrix

# Initialisations of LoRA that do not look at the base weight, and options that need it as floats.
_BLIND_STARTS = (True, False, "gaussian", "eva")
_FLOAT_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "target_parameters",
    "layer_replication",
)

# What PEFT calls the tensors of an adapter in a file, behind the name of their module.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|(?:base_layer\.)?weight|bias)"
)


# ---- merging ----


@dataclass
class _Request:
    clip: bool
    untie: bool
    # Codes of tables whose modules all get the same sum -> the one matrix that they will share, once it is made.
    tied: dict[int, PackedMatrix | None] = field(default_factory=dict)


_request: ContextVar[_Request | None] = ContextVar("lowbit_requantizing", default=None)


@contextlib.contextmanager
def requantizing(*, clip: bool = False, untie: bool = False) -> Iterator[None]:
    """`with requantizing(): model.merge_and_unload()`, or merge_adapter(): packed weights take adapters up.

    The sum of the weight and its adapters is rounded to nearest into the format, group size, scale dtype, kind of zero
    points and permutation that the weight has. unmerge_adapter() brings the weight of before back, bit for bit. The
    result is not what the model computed with the adapter beside it: compare them.

    clip: search each group's clipping, as `PackedMatrix.from_float` does.
    untie: a table that several modules share may become several; otherwise ValueError where their adapters differ.
    Ternary weights raise ValueError: a sum is not ternary.
    """
    token = _request.set(_Request(clip, untie))
    try:
        yield
    finally:
        _request.reset(token)


def _requantized(packed: PackedMatrix, weight: Tensor, clip: bool) -> PackedMatrix:
    """weight [rows, cols] in everything that `packed` is but its values."""
    perm = packed.perm
    made = PackedMatrix.from_float(
        weight if perm is None else weight[:, perm.long()],
        packed.format,
        packed.group_size,
        symmetric=packed.zeros is None,
        scale_dtype=packed.scales.dtype,
        clip=clip,
    )
    if perm is None:
        return made
    options = {"format": made.format, "cols": made.cols, "group_size": made.group_size}
    return PackedMatrix(made.codes, made.scales, made.zeros, perm, **options, validate=False)


def _check_merge(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Raises ValueError where a merge of these adapters (None: the active ones) would fail half way, or untie."""
    tables: dict[int, list[tuple[str, _LoraLayer | None, PackedMatrix]]] = {}
    for name, outer, base in _packed_modules(model):
        layer = outer if isinstance(outer, _LoraLayer) else None
        if layer is not None:
            layer.check_merge(layer.mergeable(adapter_names), name)
        if base.layout is not None:
            original = base.packed if layer is None else layer.unmerged()
            tables.setdefault(base.weight.data_ptr(), []).append((name, layer, original))
    request = _request.get()
    for members in tables.values():
        merging = {name: layer.mergeable(adapter_names) if layer else [] for name, layer, _ in members}
        if len(members) == 1 or not any(merging.values()):
            continue
        sums = [layer.delta(merging[name]) if merging[name] else None for name, layer, _ in members]
        if all(s is not None and torch.allclose(s, sums[0], rtol=1e-4, atol=1e-6) for s in sums):
            request.tied.update({original.codes.data_ptr(): None for _, _, original in members})
        elif not request.untie:
            raise ValueError(
                f"{' and '.join(merging)}: merging: expected the same adapter on modules that share a table, got "
                f"different ones: requantizing(untie=True) gives each its own"
            )


# ---- layers ----


class _OverBase:
    """The weight of the module below, for those who ask the module that stands in its place."""

    def _base(self) -> lowbit_nn.PackedModule:
        raise NotImplementedError

    @property
    def packed(self) -> PackedMatrix | None:
        """The packed weight of the base."""
        return self._base().packed

    @property
    def is_loaded(self) -> bool:
        return self._base().is_loaded

    def load(self, weight, *, name: str | None = None, replace: bool = False) -> None:
        """`PackedModule.load` of the base, under its adapters. RuntimeError while one is merged into it."""
        self._require_unmerged()
        self._base().load(weight, name=name, replace=replace)

    def unload(self) -> PackedMatrix | Tensor | None:
        """`PackedModule.unload` of the base, under its adapters. RuntimeError while one is merged into it."""
        self._require_unmerged()
        return self._base().unload()

    def _require_unmerged(self) -> None:
        if self.merged_adapters:
            raise RuntimeError(
                f"{self._base()._where}: weight: expected one without adapters, got one with "
                f"{', '.join(self.merged_adapters)} merged into it: unmerge_adapter() first"
            )


class _LoraLayer(_OverBase):
    """What LoRA layers around a lowbit module share: merging, and a base whose tensors are no floats."""

    _original: PackedMatrix | None = None  # what the base held before adapters were merged into it
    _original_bias: Tensor | None = None

    def _base(self) -> lowbit_nn.PackedModule:
        return self.get_base_layer()

    def mergeable(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of the adapters (None: the active ones) that this layer has and that are not merged into it."""
        names = self.active_adapters if adapter_names is None else adapter_names
        own = (*self.lora_A, *self.lora_embedding_A)
        return [name for name in names if name in own and name not in self.merged_adapters]

    def unmerged(self) -> PackedMatrix:
        """The packed weight without any adapter."""
        return self._base().packed if self._original is None else self._original

    def delta(self, adapter_names: Sequence[str]) -> Tensor:
        """What the adapters add to the weight: float32 [rows, cols]."""
        return sum(self.get_delta_weight(name).float() for name in adapter_names)

    def check_merge(self, adapter_names: Sequence[str], name: str) -> None:
        """Raises ValueError naming the module where these adapters cannot be merged into it."""
        base = self._base()
        if not adapter_names:
            return
        if getattr(base, "rms_norm", None) is not None:
            raise ValueError(f"{name}: merging: expected a plain layer, got one that normalises its input")
        if base.layout is None:
            return
        held = base.stored_format or base.layout.format
        if held == "trit":
            raise ValueError(
                f"{name}: merging: expected a weight whose sum with an adapter it can hold, got a ternary one: "
                "load(packed.unpack(), replace=True) makes it float, or keep the adapter beside it"
            )
        if _request.get() is None:
            raise ValueError(
                f"{name}: merging: expected a float weight, got {held}: do it inside lowbit.integrations.peft."
                "requantizing(), which rounds the sum into that format, or keep the adapter beside it"
            )
        for adapter in adapter_names:
            if adapter in self.lora_variant:
                raise ValueError(
                    f"{name}: merging: expected plain LoRA, got {type(self.lora_variant[adapter]).__name__}"
                )
            if self.lora_bias.get(adapter) and base.bias is None:
                raise ValueError(f"{name}: merging: expected a bias for lora_bias=True to go to, got none")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight: PEFT's own merge of a float one; of a packed one see `requantizing`."""
        base = self._base()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mergeable(adapter_names)]
        self.check_merge(names, base._where)
        if base.layout is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif names:
            self._merge_packed(base, [*self.merged_adapters, *names])

    def _merge_packed(self, base: lowbit_nn.PackedModule, names: list[str]) -> None:
        request, original = _request.get(), self.unmerged()
        codes = original.codes.data_ptr()
        matrix = request.tied.get(codes)
        if matrix is None:
            try:
                matrix = _requantized(original, original.unpack() + self.delta(names), request.clip)
            except ValueError as error:
                raise ValueError(f"{base._where}: merging: {error}") from None
        if codes in request.tied:
            request.tied[codes] = matrix
        base._put(matrix)
        self._original = original
        if any(self.lora_bias.get(name) for name in names):
            before = base.bias.detach().clone() if self._original_bias is None else self._original_bias
            self._original_bias = before
            added = sum(self.lora_B[n].bias * self.scaling[n] for n in names if self.lora_bias.get(n))
            base.bias.copy_(before + added)
        self.merged_adapters = names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every adapter out of the weight again: a packed one becomes the matrix that it was."""
        if self._original is None:
            return super().unmerge()
        base = self._base()
        base._put(self._original.to(base.weight.device))
        if self._original_bias is not None:
            base.bias.copy_(self._original_bias)
        self._original = self._original_bias = None
        self.merged_adapters = []

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # PEFT adds the base's table to the file of an adapter of the embedding. A packed base is a better copy of it.
        if self._base().layout is not None:
            state_dict.pop(f"{prefix}base_layer.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoraLinear(_LoraLayer, lora.Linear):
    """PEFT's LoRA layer around a `lowbit.nn.Linear`."""

    def __init__(self, base_layer, adapter_name: str, **options):
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = False  # set for Conv1D; ours hold it the other way round

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features


class LoraEmbedding(_LoraLayer, lora.Embedding):
    """PEFT's LoRA layer around a `lowbit.nn.Embedding`, whose scale, if it has one, is the adapter's too."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _get_embed_scale(self) -> Tensor | None:
        base = self._base()
        return None if base.embed_scale is None else torch.tensor(base.embed_scale, dtype=base.dtype)

    def _embed(self, input: Tensor, weight: Tensor, **_hooks_of_tensor_parallelism) -> Tensor:
        return nn.functional.embedding(input, weight, padding_idx=self._base().padding_idx)


class ReplacedModule(_OverBase, ModulesToSaveWrapper):
    """A lowbit module in `modules_to_save`: each adapter has a float module of its own in its place."""

    def _base(self) -> lowbit_nn.PackedModule:
        return self.original_module

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs) -> None:
        if adapter_name not in self.modules_to_save:  # PEFT would copy the packed module, which cannot be trained
            weight = None if tied_module is None else tied_module.weight
            self.modules_to_save[adapter_name] = _float_copy(self.original_module, weight)
        super().update(adapter_name, tied_module=tied_module, **kwargs)

    def _mixed_batch_forward(self, input: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        # PEFT mixes a batch over modules of torch.nn only. An adapter without a copy of this one uses the base.
        trained, outputs = dict(self.modules_to_save.items()), {}
        for adapter in dict.fromkeys(adapter_names):
            chosen = [i for i, name in enumerate(adapter_names) if name == adapter]
            module = trained.get(adapter, self.original_module)
            outputs.update(zip(chosen, module(input[chosen], *args, **kwargs), strict=True))
        return torch.stack([outputs[i] for i in range(len(input))])

    def unload_and_optionally_merge_module(self, merge: bool, *args, **kwargs) -> nn.Module:
        # Without merging PEFT would leave the trained copy in the model; unload() is to give the base back.
        return super().unload_and_optionally_merge_module(merge, *args, **kwargs) if merge else self.original_module


_LAYERS = {lowbit_nn.Linear: LoraLinear, lowbit_nn.Embedding: LoraEmbedding}

# The dtype of a model while an adapter goes into it: a packed linear layer has none of its own.
_model_dtype: ContextVar[torch.dtype | None] = ContextVar("lowbit_model_dtype", default=None)


def _float_copy(module: lowbit_nn.PackedModule, weight: nn.Parameter | None = None) -> lowbit_nn.PackedModule:
    """A module that computes what this one does with a float weight that is trained, by default its own."""
    if module.layout is None:
        made = copy.deepcopy(module)
        if weight is not None:
            made._put(weight)
        return made
    if isinstance(module, lowbit_nn.Embedding):
        dtype = module.dtype
        shape = module.num_embeddings, module.embedding_dim
        made = lowbit_nn.Embedding(*shape, module.padding_idx, dtype, module.embed_scale, module.checked)
    else:
        bias = module.bias
        dtype = _model_dtype.get() or (torch.get_default_dtype() if bias is None else bias.dtype)
        bias = None if bias is None else bias.detach().clone()
        made = lowbit_nn.Linear(module.in_features, module.out_features, bias, module.activations)
        made.rms_norm = copy.deepcopy(module.rms_norm)
    made.name = module.name
    made._put(module.packed.unpack(dtype) if weight is None else weight)  # PEFT makes it trainable when it is active
    return made.train(module.training)


# ---- what a model and a file hold ----


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module, the module below its adapters) of every module that is not itself a part of an adapter."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside, base = None, module
        if isinstance(module, BaseTunerLayer):
            inside, base = f"{name}.", module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside, base = f"{name}.", module.original_module
        yield name, module, base


def _packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, lowbit_nn.PackedModule]]:
    return (found for found in _modules(model) if isinstance(found[2], lowbit_nn.PackedModule))


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((base for _, outer, base in _modules(model) if outer is module), None)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    embedding = _input_embeddings(model)
    if isinstance(embedding, lowbit_nn.Embedding):
        return embedding.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _tables_tied_to_embedding(model: nn.Module) -> set[str]:
    """Names of the packed modules that use the input embedding's table."""
    embedding = _input_embeddings(model)
    if not isinstance(embedding, lowbit_nn.PackedModule) or embedding.layout is None:
        return set()
    codes = embedding.weight.data_ptr()
    return {
        name
        for name, _, base in _packed_modules(model)
        if base is not embedding and base.layout is not None and base.weight.data_ptr() == codes
    }


def _include_all_linear(config: PeftConfig, model: nn.Module) -> None:
    """Adds our linear layers, but for the head, to what PEFT finds for target_modules="all-linear"."""
    if str(getattr(config, "target_modules", None)).lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config.target_modules |= {
        name
        for name, outer, base in _packed_modules(model)
        if isinstance(base, lowbit_nn.Linear) and outer is not head and not isinstance(outer, AuxiliaryTrainingWrapper)
    }


def _refuse(tuner: BaseTuner, config: PeftConfig, model: nn.Module) -> None:
    """Raises NotImplementedError, or ValueError for an empty module, before an adapter changes the model."""
    if config.peft_type == PeftType.LORA:
        if config.target_modules is None:
            tuner._prepare_adapter_config(config, tuner.get_model_config(model))  # PEFT's own choice for the model
        if getattr(config, "trainable_token_indices", None) is not None:
            _refuse_trainable_tokens(config, model)
    if not getattr(config, "target_modules", None):
        return
    for name, _, base in _packed_modules(model):
        if not tuner._check_target_module_exists(config, name):
            continue
        if config.peft_type != PeftType.LORA:
            raise NotImplementedError(f"{name}: expected LoRA on a packed module, got {config.peft_type.value}")
        if not base.is_loaded:
            raise ValueError(f"{name}: weight: expected one to be loaded before an adapter goes around it, got none")
        if base.layout is None:
            continue
        start = config.init_lora_weights
        if start not in _BLIND_STARTS:
            raise NotImplementedError(
                f"{name}: init_lora_weights: expected a start that does not read the weight ({base.layout.format}): "
                f"True, False, 'gaussian' or 'eva', got {start!r}"
            )
        for option in _FLOAT_OPTIONS:
            if getattr(config, option, None):
                raise NotImplementedError(
                    f"{name}: {option}: expected none on a packed weight ({base.layout.format}), "
                    f"got {getattr(config, option)!r}"
                )


def _refuse_trainable_tokens(config: LoraConfig, model: nn.Module) -> None:
    indices = config.trainable_token_indices
    for name, _, base in _packed_modules(model):
        targeted = (
            any(name.endswith(key) for key in indices)
            if isinstance(indices, Mapping)
            else base is _input_embeddings(model)
        )
        if targeted:
            raise NotImplementedError(
                f"{name}: trainable_token_indices: expected none on a module of lowbit, whose rows are not trained one "
                f"by one: modules_to_save=[{name.rpartition('.')[2]!r}] trains a float copy of all"
            )


def _check_file(model: nn.Module, config: PeftConfig | None, model_id, options: Mapping) -> None:
    """Raises ValueError naming the module where the tensors of an adapter do not fit a model with packed modules."""
    if not any(True for _ in _packed_modules(model)):
        return
    where, _ = PeftModel._split_kwargs(dict(options))
    config = config or PeftConfig.from_pretrained(model_id, **where)
    if config.peft_type != PeftType.LORA:
        return
    mapping = options.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None) or None
    tensors = load_peft_weights(model_id, device="cpu", key_mapping=mapping, **where)
    bases = {name: base for name, _, base in _modules(model)}
    carried = {name for name in bases if any(name.endswith(key) for key in config.modules_to_save or ())}
    if getattr(config, "ensure_weight_tying", False) and _input_embeddings(model) in map(bases.get, carried):
        carried |= _tables_tied_to_embedding(model)
    found = set()
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        base = bases.get(match["name"]) if match else None
        shape = None if base is None else _shape(base)
        if shape is None:
            continue
        name, part = match["name"], match["part"]
        found.add((name, part))
        if part == "weight" and name not in carried and getattr(base, "layout", None) is not None:
            raise ValueError(
                f"{model_id}: {name}: weight: expected adapters of a packed module, got a weight to replace it: "
                "save without save_embedding_layers=True, or load() it into the model first"
            )
        expected = _expected_shape(part, shape, _rank(config, name))
        if list(tensor.shape) != expected:
            raise ValueError(f"{model_id}: {name}: {part}: expected shape {expected}, got {list(tensor.shape)}")
    for name in carried:
        if isinstance(bases[name], lowbit_nn.PackedModule) and (name, "weight") not in found:
            raise ValueError(f"{model_id}: {name}: weight: expected one, as modules_to_save says, found none")


def _shape(base: nn.Module) -> tuple[int, int] | None:
    if isinstance(base, lowbit_nn.PackedModule):
        return base._shape
    return tuple(models.weight_matrix(base).shape) if models.has_matrix(base) else None


def _rank(config: LoraConfig, name: str) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)


def _expected_shape(part: str, shape: tuple[int, int], rank: int) -> list[int]:
    rows, cols = shape
    return {
        "lora_A.weight": [rank, cols],
        "lora_B.weight": [rows, rank],
        "lora_B.bias": [rows],
        "lora_embedding_A": [rank, rows],
        "lora_embedding_B": [cols, rank],
        "base_layer.weight": [rows, cols],
        "weight": [rows, cols],
        "bias": [rows],
    }[part]


# ---- in front of PEFT ----
#
# PEFT lets a configuration name layers of one's own (_register_custom_module), but asks whoever makes the configuration
# to do so, and has no such place for the rest. So these functions stand in front of its methods; each gets PEFT's own
# as its first argument and calls it.


def _in_front_of(owner: type, name: str) -> Callable[[Callable], Callable]:
    def put(function: Callable) -> Callable:
        attribute = inspect.getattr_static(owner, name)
        stock = getattr(attribute, "__func__", attribute)
        stock = getattr(stock, "lowbit_stock", stock)  # this file was loaded before: once is enough

        @functools.wraps(stock)
        def hooked(*args, **kwargs):
            return function(stock, *args, **kwargs)

        hooked.lowbit_stock = stock
        setattr(owner, name, classmethod(hooked) if isinstance(attribute, classmethod) else hooked)
        return function

    return put


@_in_front_of(BaseTuner, "inject_adapter")
def _inject_adapter(stock, self, model, adapter_name, *args, **kwargs):
    if not any(True for _ in _packed_modules(model)):
        return stock(self, model, adapter_name, *args, **kwargs)
    config = self.peft_config[adapter_name]
    _include_all_linear(config, model)
    _refuse(self, config, model)
    if isinstance(config, LoraConfig):
        config._register_custom_module({**_LAYERS, **(config._custom_modules or {})})
    token = _model_dtype.set(_dtype_of(model))
    try:
        return stock(self, model, adapter_name, *args, **kwargs)
    finally:
        _model_dtype.reset(token)


@_in_front_of(BaseTuner, "_get_module_names_tied_with_embedding")
def _names_tied_with_embedding(stock, self):
    # PEFT looks for parameters, which packed tables are not; without them ensure_weight_tying would do nothing.
    return sorted({*stock(self), *_tables_tied_to_embedding(self.model)})


@_in_front_of(BaseTuner, "merge_adapter")
def _merge_adapter(stock, self, adapter_names=None, safe_merge=False):
    _check_merge(self.model, adapter_names)
    return stock(self, adapter_names=adapter_names, safe_merge=safe_merge)


@_in_front_of(BaseTuner, "_unload_and_optionally_merge")
def _unload_and_optionally_merge(stock, self, merge=True, **kwargs):
    if merge:
        _check_merge(self.model, kwargs.get("adapter_names"))
    return stock(self, merge=merge, **kwargs)


@_in_front_of(PeftModel, "load_adapter")
def _load_adapter(stock, self, model_id, adapter_name, *args, **kwargs):
    _check_file(self.get_base_model(), self.peft_config.get(adapter_name), model_id, kwargs)
    return stock(self, model_id, adapter_name, *args, **kwargs)


@_in_front_of(PeftModel, "from_pretrained")
def _from_pretrained(
    stock, cls, model, model_id, adapter_name="default", is_trainable=False, config=None, *args, **kwargs
):
    _check_file(model, config, model_id, kwargs)
    return stock(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)


@_in_front_of(PeftModel, "get_nb_trainable_parameters")
def _count_parameters(stock, self):
    # Packed weights are buffers; without them an adapter would seem to be most of the model.
    trainable, everything = stock(self)
    tables = {base.weight.data_ptr(): base._shape for _, _, base in _packed_modules(self) if base.layout is not None}
    return trainable, everything + sum(rows * cols for rows, cols in tables.values())


def _new_wrapper(cls, module_to_save=None, *args, **kwargs):
    """The wrapper of a module of ours is ours, wherever PEFT makes it."""
    ours = cls is ModulesToSaveWrapper and isinstance(module_to_save, lowbit_nn.PackedModule)
    return object.__new__(ReplacedModule if ours else cls)


ModulesToSaveWrapper.__new__ = _new_wrapper

__all__ = ["LoraEmbedding", "LoraLinear", "ReplacedModule", "requantizing"]
