"""A decoder layer of Transformers, a token at a time, in one call; many tokens in a few.

Between the products of a packed layer torch runs some seventy small operators, on caches that the weights have just
gone through: a quarter of a token's time. Here one token of a layer of a known family is one call
(lowbit_decode_layer), over a cache that grows in place. It rounds where Transformers' modules round, so results differ
from theirs by the order of fp32 sums. decoder_stack.py makes one call of all layers.

Many tokens, or one with a mask or another cache, go through the layer's own attention module; the norms, the gate and
the sums around it are a call each: up to 5% of a prompt's time.

Modules stay what and where they are. A layer gets a `forward` of its own that goes these ways when nobody can tell:
inference on the CPU in one dtype, linears and norms that are plain and without hooks, and for the one call a token at
a time, no mask, Transformers' own growing cache. In all other cases it is its class's. Families are named, since a
layer that computes something else may look the same; and each is tried against its class before it is used, so that a
release of Transformers that changes what a layer computes is noticed, said once, and left alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from lowbit import _C, abi
from lowbit import nn as lowbit_nn
from lowbit.integrations.cache_room import CacheRoom

_SAID_ELSEWHERE = frozenset({"position_ids", "use_cache", "cache_position"})  # by the angles and the cache
# Of what a layer adds, in the trial: several times what the order of sums and the rounding of int8 activations make of
# bf16 (.005 and .017).
_TOLERANCE = 0.05
_BY_MODULES: ContextVar[bool] = ContextVar("_BY_MODULES", default=False)


@contextmanager
def by_modules() -> Iterator[None]:
    """Meanwhile layers are computed by their modules: for calibration, which gives the same codes on every device only
    where the same operators make its inputs."""
    token = _BY_MODULES.set(True)
    try:
        yield
    finally:
        _BY_MODULES.reset(token)


class Family:
    """What the layers of one class in a model have in common.

    agrees: whether the first of them that was asked gave the same both ways; None before.
    last: the angles that a layer was given last, for which x, and what the call makes of them: all layers get the same.
    watched: (a thread, a list): what layers are given and give there is added (decoder_stack.py).
    """

    def __init__(self, agrees: bool | None = None):
        self.agrees = agrees
        self.watched: tuple[int, list] | None = None
        self.last: tuple = (None, None, None)

    def angle_arguments(self, angles: tuple[Tensor, Tensor], x: Tensor, size: int) -> tuple[int, int, int] | None:
        """(address of cos, of sin, stride) of what came as position_embeddings; None for angles of another kind."""
        key = (x.dtype, x.shape[0], size)
        last = self.last  # read once: another thread may decode as well
        if last[0] is not angles or last[1] != key:
            cos, sin = angles
            fits = cos.shape in ((x.shape[0], 1, size), (1, 1, size)) and cos.shape == sin.shape
            fits = fits and all(a.dtype == x.dtype and a.is_cpu and a.is_contiguous() for a in angles)
            stride = size if cos.shape[0] == x.shape[0] else 0
            last = self.last = (angles, key, (cos.data_ptr(), sin.data_ptr(), stride) if fits else None)
        return last[2]

    def __reduce__(self):
        return Family, (self.agrees,)


class FusedLayer:
    """The forward of a decoder layer: one call or a few where nobody can tell, else its class's."""

    def __init__(self, layer: nn.Module, family: Family):
        self.layer, self.family = layer, family
        self.parts: Parts | None = None

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        y = self._forward(hidden_states, args, kwargs)
        watched = self.family.watched
        if watched is not None and watched[0] == get_ident():
            watched[1].append((self.layer, hidden_states, kwargs, y))
        return y

    def _forward(self, hidden_states: Tensor, args: tuple, kwargs: dict) -> Tensor:
        family = self.family
        if not args and family.agrees is not False and is_plain(hidden_states):
            parts = self.parts
            if parts is None or not parts.hold(hidden_states):
                parts = self.parts = Parts.of(self.layer, hidden_states)
            if parts is not None:
                if family.agrees is None:
                    family.agrees = _agrees(self.layer, parts, hidden_states)
                if family.agrees:
                    step = self._step(parts, hidden_states, kwargs) if hidden_states.shape[1] == 1 else None
                    if step is not None:
                        return _decode(hidden_states, parts, *step)
                    return _around_attention(self.layer, parts, hidden_states, kwargs)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)

    def _step(self, parts: Parts, x: Tensor, kwargs: dict) -> tuple | None:
        """What `_decode` needs beside x and the parts, or None where the attention module has to be asked."""
        cache = angles = None
        for name, value in kwargs.items():
            if name == "past_key_values":
                cache = value
            elif name == "position_embeddings":
                angles = value
            elif value is not None and name not in _SAID_ELSEWHERE:
                return None  # an attention_mask above all: without one, every place that was before is seen
        if cache is None or type(angles) is not tuple or len(angles) != 2:
            return None
        arguments = self.family.angle_arguments(angles, x, parts.head_size)
        room = CacheRoom.of(cache, parts.index, x, parts.kv_heads, parts.head_size)
        return None if arguments is None or room is None else (arguments, room, cache)

    def __getstate__(self) -> dict:
        return {"layer": self.layer, "family": self.family, "parts": None}


def is_one_token(x: Tensor) -> bool:
    """Whether x is a token of each sequence that is computed as it stands."""
    return x.ndim == 3 and x.shape[1] == 1 and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Whether x [sequences, tokens, hidden] is computed as it stands: nothing watches, no gradient, no cast."""
    if x.ndim != 3 or not x.is_cpu or x.dtype not in abi.FLOAT_DTYPES or torch.is_grad_enabled():
        return False
    return x.is_contiguous() and abi.runs_eagerly(x) and not (torch.is_autocast_enabled("cpu") or _BY_MODULES.get())


def _decode(x: Tensor, parts: Parts, angles: tuple[int, int, int], room: CacheRoom, cache) -> Tensor:
    """x [sequences, 1, hidden] -> the layer's output; the cache is one place longer."""
    y = torch.empty_like(x)
    addresses = (x.data_ptr(), y.data_ptr(), room.filled, *angles, [room.addresses])
    parts.alone.decode(parts.dtype_number, x.shape[0], *addresses)
    room.append(cache, parts.index)
    return y


def _around_attention(layer: nn.Module, parts: Parts, x: Tensor, kwargs: dict) -> Tensor:
    """x [sequences, tokens, hidden] -> the layer's output, its attention by its own module, with what came for that."""
    kind, (sequences, tokens, size) = parts.dtype_number, x.shape
    rows = sequences * tokens
    (before, before_eps), (after, after_eps) = parts.norm_places[:2]
    normed = torch.empty_like(x)
    _C.rms_norm(x.data_ptr(), 0, before, before_eps, kind, rows, size, 0, normed.data_ptr())
    attended = layer.self_attn(hidden_states=normed, **{"attention_mask": None, **kwargs})[0].contiguous()
    if attended.shape != x.shape or attended.dtype != x.dtype:
        raise TypeError(f"{type(layer.self_attn).__name__}: expected {x.dtype} {x.shape}, got {attended.shape}")
    summed = torch.empty_like(x)
    addresses = (attended.data_ptr(), x.data_ptr(), after, after_eps, kind, rows, size)
    _C.rms_norm(*addresses, summed.data_ptr(), normed.data_ptr())
    gate, up = abi.matmul_group([m._view for m in parts.matrices[4:6]], normed, parts.biases[4:6], parts.modes[4])
    _C.silu_mul(gate.data_ptr(), up.data_ptr(), kind, rows, gate.shape[-1], gate.data_ptr())
    y = abi.matmul(parts.matrices[6]._view, gate, parts.biases[6], parts.modes[6])
    _C.rms_norm(y.data_ptr(), summed.data_ptr(), 0, 0.0, kind, rows, size, y.data_ptr(), 0)  # the sum alone
    return y


class Parts:
    """A layer as lowbit_decode_layer takes it: its linears and norms where they are plain, and how to tell that they
    still are. Looking at every module for every token would take longer than the call."""

    def __init__(self, layer: nn.Module, x: Tensor):
        """AttributeError, KeyError: a layer of another make. NotPlainError: one that a call must not pass over."""
        attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
        inner, outer = attention._modules, mlp._modules
        linears = [inner[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [outer[name] for name in ("gate_proj", "up_proj", "down_proj")]
        norms = [layer._modules["input_layernorm"], layer._modules["post_attention_layernorm"]]
        norms += [inner["q_norm"], inner["k_norm"]] if "q_norm" in inner else []
        activation = outer["act_fn"]
        # What has to be as it is now: `hold` compares.
        self.children = [(module._modules, list(module._modules.values())) for module in (layer, attention, mlp)]
        self.others = [module.__dict__ for module in (attention, mlp, activation, *norms)]
        self.config, self.dtype, self.hidden = attention.config, x.dtype, linears[0].in_features

        require(all(type(m) is lowbit_nn.Linear and m.layout is not None and m.rms_norm is None for m in linears))
        require(type(activation).__name__ in ("SiLU", "SiLUActivation"))
        require(not torch_module._has_any_global_hook())
        for held in (*self.others, *(linear.__dict__ for linear in linears)):
            require(not (held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held or held["training"]))
        q, k, v, _, gate, up, _ = (linear.activations for linear in linears)
        require(q == k == v and gate == up)
        self.index, self.scale, self.head_size = attention.layer_idx, float(attention.scaling), attention.head_dim
        self.kv_heads = linears[1].out_features // self.head_size
        require(self.head_size % 16 == 0 and linears[1].out_features % self.head_size == 0)
        self.dtype_number = abi.FLOAT_DTYPES[x.dtype]

        # Alive as long as their addresses are in use, whatever becomes of the modules.
        self.matrices = [linear.packed for linear in linears]  # checks the values of one that was never used
        self.version = (lowbit_nn.changes(), RemovableHandle.next_id)
        self.norms = [(norm._parameters, norm._parameters["weight"]) for norm in norms]
        norm_weights = [weight for _, weight in self.norms]
        self.biases = biases = [linear._parameters["bias"] for linear in linears]
        self.modes = [linear.activations for linear in linears]
        self.tensors = [t for t in (*norm_weights, *biases) if t is not None]
        self.storages = [t.detach() for t in self.tensors]  # those of a tensor whose .data is set go otherwise
        self.addresses = [t.data_ptr() for t in self.tensors]
        sizes = [self.hidden] * 2 + [self.head_size] * 2
        for weight, size in zip(norm_weights, sizes, strict=False):
            require(weight.dtype == x.dtype and weight.shape == (size,) and weight.is_cpu and weight.is_contiguous())
        require(all(b is None or (b.is_cpu and b.is_contiguous() and b.dtype in abi.FLOAT_DTYPES) for b in biases))
        views = [matrix._view for matrix in self.matrices]
        require(all(view.device < 0 for view in views) and self.hold(x))
        places = [(0, 0) if b is None else (b.data_ptr(), abi.FLOAT_DTYPES[b.dtype]) for b in biases]
        self.norm_places = [(w.data_ptr(), n.variance_epsilon) for w, n in zip(norm_weights, norms, strict=True)]
        modes = [abi.ACTIVATIONS[mode] for mode in self.modes]
        self.native = _C.DecoderLayer(views, places, modes, (self.norm_places + [(0, 0.0)] * 2)[:4])
        self.alone = _C.DecoderStack([self.native], [(self.head_size, self.scale)], (0, 0.0))

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor) -> Parts | None:
        """Of a layer as it is now; None if a part is not what the family makes it: a linear of another class (an
        adapter's) or not packed, a hook, a forward of its own, a norm in another dtype."""
        try:
            return cls(layer, x)
        except (AttributeError, KeyError, NotPlainError):
            return None

    def hold(self, x: Tensor) -> bool:
        """Whether the layer is what it was: no hook was added anywhere, no packed module changed, every other module is
        in its place with its own forward, tensors lie where they lay."""
        return (
            self.dtype is x.dtype
            and self.hidden == x.shape[2]
            and self.version == (lowbit_nn.changes(), RemovableHandle.next_id)
            and all(list(now.values()) == then for now, then in self.children)
            and not any("forward" in held for held in self.others)
            and all(now["weight"] is then for now, then in self.norms)
            and [t.data_ptr() for t in self.tensors] == self.addresses
            and self.config._attn_implementation == "sdpa"
        )


class NotPlainError(Exception):
    pass


def require(plain: bool) -> None:
    if not plain:
        raise NotPlainError


@torch.no_grad()
def _agrees(layer: nn.Module, parts: Parts, like: Tensor) -> bool:
    """Whether a layer gives the same both ways, but for rounding: for three random tokens and one behind them."""
    caches, random = sys.modules["transformers.cache_utils"], torch.Generator().manual_seed(0)
    size, dtype = parts.head_size, like.dtype
    half = torch.rand(1, 4, size // 2, generator=random) * 6
    angle = torch.cat((half, half), -1)
    turns = [(part.cos().to(dtype), part.sin().to(dtype)) for part in (angle[:, :3], angle[:, 3:])]
    tokens = (
        torch.randn(1, 4, like.shape[-1], generator=random) * 0.02
    )  # so that what the layer adds is most of the sum
    prompt, x = (part.to(dtype).contiguous() for part in (tokens[:, :3], tokens[:, 3:]))
    results = []
    try:
        for fused in (False, True):
            cache = caches.DynamicCache()
            common = {"attention_mask": None, "use_cache": True, "past_key_values": cache}
            first = {"position_ids": torch.arange(3)[None], "position_embeddings": turns[0], **common}
            then = {"position_ids": torch.tensor([[3]]), "position_embeddings": turns[1], **common}
            if fused:
                before = _around_attention(layer, parts, prompt, first)
                room = CacheRoom.of(cache, parts.index, x, parts.kv_heads, size)
                y = _decode(x, parts, Family().angle_arguments(turns[1], x, size), room, cache)
            else:
                before = type(layer).forward(layer, prompt, **first)
                y = type(layer).forward(layer, x, **then)
            held = cache.layers[parts.index]
            added = (before.float() - prompt.float(), y.float() - x.float())
            results.append((*added, held.keys.float(), held.values.float()))
        pairs = list(zip(*results, strict=True))
        if all((a - b).norm() <= _TOLERANCE * a.norm() for a, b in pairs):
            return True
        worst = max(float((a - b).norm() / a.norm()) for a, b in pairs)
        reason = f"they differ by {worst:.2g} of what the layer adds"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"{type(layer).__name__}: this release of Transformers computes it otherwise than lowbit's fused layer "
        f"({reason}); decoding goes through Transformers' modules, as after lowbit.models.fuse(model, enabled=False)",
        stacklevel=2,
    )
    return False
