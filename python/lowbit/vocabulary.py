"""Resizing a model's vocabulary: rows appended to its embedding and head, packed or float, or cut off."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn

from lowbit import nn as lowbit_nn
from lowbit.matrix import PackedMatrix
from lowbit.models import is_table, weight_key
from lowbit.nn import PackedModule


@torch.no_grad()
def resize_vocabulary(
    model: nn.Module,
    size: int,
    new_rows: torch.Tensor | None = None,
    *,
    new_head_rows: torch.Tensor | None = None,
) -> None:
    """Gives the token embedding and the head of a model `size` rows, in place: cuts the last ones off, or appends some.

    Rows that stay keep their codes and scales bit for bit, packed or float. new_rows: the embedding's new rows, floats
    [size - rows, width], rounded as `PackedMatrix.resized` says; new_head_rows: those of a head that is not tied. None:
    the mean of the rows that are there, which is where Transformers begins too, less its noise of 1e-9 of their
    covariance. New entries of a head's bias are the mean of the others.
    A table that embedding and head share stays one, a tied parameter too. num_embeddings, out_features, vocab_size of
    the configurations and of modules that keep it follow; a padding index beyond `size` is dropped.
    Raises ValueError, before anything is changed: a model without a token embedding, a head or table of another kind,
    rows that do not fit; RuntimeError while a weight is unloaded.
    """
    embedding, head = _vocabulary(model)
    old = _rows_of(embedding)
    tied = head is not None and weight_key(head) == weight_key(embedding)
    if new_head_rows is not None and (head is None or tied):
        why = "there is no head" if head is None else "the head is tied"
        raise ValueError(f"new_head_rows: expected None, since {why}, got {list(new_head_rows.shape)}")
    if head is not None and _rows_of(head) != old:
        raise ValueError(f"head: expected {old} rows, as the token embedding has, got {_rows_of(head)}")
    size = int(size)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    tables = [("new_rows", embedding, new_rows)]
    if head is not None and not tied:
        tables.append(("new_head_rows", head, new_head_rows))
    changes = []
    for name, table, rows in tables:
        added = [max(size - old, 0), table.weight.shape[-1] if table.weight.is_floating_point() else table.layout.cols]
        if rows is not None and (list(rows.shape) != added or not rows.is_floating_point()):
            raise ValueError(f"{name}: expected floats {added}, got {rows.dtype} {list(rows.shape)}")
        key, weight = weight_key(table), _resized_weight(table, size, rows)
        holders = [m for m in model.modules() if _holds_weight(m) and weight_key(m) == key]
        for holder in holders:
            if not isinstance(holder, nn.Linear | lowbit_nn.Linear) and not is_table(holder):
                raise ValueError(f"{type(holder).__name__}: expected a linear layer or a table to hold the vocabulary")
        changes.append((holders, weight))
    biases = {}
    for holders, weight in changes:
        for holder in holders:
            bias = getattr(holder, "bias", None)
            if bias is not None and id(bias) not in biases:
                biases[id(bias)] = (bias, _resized_bias(bias, size))
            _exchange_rows(holder, weight, None if bias is None else biases[id(bias)][1])
    for module in model.modules():  # who else holds a head's bias
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in biases:
                setattr(module, name, biases[id(parameter)][1])
    for owner in _vocabulary_keepers(model):
        if getattr(owner, "vocab_size", None) == old:
            owner.vocab_size = size


def _vocabulary(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The token embedding and the head, packed or float: by the model's accessors, else the largest table and the last
    linear layer that has one output a row of it."""

    def told(name: str) -> nn.Module | None:
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            return None
        return module if isinstance(module, nn.Module) and hasattr(module, "weight") else None

    embedding, head = told("get_input_embeddings"), told("get_output_embeddings")
    if embedding is None:
        tables = [m for m in model.modules() if is_table(m)]
        embedding = max(tables, key=lambda m: m.num_embeddings * m.embedding_dim, default=None)
        if embedding is None:
            raise ValueError(f"{type(model).__name__}: expected a model with a token embedding, found none")
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        heads = [m for m in model.modules() if isinstance(m, nn.Linear | lowbit_nn.Linear)]
        head = next((m for m in reversed(heads) if (m.out_features, m.in_features) == shape), None)
    for name, module in (("token embedding", embedding), ("head", head)):
        if module is not None and not isinstance(module.weight, torch.Tensor):
            raise RuntimeError(f"{name}: expected a weight, found none in {type(module).__name__}: load(...) one first")
    return embedding, head


def _holds_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor)


def _rows_of(module: nn.Module) -> int:
    return module.weight.shape[0]


def _resized_weight(module: nn.Module, size: int, new_rows: torch.Tensor | None) -> PackedMatrix | nn.Parameter:
    packed = module.packed if isinstance(module, PackedModule) else None
    if packed is not None:
        stored = packed.repack(module.stored_format or packed.format)  # ternary rows stay ternary
        return stored.resized(size, new_rows).repack(packed.format)
    weight = module.weight
    added = max(size - len(weight), 0)
    if new_rows is None:
        new_rows = weight.float().mean(0).expand(added, -1)
    rows = torch.cat([weight.detach()[:size], new_rows.to(weight.device, weight.dtype)])
    return nn.Parameter(rows, requires_grad=weight.requires_grad)


def _resized_bias(bias: torch.Tensor, size: int) -> nn.Parameter:
    added = bias.float().mean().to(bias.dtype).expand(max(size - len(bias), 0))
    return nn.Parameter(torch.cat([bias.detach()[:size], added]), requires_grad=bias.requires_grad)


def _exchange_rows(module: nn.Module, weight: PackedMatrix | nn.Parameter, bias: nn.Parameter | None) -> None:
    if isinstance(module, lowbit_nn.Linear):
        module.resize(weight, bias)
    elif isinstance(module, lowbit_nn.Embedding):
        module.resize(weight)
    elif isinstance(module, nn.Linear):
        module.weight, module.out_features = weight, len(weight)
        if bias is not None:
            module.bias = bias
    else:
        module.weight, module.num_embeddings = weight, len(weight)
        if module.padding_idx is not None and module.padding_idx >= len(weight):
            module.padding_idx = None


def _vocabulary_keepers(model: nn.Module) -> Iterator[object]:
    """What may have a vocab_size: the modules and their configurations, those of the text model too."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        text = getattr(config, "get_text_config", None)
        for owner in (module, config, text() if callable(text) else None):
            if owner is not None and id(owner) not in seen:
                seen.add(id(owner))
                yield owner


class ResizeTokenEmbeddings:
    """A model's resize_token_embeddings, which Transformers calls, by way of `resize_vocabulary` where the embedding or
    the head is packed. Transformers' own knows float tables only: it would fail on a packed one, on a packed head after
    it has changed the embedding. Refers to the model weakly, so that it is gone when it is let go."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)

    def __call__(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        model = self._model()
        embedding, head = _vocabulary(model)
        if not isinstance(embedding, PackedModule) and not isinstance(head, PackedModule):
            return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not mean_resizing:
            raise NotImplementedError(
                "mean_resizing: expected True for packed weights, got False: "
                "lowbit.resize_vocabulary(model, size, new_rows) takes rows of any kind"
            )
        size = _rows_of(embedding) if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        resize_vocabulary(model, size)
        return embedding

    def __deepcopy__(self, memo: dict) -> ResizeTokenEmbeddings:
        model = self._model()
        return ResizeTokenEmbeddings(memo.get(id(model), model))

    def __reduce__(self) -> tuple:
        return ResizeTokenEmbeddings, (self._model(),)
