"""Decoder layers of Transformers in few calls.

Between the products of a packed layer torch runs some seventy small operators, on caches that the weights have just
gone through: a quarter of a token's time. Here one token of a layer of a known family is a norm, a group of products,
rotation and attention in one call over a cache that grows in place, a product, a norm, a group, the gate, a product.
All round where Transformers' modules round, so results differ from theirs by the order of fp32 sums.

Modules stay what and where they are. A layer gets a `forward` of its own that goes this way when nobody can tell:
inference on the CPU in one dtype, a token at a time, no mask, Transformers' own growing cache, linears and norms that
are plain and without hooks. In all other cases it is its class's. Families are named, since a layer that computes
something else may look the same; and each is tried against its class before it is used, so that a release of
Transformers that changes what a layer computes is noticed, said once, and left alone.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lowbit import abi
from lowbit.integrations.cache_room import CacheRoom
from lowbit.nn import Linear

_FAMILIES = ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral")
_FAMILIES += ("qwen2.modeling_qwen2.Qwen2", "qwen3.modeling_qwen3.Qwen3")
_LAYERS = frozenset(f"transformers.models.{family}DecoderLayer" for family in _FAMILIES)
_SAID_ELSEWHERE = frozenset({"position_ids", "use_cache", "cache_position"})  # by the angles and the cache
# Of what a layer adds, in the trial: twice what the order of sums and the rounding of int8 activations make of bf16.
_TOLERANCE = 0.05


def fuse(model: nn.Module, enabled: bool = True) -> int:
    """Lets the decoder layers of known families decode in few calls, or (enabled=False) as Transformers has it; returns
    how many layers there are.

    Done to every model that is packed; call it for layers that came later, or to switch it off. A layer whose `forward`
    somebody replaced stays as it is.
    """
    trials: dict[type, _Trial] = {}
    count = 0
    for layer in model.modules():
        if f"{type(layer).__module__}.{type(layer).__qualname__}" not in _LAYERS:
            continue
        own = layer.__dict__.get("forward")
        if own is None and enabled:
            own = layer.forward = FusedLayer(layer, trials.setdefault(type(layer), _Trial()))
        elif isinstance(own, FusedLayer) and not enabled:
            del layer.forward
        count += isinstance(own, FusedLayer)
    return count


class _Trial:
    """Whether the layers of a class gave the same both ways when the first of them was asked; None before."""

    agrees: bool | None = None


class FusedLayer:
    """The forward of a decoder layer: in few calls where nobody can tell, else its class's."""

    def __init__(self, layer: nn.Module, trial: _Trial):
        self.layer, self.trial = layer, trial

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not args and self.trial.agrees is not False and _is_one_token(hidden_states):
            step = self._step(hidden_states, kwargs)
            if step is not None:
                if self.trial.agrees is None:
                    self.trial.agrees = _agrees(self.layer, step[0], hidden_states)
                if self.trial.agrees:
                    return _decode(hidden_states, *step)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)

    def _step(self, x: Tensor, kwargs: dict) -> tuple | None:
        """What `_decode` needs beside x, or None where the layer's class has to be asked."""
        cache = angles = None
        for name, value in kwargs.items():
            if name == "past_key_values":
                cache = value
            elif name == "position_embeddings":
                angles = value
            elif value is not None and name not in _SAID_ELSEWHERE:
                return None  # an attention_mask above all: without one, every place that was before is seen
        parts = _Parts.of(self.layer, x)
        if parts is None or cache is None or angles is None:
            return None
        size = parts.head_size
        if any(a.dtype != x.dtype or a.shape[1:] != (1, size) or not a.is_contiguous() for a in angles):
            return None  # angles of a part of each head
        room = CacheRoom.of(cache, parts.index, x, parts.linears[1].out_features // size, size)
        return None if room is None else (parts, room, cache, angles)


def _is_one_token(x: Tensor) -> bool:
    """Whether x is a token of each sequence that is computed as it stands: nothing watches, no gradient, no cast."""
    if x.ndim != 3 or x.shape[1] != 1 or not x.is_cpu or x.dtype not in abi.FLOAT_DTYPES or torch.is_grad_enabled():
        return False
    return abi.runs_eagerly(x) and not torch.is_autocast_enabled("cpu") and not torch_module._has_any_global_hook()


def _decode(x: Tensor, parts: _Parts, room: CacheRoom, cache, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [sequences, 1, hidden] -> the layer's output; the cache is one place longer."""
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = parts.linears
    normed, _ = abi.rms_norm(x, *parts.norms[0])
    q, k, v = _group((q_proj, k_proj, v_proj), normed)
    if len(parts.norms) > 2:
        heads = (-1, parts.head_size)
        q = abi.rms_norm(q.view(heads), *parts.norms[2])[0].view(q.shape)
        k = abi.rms_norm(k.view(heads), *parts.norms[3])[0].view(k.shape)
    y = abi.decode_attention(q, k, v, angles, room.keys, room.values, room.filled, parts.scale)
    room.append(cache, parts.index)
    normed, x = abi.rms_norm(_product(o_proj, y), *parts.norms[1], residual=x)
    gate, up = _group((gate_proj, up_proj), normed)
    return _product(down_proj, abi.silu_mul(gate, up)).add_(x)


def _product(linear: Linear, x: Tensor) -> Tensor:
    return abi.matmul(linear.packed._view, x, linear._parameters["bias"], linear.activations)


def _group(linears: tuple[Linear, ...], x: Tensor) -> list[Tensor]:
    views, biases = [m.packed._view for m in linears], [m._parameters["bias"] for m in linears]
    return abi.matmul_group(views, x, biases, linears[0].activations)


class _Parts:
    """What `_decode` takes from a layer: linears (q, k, v, o, gate, up, down), norms as (weight, eps): of the layer's
    input, of its attention's output and, in Qwen3, of queries and keys."""

    __slots__ = ("head_size", "index", "linears", "norms", "scale")

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor) -> _Parts | None:
        """Of a layer as it is now; None if a part is not what the family makes it: a linear of another class (an
        adapter's) or not packed, a hook, a forward of its own, a norm in another dtype."""
        try:
            children = layer._modules
            attention, mlp = children["self_attn"], children["mlp"]
            inner, outer = attention._modules, mlp._modules
            norms = [children["input_layernorm"], children["post_attention_layernorm"]]
            norms += [inner["q_norm"], inner["k_norm"]] if "q_norm" in inner else []
            activation, parts = outer["act_fn"], cls()
            q, k, v, o = (inner[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
            gate, up, down = (outer[name] for name in ("gate_proj", "up_proj", "down_proj"))
            parts.linears = linears = (q, k, v, o, gate, up, down)
            parts.index, parts.head_size, parts.scale = (
                attention.layer_idx,
                attention.head_dim,
                float(attention.scaling),
            )
            parts.norms = [(norm._parameters["weight"], norm.variance_epsilon) for norm in norms]
            plain = attention.config._attn_implementation == "sdpa"
        except (AttributeError, KeyError):
            return None
        if not plain or type(activation).__name__ not in ("SiLU", "SiLUActivation"):
            return None
        for module in (attention, mlp, activation, *linears, *norms):
            held = module.__dict__
            if held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held or held["training"]:
                return None
        for linear in linears:
            if type(linear) is not Linear or linear.layout is None or linear.rms_norm is not None:
                return None
        if not q.activations == k.activations == v.activations or gate.activations != up.activations:
            return None
        if parts.head_size % 16 or q.out_features % parts.head_size or k.out_features % parts.head_size:
            return None
        if any(weight.dtype != x.dtype or not weight.is_cpu for weight, _ in parts.norms):
            return None
        return parts


@torch.no_grad()
def _agrees(layer: nn.Module, parts: _Parts, like: Tensor) -> bool:
    """Whether a layer gives the same both ways, but for rounding, for a random token behind three others."""
    caches, random = sys.modules["transformers.cache_utils"], torch.Generator().manual_seed(0)
    size, dtype = parts.head_size, like.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    past = [normal(1, parts.linears[1].out_features // size, 3, size) for _ in range(2)]
    half = torch.rand(1, 1, size // 2, generator=random) * 6
    angle = torch.cat((half, half), -1)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype))
    x = normal(1, 1, like.shape[-1]) * 0.02  # small, so that what the layer adds is most of what comes out
    results = []
    try:
        for fused in (False, True):
            cache = caches.DynamicCache()
            cache.update(*past, parts.index)
            if fused:
                room = CacheRoom.of(cache, parts.index, x, past[0].shape[1], size)
                y = _decode(x, parts, room, cache, angles)
            else:
                arguments = {"attention_mask": None, "position_ids": torch.tensor([[3]]), "use_cache": True}
                y = type(layer).forward(layer, x, past_key_values=cache, position_embeddings=angles, **arguments)
            held = cache.layers[parts.index]
            results.append((y.float() - x.float(), held.keys.float(), held.values.float()))
        differences = [float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True)]
        if max(differences) < _TOLERANCE:
            return True
        reason = f"they differ by {max(differences):.2g} of what the layer adds"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"{type(layer).__name__}: this release of Transformers computes it otherwise than lowbit's fused layer "
        f"({reason}); decoding goes through Transformers' modules, as after lowbit.models.fuse(model, enabled=False)",
        stacklevel=2,
    )
    return False
