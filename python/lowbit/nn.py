"""Modules over a PackedMatrix: drop-in `Linear`, `Embedding` and `EmbeddingBag` whose weight is packed, or float, and
can be swapped; and `TernaryLinear`, which is trained to become one.

Tensors are registered under the names they have in a file: `weight` (the uint8 codes, so that tying by that name keeps
working), `weight_scale`, `weight_zero`, `weight_perm`. An embedding and a head made from one PackedMatrix share its
tensors: one allocation.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit import abi
from lowbit.abi import ACTIVATIONS, BAG_MODES, ID_DTYPES, ID_POLICIES, Layout, lookup, normalise_group_size
from lowbit.matrix import PackedMatrix, require_finite
from lowbit.ternary import ActivationQuant, WeightQuant, weight_quant

_SIDE_TENSORS = ("weight_scale", "weight_zero", "weight_perm")
_changes = 0


def changes() -> int:
    """How often attributes of modules here were set so far: whoever keeps what a module is made of (addresses, a mode)
    can tell by it that none has changed since."""
    return _changes


class PackedModule(nn.Module):
    """A module with one [rows, cols] weight: a PackedMatrix, a float Parameter, or none while unloaded.

    Attributes:
        layout: format, columns and group size of the packed weight; None when the weight is float or absent.
        stored_format: the format that the weight is saved in where it is held in another one; else None.
        name: the module's full name in its model, for messages and for `load` from a file; None where nobody told it.
        check_on_use: whether the weight's values are still to be checked, when it is first used.
    """

    def __init__(self, rows: int, cols: int):
        super().__init__()
        self._shape = (rows, cols)
        self._device = torch.device("cpu")  # where the weight is, was, or would have been moved to
        self.name: str | None = None
        self._clear()

    @property
    def packed(self) -> PackedMatrix | None:
        """The packed weight, over this module's own tensors; None when the weight is float or absent."""
        layout = self.layout
        if layout is None:
            return None
        tensors = self._weight_tensors()
        held = self._held
        # Moving, casting and loading a state replace tensors; the matrix made from the old ones is then made anew.
        if held is None or not all(map(operator.is_, tensors, held._tensors)):
            options = {"format": layout.format, "cols": layout.cols, "group_size": layout.group_size}
            try:
                held = PackedMatrix(*tensors, **options, validate=self.check_on_use)
            except ValueError as error:
                raise ValueError(f"{self._where}: {error}") from None
            self.__dict__["_held"], self.check_on_use = held, False
        return held

    @property
    def is_loaded(self) -> bool:
        return self.weight is not None

    def load(
        self, weight: PackedMatrix | Tensor | str | os.PathLike, *, name: str | None = None, replace: bool = False
    ) -> None:
        """Puts a weight in, without copying it: a PackedMatrix, a float tensor [rows, cols], or where one lies.

        A path names a model folder or a .safetensors file (`lowbit.load_weight`), in which `name`, by default the
        module's own, is looked up; the weight goes where the module's was. A float weight keeps its dtype: the product
        is then made in that dtype, and comes out in x's. To share one table between a head and an embedding, load the
        other's `packed`.

        replace: take out the weight that is in use first; without it that is an error.
        Raises RuntimeError when a weight is in use, ValueError for another shape, TypeError for another kind of
        object, and what `lowbit.load_weight` raises; the module is then as it was.
        """
        if self.is_loaded and not replace:
            raise RuntimeError(
                f"{self._where}: weight: expected none while another is loaded, got a second one: "
                "unload() first, or load(..., replace=True)"
            )
        if isinstance(weight, str | os.PathLike):
            from lowbit.checkpoint import load_weight

            weight = load_weight(weight, name or self.name or "").to(self._device)
        self._put(weight)

    def unload(self) -> PackedMatrix | Tensor | None:
        """Takes the weight out and returns it; forward raises RuntimeError until the next load()."""
        held = self.packed if self.layout is not None else self.weight
        self._clear()
        return held

    def _put(self, weight: PackedMatrix | Tensor) -> None:
        """Replaces the weight, whatever is held."""
        if not isinstance(weight, PackedMatrix | Tensor):
            raise TypeError(
                f"{self._where}: weight: expected a PackedMatrix, a tensor or a path, got {type(weight).__name__}"
            )
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            raise TypeError(
                f"{self._where}: weight: expected a float tensor or a PackedMatrix, got a tensor of {weight.dtype}"
            )
        if tuple(weight.shape) != self._shape:
            raise ValueError(f"{self._where}: weight: expected shape {list(self._shape)}, got {list(weight.shape)}")
        self._clear()
        self._device = weight.device
        if isinstance(weight, PackedMatrix):
            self.layout = weight.layout
            for name, tensor in weight.tensors.items():
                self.register_buffer(name, tensor)
        else:
            self._buffers.pop("weight")
            self.weight = (
                weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
            )

    @property
    def _where(self) -> str:
        return self.name or type(self).__name__

    def __setattr__(self, name: str, value) -> None:
        global _changes
        _changes += 1
        # How Transformers ties a head to an embedding: it assigns one's `weight` to the other. The codes of a matrix
        # bring their scales along, or the weight would be neither's.
        tied = PackedMatrix.of(value) if name == "weight" and isinstance(value, Tensor) else None
        if tied is not None and value is not self._buffers.get("weight"):
            self._put(tied)
        elif isinstance(value, nn.Parameter) and name == "weight" and self.layout is not None:
            self._put(value)
        else:
            super().__setattr__(name, value)

    def _weight_tensors(self) -> tuple[Tensor | None, ...]:
        buffers = self._buffers  # what getattr would find, without its search
        return tuple(buffers[name] for name in ("weight", *_SIDE_TENSORS))

    def _checked_tensors(self) -> tuple[Tensor | None, ...]:
        if self.check_on_use:
            _ = self.packed  # checks them
        return self._weight_tensors()

    def _apply(self, fn, recurse=True):
        packed = self._weight_tensors() if self.layout is not None else ()

        def once(tensor: Tensor) -> Tensor:
            return _moved_once(fn, tensor) if any(tensor is part for part in packed) else fn(tensor)

        super()._apply(once, recurse)
        self._device = fn(torch.empty(0, device=self._device)).device
        self._held = None  # or it would keep the tensors that were left behind
        if packed and not self.check_on_use and (self.weight.is_cpu or self.weight.is_cuda):
            _ = self.packed  # so that the new codes are known as a matrix's when a tie is made of them
        return self

    def _clear(self) -> None:
        self.layout: Layout | None = None
        self.stored_format: str | None = None
        self.check_on_use = False
        self._held: PackedMatrix | None = None  # `packed`, while the tensors are those it was made from
        for name in ("weight", *_SIDE_TENSORS):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            self.register_buffer(name, None)

    def _require_weight(self) -> None:
        if self.weight is None:
            raise RuntimeError(f"{self._where}: weight: expected one to be loaded, got none: call load(...) first")

    def _weight_repr(self) -> str:
        if self.layout is not None:
            return f"{self.layout.format}, group_size={self.layout.group_size}"
        return "unloaded" if self.weight is None else str(self.weight.dtype)


def _load_resized(module: PackedModule, weight: PackedMatrix | Tensor) -> None:
    before, stored = module._shape, module.stored_format
    module._shape = (weight.shape[0], before[1])
    try:
        module._put(weight)
    except (ValueError, TypeError):
        module._shape = before
        raise
    module.stored_format = stored if isinstance(weight, PackedMatrix) else None


# What a function made of the tensors of packed weights, for as long as both live: {function: {id: (tensor, version of
# its contents, result)}}.
_moved: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _moved_once(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor), but one result for modules that share a tensor: to() and its like come to each of them by itself with
    the same function, and a tied table would become two.

    A cast (half(), to(bfloat16)) is meant for activations and float weights: packed tensors move with the module but
    keep their dtypes, and scales so the values that codes were chosen for.
    """
    try:
        known = _moved.setdefault(fn, {})
    except TypeError:  # torch.Tensor.half and its like, to which there are no weak references
        known = {}
    version = None if tensor.is_inference() else tensor._version
    source, then, result = known.get(id(tensor), (None, None, None))
    moved = result() if source is not None and source() is tensor and then == version else None
    if moved is None:
        moved = fn(tensor)
        moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        known[id(tensor)] = weakref.ref(tensor), version, weakref.ref(moved)
    return moved


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times `weight` [size]: Llama's order of rounding."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Linear(PackedModule):
    """y = x W^T + bias: x [..., in_features] float32, float16 or bfloat16 -> y [..., out_features] of the same dtype.

    activations: "float" (16-bit fixed point per group, error about 4e-5 of the product) or "int8".
    rms_norm: an RMSNorm that x passes first (as some BitNet layers have), or None; assign it.
    Gradients flow to x and bias; a packed weight is frozen.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None, activations: str = "float"):
        super().__init__(out_features, in_features)
        lookup(ACTIVATIONS, activations, "activations")
        if bias is not None and list(bias.shape) != [out_features]:
            raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.rms_norm: RMSNorm | None = None

    @classmethod
    def from_packed(cls, packed: PackedMatrix, bias: Tensor | None = None, activations: str = "float") -> Linear:
        module = cls(packed.cols, packed.rows, bias, activations)
        module._put(packed)
        return module

    def resize(self, weight: PackedMatrix | Tensor, bias: Tensor | None = None) -> None:
        """load() of a weight [any rows, in_features], with a bias of as many where the module has one; out_features
        follows. ValueError for shapes that do not fit each other; the old weight and bias then stay."""
        if (bias is None) != (self.bias is None) or (bias is not None and list(bias.shape) != [weight.shape[0]]):
            expected = "None" if self.bias is None else f"shape [{weight.shape[0]}]"
            raise ValueError(f"bias: expected {expected}, got {None if bias is None else list(bias.shape)}")
        _load_resized(self, weight)
        self.out_features = self._shape[0]
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        layout, bias = self.layout, self._parameters["bias"]
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        if layout is None:
            self._require_weight()
            return self._float_product(x, bias)
        if abi.runs_eagerly(x, bias):
            return abi.matmul(self.packed._view, x, bias, self.activations)
        return torch.ops.lowbit.matmul(
            x, *self._checked_tensors(), bias, layout.format, layout.cols, layout.group_size, self.activations
        )

    def _float_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.weight.dtype
        if x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, self.weight, bias)
        # A weight that was loaded in another dtype than the model's: its own precision, the model's result.
        return nn.functional.linear(x.to(dtype), self.weight, None if bias is None else bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._weight_repr()}"
        )


class Embedding(PackedModule):
    """out = W[ids] in `dtype`, times `embed_scale` if there is one (Gemma); ids int32 or int64 of any shape.

    policy: what an id outside [0, num_embeddings) does: "error" raises IndexError, "zero" gives zeros, "clamp" the
    nearest row. None is "error" on the CPU and, unless `checked`, "zero" on a GPU, where an error would make every call
    wait. A float weight is looked up by torch, which has no policies. `padding_idx` is kept for those who ask for it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        embed_scale: float | None = None,
        checked: bool = False,
        policy: str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim)
        if policy is not None:
            lookup(ID_POLICIES, policy, "policy")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.dtype, self.embed_scale, self.checked = padding_idx, dtype, embed_scale, checked
        self.policy = policy

    @classmethod
    def from_packed(
        cls, packed: PackedMatrix, padding_idx=None, dtype=torch.float32, embed_scale=None, checked=False, policy=None
    ) -> Embedding:
        module = cls(packed.rows, packed.cols, padding_idx, dtype, embed_scale, checked, policy)
        module._put(packed)
        return module

    def resize(self, weight: PackedMatrix | Tensor) -> None:
        """load() of a weight [any rows, embedding_dim]: num_embeddings follows, a padding_idx beyond it is dropped."""
        _load_resized(self, weight)
        self.num_embeddings = self._shape[0]
        if self.padding_idx is not None and self.padding_idx >= self.num_embeddings:
            self.padding_idx = None

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what a cast makes of the outputs
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        layout = self.layout
        if layout is None:
            self._require_weight()
            out = nn.functional.embedding(ids, self.weight, self.padding_idx).to(self.dtype)
        elif abi.runs_eagerly(ids):
            view = self.packed._view
            out = abi.gather(view, ids, self.dtype, self._policy(view.device))
        else:
            policy = self._policy(abi.device_index(self.weight, "weight"))
            out = torch.ops.lowbit.gather(
                ids, *self._checked_tensors(), layout.format, layout.cols, layout.group_size, self.dtype, policy
            )
        # The factor is rounded to the output dtype first, as models that scale their embeddings do.
        return out if self.embed_scale is None else out * torch.tensor(self.embed_scale, dtype=out.dtype)

    def _policy(self, device: int) -> str:
        return self.policy or ("error" if device < 0 or self.checked else "zero")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._weight_repr()}"


class EmbeddingBag(Embedding):
    """Sums or means of rows, as nn.EmbeddingBag makes them: ids int32 or int64 -> [bags, embedding_dim] of `dtype`.

    mode: "sum" or "mean". Rows are added in float32 in their order, on every device. padding_idx: an id that is left
    out, of a mean's count too; a negative one counts from the end. include_last_offset: offsets end with the end of the
    last bag. checked, policy: as in Embedding; "zero" adds a row of zeros.
    NotImplementedError: mode "max".
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        checked: bool = False,
        policy: str | None = None,
    ):
        if mode == "max":
            raise NotImplementedError('mode: expected "sum" or "mean" of a packed table, got "max"')
        lookup(BAG_MODES, mode, "mode")
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx: expected a row of {num_embeddings} or None, got {padding_idx}")
            padding_idx %= num_embeddings
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, checked=checked, policy=policy)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_packed(
        cls,
        packed: PackedMatrix,
        mode="mean",
        include_last_offset=False,
        padding_idx=None,
        dtype=torch.float32,
        checked=False,
        policy=None,
    ) -> EmbeddingBag:
        module = cls(packed.rows, packed.cols, mode, include_last_offset, padding_idx, dtype, checked, policy)
        module.load(packed)
        return module

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """input [bags, size], or [count] with offsets [bags] (with include_last_offset [bags + 1]), int32 or int64.

        per_sample_weights: floats of input's shape that rows are multiplied by; gradients flow to them. Raises
        ValueError for shapes that do not fit and offsets that decrease, NotImplementedError for weights with mode
        "mean", as torch does, IndexError for bad ids under policy "error".
        """
        layout, weights = self.layout, per_sample_weights
        if layout is None:
            self._require_weight()
            return nn.functional.embedding_bag(
                input,
                self.weight,
                offsets,
                mode=self.mode,
                per_sample_weights=weights,
                include_last_offset=self.include_last_offset,
                padding_idx=self.padding_idx,
            )
        if weights is not None and weights.shape != input.shape:
            raise ValueError(f"per_sample_weights: expected shape {list(input.shape)}, got {list(weights.shape)}")
        ids, offsets = input.reshape(-1), self._edges(input, offsets)
        weights = None if weights is None else weights.reshape(-1)
        if abi.runs_eagerly(ids, weights):
            view = self.packed._view
            policy = self._policy(view.device)
            return abi.gather_bags(view, ids, offsets, self.dtype, self.mode, policy, self.padding_idx, weights)
        policy = self._policy(abi.device_index(self.weight, "weight"))
        bags = (self.dtype, self.mode, policy, self.padding_idx, weights)
        return torch.ops.lowbit.gather_bags(
            ids, offsets, *self._weight_tensors(), layout.format, layout.cols, layout.group_size, *bags
        )

    def _edges(self, input: Tensor, offsets: Tensor | None) -> Tensor:
        """int64 [bags + 1]: where bags begin, and where the last one ends."""
        if input.ndim == 2:
            if offsets is not None:
                raise ValueError(f"offsets: expected None for an input of 2 dimensions, got {list(offsets.shape)}")
            return torch.arange(input.shape[0] + 1, device=input.device) * input.shape[1]
        if input.ndim != 1:
            raise ValueError(f"input: expected 1 or 2 dimensions, got {input.ndim}")
        if offsets is None or offsets.ndim != 1:
            found = None if offsets is None else list(offsets.shape)
            raise ValueError(f"offsets: expected 1 dimension for an input of 1 dimension, got {found}")
        lookup(ID_DTYPES, offsets.dtype, "offsets dtype")
        edges = offsets.long()
        return edges if self.include_last_offset else nn.functional.pad(edges, (0, 1), value=input.shape[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


class TernaryLinear(nn.Linear):
    """An nn.Linear that multiplies by its weight made ternary: y = x W'^T + bias, for training and fine-tuning.

    `weight` [out_features, in_features] and `bias` are nn.Linear's parameters under its names: the weight is the latent
    one, W' what `lowbit.ternary.weight_quant` makes of it in every forward pass, and the gradient of W' is taken for
    that of the weight. `pack` gives the trits and the scales of that forward pass, exactly.

    group_size: columns that share a scale, a multiple of 16 and a divisor of in_features; -1: a row; None: the matrix.
    quant_dtype: what trits and scale are computed in; None: the weight's dtype. W' has the weight's dtype in any case,
        so in a module cast to bfloat16 its scale is rounded to it; under autocast the parameters keep theirs.
    activations: "float", or "int8": x passes BitNet's 8 bits a token, its gradient straight through too.

    A weight that is ternary when training begins keeps its scale until the first step, which makes it a latent one
    whose scale is its mean: begin at the latent weights where they exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int | None = None,
        quant_dtype: torch.dtype | None = torch.float32,
        activations: str = "float",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        lookup(ACTIVATIONS, activations, "activations")
        group_size = None if group_size is None else normalise_group_size(group_size, in_features)
        if group_size is not None and in_features % group_size:
            raise ValueError(f"group_size: expected a divisor of in_features, {in_features}, got {group_size}")
        self.group_size, self.quant_dtype, self.activations = group_size, quant_dtype, activations

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> TernaryLinear:
        """A module over the parameters of a linear layer, which it shares; options as above."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta", **options)
        module.weight, module.bias = linear.weight, linear.bias
        return module.train(linear.training)

    def quantized_weight(self) -> Tensor:
        """W' [out_features, in_features], whose gradient goes to `weight` as it is."""
        return WeightQuant.apply(self.weight, self.group_size, self.quant_dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = ActivationQuant.apply(x) if self.activations == "int8" else x
        return nn.functional.linear(x, self.quantized_weight(), self.bias)

    @torch.no_grad()
    def pack(self) -> PackedMatrix:
        """The weight in format "trit", its scales in float32; unpacked it is `quantized_weight`, bit for bit.

        Raises ValueError for weights that are not finite.
        """
        weight = self.weight.detach()
        require_finite(weight, "weight")
        trits, scales = weight_quant(weight, self.group_size, self.quant_dtype)
        group_size = -1 if self.group_size is None else self.group_size
        codes = (trits + 1).to(torch.uint8)
        return PackedMatrix.from_codes(codes, scales.float(), format="trit", group_size=group_size)

    def to_linear(self) -> Linear:
        """The packed layer in its place: the same bias, the same mode of activations."""
        return Linear.from_packed(self.pack(), self.bias, self.activations).train(self.training)

    def extra_repr(self) -> str:
        group_size = "matrix" if self.group_size is None else self.group_size
        return f"{super().extra_repr()}, group_size={group_size}, activations={self.activations}"
