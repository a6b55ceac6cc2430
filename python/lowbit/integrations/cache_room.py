"""Room to grow for a layer of Transformers' DynamicCache, which else copies all its keys and values for each token."""

from __future__ import annotations

import sys

from torch import Tensor

_LEAST_ROOM = 64  # places that a cache grows by, at least
_KEY = "_lowbit_room"  # where a cache's layer carries its room


class CacheRoom:
    """Keys and values [sequences, kv_heads, places, size] of which the first `filled` places are the cache's.

    The cache's layer holds views of just these, so that everyone else sees the tensors they know; what they do with
    them (concatenate, crop, reorder) gives other tensors, and then the layer gets a new room. So does whoever comes
    second to a place: caches that were one (a shallow copy, a crop) never write over each other.
    """

    def __init__(self, layer, keys: Tensor, values: Tensor):
        self.filled = keys.shape[2]
        self.kind = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype)
        self.places = self.filled + max(_LEAST_ROOM, self.filled // 4)
        self.keys, self.values = (_longer(tensor, self.places) for tensor in (keys, values))
        # As _C.DecoderStack takes it: keys, values, strides between sequences and between heads.
        self.addresses = (self.keys.data_ptr(), self.values.data_ptr(), *self.keys.stride()[:2])
        self._show(layer)

    @classmethod
    def of(cls, cache, index: int, like: Tensor, kv_heads: int, size: int) -> CacheRoom | None:
        """The room of layer `index` of a cache, with a free place; None unless it is a DynamicCache whose layer only
        appends, was filled before, and holds `kv_heads` heads of `size` for the sequences of `like`, in its dtype."""
        caches = sys.modules.get("transformers.cache_utils")
        if caches is None or type(cache) is not caches.DynamicCache or cache.offloading or index >= len(cache.layers):
            return None
        layer = cache.layers[index]
        if type(layer) is not caches.DynamicLayer or not layer.is_initialized:
            return None
        keys, values = layer.keys, layer.values
        room = layer.__dict__.get(_KEY)
        wanted = (like.shape[0], kv_heads, size, like.dtype)
        if room is not None and room.shown_keys is keys and room.shown_values is values and room.filled < room.places:
            return room if room.kind == wanted else None
        shape = keys.shape
        if len(shape) != 4 or (shape[0], shape[1], shape[3], keys.dtype) != wanted:
            return None
        if values.shape != shape or values.dtype != keys.dtype or not keys.is_cpu or not values.is_cpu:
            return None
        room = layer.__dict__[_KEY] = cls(layer, keys, values)
        return room

    def append(self, cache, index: int) -> None:
        """Counts the next place as filled and shows it to the cache."""
        self.filled += 1
        self._show(cache.layers[index])

    def _show(self, layer) -> None:
        layer.keys = self.shown_keys = self.keys.narrow(2, 0, self.filled)
        layer.values = self.shown_values = self.values.narrow(2, 0, self.filled)


def _longer(tensor: Tensor, places: int) -> Tensor:
    longer = tensor.new_empty((*tensor.shape[:2], places, tensor.shape[3]))
    longer[:, :, : tensor.shape[2]] = tensor
    return longer
