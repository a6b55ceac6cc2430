"""The token embedding and the head: one table for both, and what a change of it does to the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lowbit.evaluate import Totals
from lowbit.models import find_targets

MEASURED_TOKENS = 4096  # of the calibration windows; the mean over so many positions is steady to a few percent


def divergence(
    changed: Callable[[int], object], reference: Callable[[int], object], batches: Iterable[torch.Tensor]
) -> float | None:
    """KL divergence in nats of changed(batch number) from reference(batch number), outputs with logits [windows,
    tokens, vocabulary] of batches int64 [windows, tokens]: the mean over the first MEASURED_TOKENS positions. None: the
    model gives no logits."""
    total = Totals()
    for number, ids in enumerate(batches):
        if total.positions >= MEASURED_TOKENS:
            break
        found, wanted = (getattr(forward(number), "logits", None) for forward in (changed, reference))
        if found is None or found.shape[:2] != ids.shape:
            return None
        for window in zip(ids, found, wanted, strict=True):
            total.add(*window)
    return total.kl_divergence if total.positions else None


def share_head(
    model: nn.Module, forward: Callable[[int], object], batches: Iterable[torch.Tensor], bound: float
) -> float:
    """Ties the token embedding of a model to its head's table, in place, where that costs little. Returns the KL
    divergence from the model with a table for each (0 where they are one already). forward(batch number) runs it.

    ValueError, the model being as it was: no two such modules of one shape, or a divergence above `bound`.
    """
    targets = find_targets(model)
    embedding = next((t for t in targets if "embedding" in t.kinds), None)
    head = next((t for t in targets if "head" in t.kinds), None)
    if embedding is None or head is None:
        missing = "token embedding" if embedding is None else "head"
        raise ValueError(f"embed_from_head: expected an embedding and a head of plain types, found no {missing}")
    if embedding is head:
        return 0.0
    if embedding.shape != head.shape:
        raise ValueError(
            f"{embedding.name}: expected the shape of {head.name}, {list(head.shape)}, to share its table, "
            f"got {list(embedding.shape)}"
        )
    own, table = embedding.module.weight, head.module.weight

    def shared(number: int) -> object:
        embedding.module.weight = table
        try:
            return forward(number)
        finally:
            embedding.module.weight = own

    damage = divergence(shared, forward, batches)
    if damage is None or not damage <= bound:
        found = "a model without logits" if damage is None else f"{damage:.4g}"
        raise ValueError(
            f"{embedding.name}: KL divergence with the table of {head.name}: expected at most {bound:g}, got {found} "
            "(embed_bound: the most that is accepted)"
        )
    embedding.module.weight = table
    config = getattr(model, "config", None)
    for level in [] if config is None else [config, config.get_text_config()]:
        level.tie_word_embeddings = True
    return damage
