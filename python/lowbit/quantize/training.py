"""Ternary training: the linear layers of a model become `lowbit.nn.TernaryLinear`, over the parameters they have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowbit.models import replace_module
from lowbit.nn import TernaryLinear
from lowbit.quantize.plan import make_plan
from lowbit.quantize.recipe import Recipe


def prepare_ternary_training(
    model: nn.Module,
    modules: Iterable[str] | None = None,
    *,
    skip: Iterable[str] = (),
    group_size: int | None = None,
    quant_dtype: torch.dtype | None = torch.float32,
    activations: str = "float",
) -> list[str]:
    """Lets a model be trained, or fine-tuned, with ternary weights; in place. Returns the names of what it replaced.

    modules: patterns of the linear layers meant ("mlp", "down_proj", a regular expression: the left side of a recipe's
        rule, see `parse_rule`); None: those of the blocks
    skip: patterns of layers that stay as they are, in any case
    group_size, quant_dtype, activations: of every TernaryLinear

    Parameters stay the objects that they are, under their names: optimizers, ties between layers and the files that
    save_pretrained writes (the latent weights, in an ordinary folder) are those of the model as it was. To pack it,
    give the model to `lowbit.quantize`, which packs such modules as their forward pass has them, or its folder to
    `lowbit ternarize --method absmean`, which does the same for one scale a matrix, computed in float32.

    Raises ValueError, before anything is changed: a pattern that matches no matrix, a module that is no nn.Linear (an
    embedding or what is tied to it, GPT-2's Conv1D), or nothing to train.
    """
    rules = [*(f"{pattern}=skip" for pattern in skip), *(f"{pattern}=trit" for pattern in modules or ())]
    bits = "trit" if modules is None else 16
    recipe = Recipe(bits=bits, head_bits=16, group_size=-1, per_tensor=True, method="rtn", rules=rules)
    made: dict[nn.Module, TernaryLinear] = {}
    replacements = {}
    for planned in make_plan(model, recipe).quantized:
        for name in planned.names:
            old = model.get_submodule(name)
            if not isinstance(old, nn.Linear):
                raise ValueError(f"{name}: expected an nn.Linear to train, got {type(old).__name__}")
            if old not in made:  # one module under two names stays one module
                options = {"group_size": group_size, "quant_dtype": quant_dtype, "activations": activations}
                made[old] = TernaryLinear.from_linear(old, **options)
            replacements[name] = made[old]
    if not replacements:
        raise ValueError("modules: expected linear layers to train, found none")
    for name, new in replacements.items():
        replace_module(model, name, new)
    return list(replacements)
