"""Where a model's matrices are, how one is exchanged for a packed matrix, and how a vocabulary is resized.

Nothing here knows an architecture by name. A matrix is found by the type of its module (nn.Linear, the Conv1D of
GPT-2, nn.Embedding, nn.EmbeddingBag), the blocks by the structure of the module tree, the head and the token embedding
by the model's own accessors. Modules that share one weight (tied head and embedding, or one module under several
names) are one target and stay one matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lowbit import nn as lowbit_nn
from lowbit.integrations.decoder_stack import fuse
from lowbit.matrix import PackedMatrix


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


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is of a type whose weight can become a packed matrix; ours is one while it holds a float."""
    if isinstance(module, lowbit_nn.PackedModule):
        return module.layout is None and module.is_loaded
    return isinstance(module, nn.Linear) or is_table(module) or is_conv1d(module)


def is_table(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight by id."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag | lowbit_nn.Embedding)


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
            holders.setdefault(weight_key(module), []).append((name, module))

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
    settle_ties(model)
    if hasattr(type(model), "resize_token_embeddings"):
        from lowbit.vocabulary import ResizeTokenEmbeddings

        model.resize_token_embeddings = ResizeTokenEmbeddings(model)
    fuse(model)


def settle_ties(model: nn.Module) -> None:
    """Keeps Transformers' own tying, which shares parameters by name, true to what the modules of a model hold: a
    packed table is not its business, since ours share matrices; and where a head and an embedding that the
    configuration ties hold different weights, the configuration no longer says that they are tied."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    split = False
    for target, source in (expand(all_submodels=True) if expand else {}).items():
        first, second = (_held(model, name) for name in (target, source))
        if first is not None and second is not None and first.is_meta and second.is_meta:
            continue  # a model that is being loaded: they will be tied then
        shared = first is not None and second is not None and first.data_ptr() == second.data_ptr()
        if not shared or not first.is_floating_point():
            model.all_tied_weights_keys.pop(target, None)
        split |= not shared
    if split:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _held(model: nn.Module, name: str) -> torch.Tensor | None:
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def _packed_module(name: str, old: nn.Module, packed: PackedMatrix, activations: str) -> nn.Module:
    if not has_matrix(old):
        raise ValueError(f"{name}: expected a linear layer, Conv1D or embedding, got {type(old).__name__}")
    if tuple(packed.shape) != tuple(weight_matrix(old).shape):
        raise ValueError(
            f"{name}: expected a packed matrix of shape {tuple(weight_matrix(old).shape)}, got {packed.shape}"
        )
    return module_like(name, old, packed, activations)


def module_like(
    name: str, old: nn.Module, weight: PackedMatrix | torch.Tensor, activations: str | None = None
) -> lowbit_nn.Linear | lowbit_nn.Embedding:
    """A lowbit.nn module, called `name`, that does with a weight what `old` does with its own; activations: None for
    those of `old`, "float" where it has none."""
    rows, cols = weight.shape
    dtype = old.dtype if isinstance(old, lowbit_nn.Embedding) else old.weight.dtype
    if isinstance(old, nn.EmbeddingBag | lowbit_nn.EmbeddingBag):
        new = lowbit_nn.EmbeddingBag(rows, cols, old.mode, old.include_last_offset, old.padding_idx, dtype=dtype)
    elif is_table(old):
        new = lowbit_nn.Embedding(rows, cols, padding_idx=old.padding_idx, dtype=dtype, embed_scale=_embed_scale(old))
    else:
        activations = getattr(old, "activations", "float") if activations is None else activations
        new = lowbit_nn.Linear(cols, rows, bias=old.bias, activations=activations)
        new.rms_norm = getattr(old, "rms_norm", None)
    new.name = name
    new._put(weight)
    return new.train(old.training)


def adopt(model: nn.Module) -> None:
    """Makes the token embedding and the head of a model modules of lowbit.nn where they are plain ones, over the same
    parameters and with the same results, so that their weights can be unloaded and loaded as those of packed modules.
    """
    for target in find_targets(model):
        if target.obstacle is not None or not {"embedding", "head"} & set(target.kinds):
            continue
        for name, kind in zip(target.names, target.kinds, strict=True):
            module = model.get_submodule(name)
            if kind in ("embedding", "head") and type(module).__module__.startswith("torch.nn"):
                replace_module(model, name, module_like(name, module, module.weight))


def embedding_and_head(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of a model's token embedding and of its head, packed or not; None for what it lacks."""
    places = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found = []
    for accessor in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, accessor)()
        except (AttributeError, NotImplementedError):
            module = None
        known = isinstance(module, lowbit_nn.PackedModule) or (isinstance(module, nn.Module) and has_matrix(module))
        found.append(places.get(id(module)) if known else None)
    return found[0], found[1]


def set_weights(model: nn.Module, weights: Mapping[str, PackedMatrix | torch.Tensor]) -> None:
    """Gives modules of a model {full name: weight} other weights, [rows, cols] as those they have: by their own load()
    where they are of lowbit.nn, else by putting such a module in the place. What shared a table with one of them keeps
    it; if the configuration said that they are tied it no longer does, unless they hold one weight again.

    Raises ValueError or TypeError, naming the module, for a weight that does not fit, AttributeError for a module that
    does not exist; the model is then as it was.
    """
    made = {}
    for name, weight in weights.items():
        module = model.get_submodule(name)
        if not (isinstance(module, lowbit_nn.PackedModule) or has_matrix(module)) or is_conv1d(module):
            raise ValueError(f"{name}: expected a linear layer or an embedding, got {type(module).__name__}")
        made[name] = module_like(name, module, weight)
        rows, cols = module._shape if isinstance(module, lowbit_nn.PackedModule) else module.weight.shape
        if tuple(weight.shape) != (rows, cols):
            raise ValueError(f"{name}: weight: expected shape {[rows, cols]}, got {list(weight.shape)}")
    for name, new in made.items():
        old = model.get_submodule(name)
        if isinstance(old, lowbit_nn.PackedModule):
            old._put(weights[name])
        else:
            replace_module(model, name, new)
    settle_ties(model)


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
    packed = [m.in_features * m.out_features for m in module.modules() if isinstance(m, lowbit_nn.Linear) and m.layout]
    return sum(sizes) + sum(packed)


def _embedding_and_head(model: nn.Module, in_block: tuple[str, ...]) -> tuple[nn.Module | None, nn.Module | None]:
    embedding, head = _accessor(model, "get_input_embeddings"), _accessor(model, "get_output_embeddings")
    if embedding is None:
        tables = [m for m in model.modules() if is_table(m) and has_matrix(m)]
        embedding = max(tables, key=lambda m: m.weight.numel(), default=None)
    if head is None and embedding is not None and is_table(embedding):
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


def weight_key(module: nn.Module) -> tuple:
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
    if is_table(module) and getattr(module, "max_norm", None) is not None:
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
    plain = (nn.Linear, nn.Embedding, nn.EmbeddingBag, lowbit_nn.Linear, lowbit_nn.Embedding, lowbit_nn.EmbeddingBag)
    if type(module) in plain or is_conv1d(module):
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
