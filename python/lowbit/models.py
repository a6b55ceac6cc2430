"""Where a model's matrices are, how one is exchanged for a packed matrix, and how a vocabulary is resized.

Nothing here knows an architecture by name. A matrix is found by the type of its module (nn.Linear, the Conv1D of
GPT-2, nn.Embedding, nn.EmbeddingBag), the blocks by the structure of the module tree, the head and the token embedding
by the model's own accessors. Modules that share one weight (tied head and embedding, or one module under several
names) are one target and stay one matrix.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lowbit import nn as lowbit_nn
from lowbit.matrix import PackedMatrix
from lowbit.nn import PackedModule


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix [rows, cols] of a model, and every module that holds it.

    names: full module names, the first in module order being the one that reports use; kinds: of each name,
    "linear" (inside a block), "head", "embedding" (the token embedding, or a table tied to it) or "other";
    module: the one of the first name; obstacle: why this weight has to stay as it is, or None.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    module: nn.Module
    obstacle: str | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def kind(self) -> str:
        return self.kinds[0]

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = weight_matrix(self.module).shape
        return rows, cols

    @property
    def is_table(self) -> bool:
        """Whether rows of the matrix are looked up by id (it may be a head as well)."""
        return is_table(self.module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer that stores its weight as [in_features,
    out_features]."""
    # Only a model built by transformers can hold one, and then the class is already imported.
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_table(module: nn.Module) -> bool:
    """Whether a float module looks rows of its weight up by id: nn.Embedding, or nn.EmbeddingBag, which is none."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is of a type whose weight can become a packed matrix."""
    return isinstance(module, nn.Linear) or is_table(module) or is_conv1d(module)


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, Conv1D or embedding as [rows, cols] = [outputs or vocabulary, inputs or
    width]: a view, in the weight's dtype."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by full name, in module order; empty when it has none.

    A candidate is a ModuleList or Sequential of children that repeat few classes and each hold matrices
    deeper down. Of the outermost candidates the one with most weights is taken, with those of the same class
    of blocks; an encoder-decoder model gives all of them. So a vision tower beside a language model is no
    block list.
    """
    lists = {name: module for name, module in _outermost_block_lists(model, "")}
    if not lists:
        return {}
    largest = max(lists.values(), key=_matrix_weights)
    classes = {type(block) for block in largest}
    everything = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return {
        f"{name}.{index}" if name else index: block
        for name, blocks in lists.items()
        if everything or classes & {type(block) for block in blocks}
        for index, block in blocks.named_children()
    }


def find_targets(model: nn.Module) -> list[Target]:
    """Every weight matrix of a model in module order, with modules that share a weight as one target.

    In a model without blocks every linear layer that is not the head counts as inside one.
    """
    blocks = find_blocks(model)
    in_block = tuple(f"{name}." for name in blocks) if blocks else ("",)
    embedding, head = _embedding_and_head(model, in_block if blocks else ())
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    holders: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if has_matrix(module):
            holders.setdefault(_weight_key(module), []).append((name, module))

    targets = []
    for members in holders.values():
        # A table decides how the whole group is made, so it speaks for it wherever it stands.
        members.sort(key=lambda member: not is_table(member[1]))
        kinds = []
        for name, module in members:
            if module is embedding or (is_table(module) and any(m is head for _, m in members)):
                kinds.append("embedding")
            elif module is head:
                kinds.append("head")
            else:
                inside = name.startswith(in_block) and not is_table(module)
                kinds.append("linear" if inside else "other")
        obstacles = [_obstacle(name, module, keep) for name, module in members]
        if len({_forward_of(module) for _, module in members}) > 1:
            obstacles.append("modules that share its weight make different matrices of it")
        targets.append(
            Target(
                names=tuple(name for name, _ in members),
                kinds=tuple(kinds),
                module=members[0][1],
                obstacle=next((o for o in obstacles if o), None),
            )
        )
    return targets


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module in the place of the one with this full name. AttributeError: there is none."""
    model.get_submodule(name)
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent)._modules[attribute] = new


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`with replaced(model, {full name: module})`: those modules for a while, the model's own again afterwards."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        replace_module(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def patch(
    model: nn.Module, matrices: Mapping[str, PackedMatrix], *, activations: str | Mapping[str, str] = "float"
) -> None:
    """Replaces modules by lowbit.nn modules around packed matrices, in place.

    matrices: {full module name: PackedMatrix}. One PackedMatrix under several names is shared by all of them
    (a tied table). The new module keeps bias, padding index, the embedding's scale and training mode.
    activations: "float", "int8" or {name: either}.
    ValueError: a module that cannot hold a packed matrix, or one of another shape. AttributeError: no such
    module.
    """
    made: dict[int, nn.Module] = {}
    replacements: list[tuple[str, nn.Module]] = []
    for name, packed in matrices.items():
        old = model.get_submodule(name)
        if id(old) not in made:  # one module under two names stays one module
            mode = activations if isinstance(activations, str) else activations.get(name, "float")
            made[id(old)] = _packed_module(name, old, packed, mode)
        replacements.append((name, made[id(old)]))
    for name, new in replacements:
        replace_module(model, name, new)
    if hasattr(type(model), "resize_token_embeddings"):
        model.resize_token_embeddings = _ResizeTokenEmbeddings(model)


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
    tied = head is not None and _weight_key(head) == _weight_key(embedding)
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
        key, weight = _weight_key(table), _resized_weight(table, size, rows)
        holders = [m for m in model.modules() if _holds_weight(m) and _weight_key(m) == key]
        for holder in holders:
            if not isinstance(holder, nn.Linear | lowbit_nn.Linear | lowbit_nn.Embedding) and not is_table(holder):
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
        tables = [m for m in model.modules() if is_table(m) or isinstance(m, lowbit_nn.Embedding)]
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


class _ResizeTokenEmbeddings:
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
                "lowbit.models.resize_vocabulary(model, size, new_rows) takes rows of any kind"
            )
        size = _rows_of(embedding) if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        resize_vocabulary(model, size)
        return embedding

    def __deepcopy__(self, memo: dict) -> _ResizeTokenEmbeddings:
        model = self._model()
        return _ResizeTokenEmbeddings(memo.get(id(model), model))

    def __reduce__(self) -> tuple:
        return _ResizeTokenEmbeddings, (self._model(),)


def _packed_module(name: str, old: nn.Module, packed: PackedMatrix, activations: str) -> nn.Module:
    if not has_matrix(old):
        raise ValueError(f"{name}: expected a linear layer, Conv1D or embedding, got {type(old).__name__}")
    if tuple(packed.shape) != tuple(weight_matrix(old).shape):
        raise ValueError(
            f"{name}: expected a packed matrix of shape {tuple(weight_matrix(old).shape)}, got {packed.shape}"
        )
    if isinstance(old, nn.Embedding):
        new = lowbit_nn.Embedding.from_packed(
            packed, padding_idx=old.padding_idx, dtype=old.weight.dtype, embed_scale=_embed_scale(old)
        )
    elif isinstance(old, nn.EmbeddingBag):
        new = lowbit_nn.EmbeddingBag.from_packed(
            packed, old.mode, old.include_last_offset, old.padding_idx, dtype=old.weight.dtype
        )
    else:
        new = lowbit_nn.Linear.from_packed(packed, bias=old.bias, activations=activations)
    return new.train(old.training)


def _outermost_block_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.children())
    repeats = len({type(c) for c in children}) <= max(1, len(children) // 2)
    composite = bool(children) and all(not has_matrix(c) and _matrix_weights(c) for c in children)
    if isinstance(module, nn.ModuleList | nn.Sequential) and repeats and composite:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_block_lists(child, f"{name}.{child_name}" if name else child_name)


def _matrix_weights(module: nn.Module) -> int:
    """Weights of the linear layers below a module, packed or not: a block stays one when it has been quantized."""
    sizes = [weight_matrix(m).numel() for m in module.modules() if has_matrix(m) and not is_table(m)]
    packed = [m.in_features * m.out_features for m in module.modules() if isinstance(m, lowbit_nn.Linear)]
    return sum(sizes) + sum(packed)


def _embedding_and_head(model: nn.Module, in_block: tuple[str, ...]) -> tuple[nn.Module | None, nn.Module | None]:
    embedding, head = _accessor(model, "get_input_embeddings"), _accessor(model, "get_output_embeddings")
    if embedding is None:
        tables = [m for m in model.modules() if is_table(m)]
        embedding = max(tables, key=lambda m: m.weight.numel(), default=None)
    if head is None and is_table(embedding):
        # A head has one output a token of the vocabulary; the last such layer after the blocks is it.
        heads = [
            m
            for name, m in model.named_modules()
            if has_matrix(m)
            and not is_table(m)
            and not name.startswith(in_block or ("\0",))
            and weight_matrix(m).shape == embedding.weight.shape
        ]
        head = heads[-1] if heads else None
    return embedding, head


def _accessor(model: nn.Module, name: str) -> nn.Module | None:
    try:
        module = getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) and has_matrix(module) else None


def _weight_key(module: nn.Module) -> tuple:
    weight = module.weight
    return (
        weight.data_ptr() or id(weight),
        weight.device,
        tuple(weight.shape),
        weight.stride(),
        weight.dtype,
    )


def _obstacle(name: str, module: nn.Module, keep_in_fp32: tuple[str, ...]) -> str | None:
    """Why a weight must not be replaced, or None."""
    weight = module.weight
    if not weight.is_floating_point() or weight.itemsize == 1:
        return f"its weight is {weight.dtype}, not a float"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if weight.is_meta:
        return "its weight is on the meta device"
    if any(f".{kept}." in f".{name}." for kept in keep_in_fp32):
        return "the model keeps it in float32"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if is_table(module) and module.max_norm is not None:
        return "it renormalises its rows (max_norm)"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return 'it takes the maximum of a bag (mode "max")'
    if type(module) is not lowbit_nn.TernaryLinear and not _behaves_plainly(module):
        return f"{type(module).__name__} has a forward of its own"
    return None


def _forward_of(module: nn.Module) -> tuple:
    """What decides the matrix that a module makes of its weight: nothing, or a TernaryLinear's options."""
    if not isinstance(module, lowbit_nn.TernaryLinear):
        return ()
    return module.group_size, module.quant_dtype, module.activations


@torch.no_grad()
def _behaves_plainly(module: nn.Module) -> bool:
    """Whether a subclass computes what its base class does, up to rounding and the scale of a scaled
    embedding."""
    if type(module) in (nn.Linear, nn.Embedding, nn.EmbeddingBag) or is_conv1d(module):
        return True
    weight = module.weight.detach()
    if isinstance(module, nn.EmbeddingBag):
        probe = torch.arange(min(4, module.num_embeddings), device=weight.device)[None]
        expected = F.embedding_bag(probe, weight, mode=module.mode, padding_idx=module.padding_idx)
    elif isinstance(module, nn.Embedding):
        probe = torch.arange(min(4, module.num_embeddings), device=weight.device)[None]
        expected = F.embedding(probe, weight) * (_embed_scale(module) or 1.0)
    else:
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(1, 2, -1).to(weight.dtype)
        expected = F.linear(probe, weight, module.bias)
    try:
        result = module(probe)
    except Exception:  # whatever a stranger's forward raises, it is not the plain one
        return False
    if not isinstance(result, torch.Tensor) or result.shape != expected.shape:
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps * expected.abs().max()
    return bool((result - expected).abs().max() <= tolerance)


def _embed_scale(module: nn.Embedding) -> float | None:
    """The factor that scaled embeddings (Gemma, BART) apply to their rows, or None."""
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor):
        # A scale that is a tensor meets the rows in their dtype; a Python number multiplies them unrounded.
        return float(scale.to(module.weight.dtype)) if scale.numel() == 1 else None
    return None if scale is None else float(scale)
