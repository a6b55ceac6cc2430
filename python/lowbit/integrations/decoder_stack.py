"""A token of all decoder layers of a model, and the norm after them, in one call.

With a call a layer (decoder.py) a token of a small model still spends a tenth of its time in Python: what a layer's
forward, its checks and its cache's views take is little, but the weights that pass between two layers drive all of it
out of the caches, so each costs many times what it costs in a row. Here it is done in a row, for all layers, and
lowbit_decode_layers is called once (LlamaModel's own loop, masks and decorators not at all).

As with the layers, nobody can tell: `forward` of a model of a known family goes this way where every layer would go its
own way, nothing watches in between, and nothing but the usual is asked for. And before it does, the class's forward is
watched for one token: which layers it calls with what, and what becomes of the last one's output.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from itertools import pairwise
from threading import Lock, get_ident

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit import _C, abi
from lowbit import nn as lowbit_nn
from lowbit.integrations.cache_room import CacheRoom
from lowbit.integrations.decoder import Family, FusedLayer, NotPlainError, is_one_token, require

_FAMILIES = ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral")
_FAMILIES += ("qwen2.modeling_qwen2.Qwen2", "qwen3.modeling_qwen3.Qwen3")
_LAYERS = frozenset(f"transformers.models.{family}DecoderLayer" for family in _FAMILIES)
_MODELS = frozenset(f"transformers.models.{family}Model" for family in _FAMILIES)
_UNWATCHED = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}  # of a configuration
_PLACES = 128  # of angles that are made at once


def fuse(model: nn.Module, enabled: bool = True) -> int:
    """Lets the decoder layers of known families decode in one call for all of them, or one each where only some can,
    and take prompts in a few calls each; or (enabled=False) all as Transformers has it. Returns how many there are.

    Done to every model that is packed; call it for layers that came later, or to switch it off. A layer or model whose
    `forward` somebody replaced stays as it is.
    """
    families: dict[type, Family] = {}
    count = 0
    for module in model.modules():
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        kind = FusedLayer if name in _LAYERS else FusedModel if name in _MODELS else None
        if kind is None:
            continue
        own = module.__dict__.get("forward")
        if own is None and enabled:
            own = module.forward = (
                FusedLayer(module, families.setdefault(type(module), Family()))
                if kind is FusedLayer
                else FusedModel(module)
            )
        elif isinstance(own, kind) and not enabled:
            del module.forward
        count += isinstance(own, FusedLayer)
    return count


class FusedModel:
    """The forward of a decoder model without its head: one call where nobody can tell, else its class's.

    agrees: whether the class's forward was seen to do what the call does; None before.
    """

    def __init__(self, model: nn.Module, agrees: bool | None = None):
        self.model, self.agrees = model, agrees
        self.theirs = type(model).forward
        self.stack: _Stack | None = None
        self.watching = Lock()
        self.__signature__ = inspect.signature(self.theirs.__get__(model))

    def __call__(self, *args, **kwargs):
        if type(self.model).forward is not self.theirs:  # somebody's own: it is watched anew
            self.theirs, self.agrees, self.stack = type(self.model).forward, None, None
        if not args and self.agrees is not False and not torch.is_grad_enabled():
            cache = self._asked_for(kwargs)
            stack = None if cache is None else self._stack()
            if stack is not None:
                return self._token(stack, cache, kwargs)
        return self.theirs(self.model, *args, **kwargs)

    def _asked_for(self, kwargs: dict):
        """The cache, if one token behind it and no more than usual is asked for; else None."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if embeds is None else embeds
        if type(given) is not Tensor or given.ndim < 2 or given.shape[1] != 1 or not abi.runs_eagerly(given):
            return None
        if ids is not None and embeds is not None:
            return None
        for name, value in kwargs.items():
            if value is not None and name not in _USUAL and value is not _UNWATCHED.get(name):
                return None
        config = self.model.config
        if any(getattr(config, name, value) is not value for name, value in _UNWATCHED.items()):
            return None
        uses = kwargs.get("use_cache")
        if not (config.use_cache if uses is None else uses) or getattr(config, "is_causal", None) is not None:
            return None
        caches, cache = sys.modules.get("transformers.cache_utils"), kwargs.get("past_key_values")
        return cache if caches is not None and type(cache) is caches.DynamicCache else None

    def _stack(self) -> _Stack | None:
        stack = self.stack  # another thread may decode as well
        if stack is None or not stack.hold():
            stack = self.stack = _Stack.of(self.model)
        return stack

    def _token(self, stack: _Stack, cache, kwargs: dict):
        """A token, its embedding looked up; by the class's forward if it still cannot be told how else."""
        x = kwargs.get("inputs_embeds")
        if x is None:
            x = self.model.embed_tokens(kwargs["input_ids"])
            kwargs = kwargs | {"input_ids": None, "inputs_embeds": x}
        past = cache.get_seq_length()
        place = _place(kwargs, past, x.shape[0])
        # Last, for a room that the class's forward would not use is a copy of the cache for nothing.
        rooms = stack.rooms(cache, past, x) if place is not None and is_one_token(x) else None
        if rooms is not None:
            angles = stack.angles(place, x)
            if self.agrees:
                return stack.decode(x, past, angles, rooms, cache)
            if self.watching.acquire(blocking=False):  # else another thread does
                try:
                    return self._watch(stack, angles, kwargs)
                finally:
                    self.watching.release()
        return self.theirs(self.model, **kwargs)

    def _watch(self, stack: _Stack, angles: tuple, kwargs: dict):
        """The class's forward, of which it is seen whether it calls the layers and the norm and nothing else."""
        seen: list[tuple] = []
        families = {id(fused.family): fused.family for fused in stack.fused}.values()
        for family in families:
            family.watched = (get_ident(), seen)
        try:
            result = self.theirs(self.model, **kwargs)
        finally:
            for family in families:
                family.watched = None
        self.agrees, reason = True, stack.differs(angles, kwargs, seen, result)
        if reason:
            self.agrees = False
            warnings.warn(
                f"{type(self.model).__name__}: this release of Transformers computes it otherwise than lowbit's fused "
                f"model ({reason}); decoding goes on layer by layer",
                stacklevel=4,
            )
        return result

    def __getstate__(self) -> dict:
        return {"model": self.model, "agrees": self.agrees}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["model"], state["agrees"])


# What a token's call may say; of these `_asked_for` and `_place` look at what matters.
_USUAL = frozenset(
    ("input_ids", "inputs_embeds", "past_key_values", "use_cache", "attention_mask", "position_ids", "cache_position")
)


def _place(kwargs: dict, past: int, sequences: int) -> int | None:
    """The place that the new token of every sequence stands at; None if they differ or some place is hidden."""
    mask, count, places = (kwargs.get(name) for name in ("attention_mask", "cache_position", "position_ids"))
    if mask is not None and (type(mask) is not Tensor or mask.shape != (sequences, past + 1) or not bool(mask.all())):
        return None
    if count is not None and (type(count) is not Tensor or count.tolist() != [past]):
        return None
    if places is None:
        return past
    if type(places) is not Tensor or places.ndim != 2 or places.shape[1] != 1 or places.is_floating_point():
        return None
    first, *others = places[:, 0].tolist()
    return first if first >= 0 and all(other == first for other in others) else None


class _Stack:
    """The layers and the last norm of a model as lowbit_decode_layers takes them, and how to tell that they still
    are."""

    def __init__(self, model: nn.Module):
        """AttributeError, KeyError: a model of another make. NotPlainError: one with a part that goes its own way."""
        layers, norm, self.rotary = (model._modules[name] for name in ("layers", "norm", "rotary_emb"))
        self.fused = [layer.__dict__["forward"] for layer in layers]
        require(len(layers) == model.config.num_hidden_layers > 0)
        require(all(type(fused) is FusedLayer and fused.parts is not None for fused in self.fused))
        self.parts = [fused.parts for fused in self.fused]
        for index, (layer, fused) in enumerate(zip(layers, self.fused, strict=True)):
            require(fused.layer is layer and bool(fused.family.agrees) and fused.parts.index == index)
        for module in (*layers, norm):  # the other parts were asked by the layers
            require(not module._forward_hooks and not module._forward_pre_hooks)
        weight, parts = norm._parameters["weight"], self.parts[0]
        require(type(norm) is type(layers[0].input_layernorm) and "forward" not in norm.__dict__)
        require(weight.dtype == parts.dtype and weight.shape == (parts.hidden,))
        require(weight.is_cpu and weight.is_contiguous())
        self.config = model.config
        self.children = [(m._modules, list(m._modules.values())) for m in (model, layers)]
        self.version = (lowbit_nn.changes(), RemovableHandle.next_id)
        self.norm, self.weight, self.storage = norm, weight, weight.detach()
        self.dtype_number = parts.dtype_number
        heads = [(parts.head_size, parts.scale) for parts in self.parts]
        last = (weight.data_ptr(), norm.variance_epsilon)
        self.native = _C.DecoderStack([parts.native for parts in self.parts], heads, last)
        self.table: _Angles | None = None

    @classmethod
    def of(cls, model: nn.Module) -> _Stack | None:
        """Of a model as it is now; None if a layer is not in one call."""
        try:
            return cls(model)
        except (AttributeError, KeyError, NotPlainError):
            return None

    def hold(self) -> bool:
        """Whether the model is what it was; the layers' parts are looked at with the token (`rooms`)."""
        norm = self.norm
        return (
            self.version == (lowbit_nn.changes(), RemovableHandle.next_id)
            and all(list(now.values()) == then for now, then in self.children)
            and norm._parameters["weight"] is self.weight
            and self.weight.data_ptr() == self.storage.data_ptr()
            and "forward" not in norm.__dict__
            and self.config.num_hidden_layers == len(self.parts)
        )

    def rooms(self, cache, past: int, x: Tensor) -> list[CacheRoom] | None:
        """Place `past` of every layer's cache; None if a layer changed, or the cache is another or uneven."""
        rooms = []
        for fused, parts in zip(self.fused, self.parts, strict=True):
            if fused.layer.__dict__.get("forward") is not fused or fused.parts is not parts or not parts.hold(x):
                self.version = None
                return None
            room = CacheRoom.of(cache, parts.index, x, parts.kv_heads, parts.head_size)
            if room is None or room.filled != past:
                return None
            rooms.append(room)
        return rooms

    def angles(self, place: int, x: Tensor) -> tuple:
        """(address of cos, of sin, (row, cos, sin) that they are of) for a place."""
        table = self.table
        if table is None or not table.hold(self.rotary, place, x):
            table = self.table = _Angles(self.rotary, place, x)
        return table.at(place)

    def decode(self, x: Tensor, past: int, angles: tuple, rooms: list[CacheRoom], cache):
        """The token: x [sequences, 1, hidden] -> BaseModelOutputWithPast; the cache is one place longer."""
        caches = [room.addresses for room in rooms]
        y = torch.empty_like(x)
        cos, sin, _alive = angles
        self.native.decode(self.dtype_number, x.shape[0], x.data_ptr(), y.data_ptr(), past, cos, sin, 0, caches)
        for parts, room in zip(self.parts, rooms, strict=True):
            room.append(cache, parts.index)
        outputs = sys.modules["transformers.modeling_outputs"]
        return outputs.BaseModelOutputWithPast(last_hidden_state=y, past_key_values=cache)

    def differs(self, angles: tuple, kwargs: dict, seen: list, result) -> str:
        """Why what the class's forward was seen to do is not what `decode` does; "" if it is."""
        outputs = sys.modules["transformers.modeling_outputs"]
        if [layer for layer, *_ in seen] != [fused.layer for fused in self.fused]:
            return "it does not call every layer once"
        x = kwargs["inputs_embeds"]
        if not torch.equal(seen[0][1], x):
            return "it changes the embedding"
        if any(after[1] is not before[3] for before, after in pairwise(seen)):
            return "it does something between two layers"
        cos, sin = (tensor[0, angles[2][0]] for tensor in angles[2][1:])
        for _, _, given, _ in seen:
            theirs = given.get("position_embeddings", (cos, sin))
            if not all(torch.equal(a.expand_as(b), b) for a, b in zip((cos, sin), theirs, strict=True)):
                return "it turns by other angles"
        names = {"last_hidden_state", "past_key_values"}
        if type(result) is not outputs.BaseModelOutputWithPast or set(result.keys()) != names:
            return "it returns something else"
        if result.past_key_values is not kwargs["past_key_values"]:
            return "it returns another cache"
        if not torch.equal(result.last_hidden_state, self.norm(seen[-1][3])):
            return "it does something after the norm"
        return ""


class _Angles:
    """What a rotary embedding gives for `_PLACES` places from one on, in a row: it takes as long for one."""

    def __init__(self, rotary: nn.Module, place: int, x: Tensor):
        # One that looks at the places that it is asked for gets one at a time; so does one that is watched.
        count = _PLACES if _is_static(rotary) else 1
        places = torch.arange(place, place + count).unsqueeze(0)
        self.cos, self.sin = (tensor.contiguous() for tensor in rotary(x[:1], position_ids=places))
        self.first, self.end = place, place + count if count > 1 else place
        self.width = self.cos.shape[-1] * self.cos.element_size()
        self.of = (x.dtype, _made_from(rotary), RemovableHandle.next_id)

    def hold(self, rotary: nn.Module, place: int, x: Tensor) -> bool:
        if not self.first <= place < self.end:
            return False
        return self.of == (x.dtype, _made_from(rotary), RemovableHandle.next_id) and "forward" not in rotary.__dict__

    def at(self, place: int) -> tuple:
        row = place - self.first
        at = row * self.width
        return self.cos.data_ptr() + at, self.sin.data_ptr() + at, (row, self.cos, self.sin)


def _is_static(rotary: nn.Module) -> bool:
    """Whether a place's angles depend on it alone, and nobody counts the calls."""
    kind = getattr(rotary, "rope_type", "dynamic")
    held = rotary.__dict__
    watched = held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held
    return kind in ("default", "linear", "llama3", "yarn") and not watched


def _made_from(rotary: nn.Module) -> tuple:
    """What tells that angles would be the same again."""
    frequencies = rotary._buffers.get("inv_freq")
    if frequencies is None:
        return (None,)
    version = None if frequencies.is_inference() else frequencies._version
    return frequencies.data_ptr(), version, getattr(rotary, "attention_scaling", None)
