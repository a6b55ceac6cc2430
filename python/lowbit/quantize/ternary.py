"""How ternary a matrix is: what decides that it is packed exactly, and what is reported of one that is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.ternary import weight_quant


@dataclass(frozen=True)
class TernaryState:
    """How far a matrix is from {-s, 0, s}.

    values: distinct values; zeros: the share of zeros that rounding by mean|w| gives; relative_error: of that rounding,
    |rounded - w| / |w| (Frobenius). A matrix whose nonzero |w| are all one number, or with none, is ternary: zeros is
    then the share it has, and the error 0.
    """

    is_ternary: bool
    values: int
    zeros: float
    relative_error: float

    def __str__(self) -> str:
        if self.is_ternary:
            return f"ternary, {self.zeros:.0%} zeros"
        return (
            f"{self.values:,} values, {self.zeros:.0%} zeros and relative error {self.relative_error:.2f} by the mean"
        )


def is_ternary(weight: Tensor) -> bool:
    """Whether the nonzero |w| of weight [rows, cols], any floating dtype, are all one finite number, or there are none.

    Cheap for a matrix that is not: its first row tells.
    """
    for part in (weight[:1], weight):
        magnitudes = part.detach().abs()
        largest = magnitudes.max()
        if not torch.isfinite(largest) or not bool(((magnitudes == largest) | (magnitudes == 0)).all()):
            return False
    return True


def ternary_state(weight: Tensor) -> TernaryState:
    """The state of weight [rows, cols], any floating dtype. Weights that are not finite make it not ternary."""
    weight = weight.detach()
    values = _distinct_values(weight)
    magnitudes = weight.float().abs()
    if is_ternary(weight):
        return TernaryState(True, values, float((magnitudes == 0).double().mean()), 0.0)
    if not torch.isfinite(magnitudes.max()):
        return TernaryState(False, values, 0.0, torch.nan)
    trits, scale = weight_quant(weight.float())
    error = (trits * scale - weight.float()).norm() / magnitudes.norm()
    return TernaryState(False, values, float((trits == 0).double().mean()), float(error))


def _distinct_values(weight: Tensor) -> int:
    """How many numbers a matrix holds; 16-bit ones are counted, which is far quicker than sorting."""
    if weight.element_size() != 2:
        return int(weight.unique().numel())
    bits = weight.contiguous().view(torch.int16).flatten().int() + (1 << 15)
    seen = torch.bincount(bits, minlength=1 << 16) > 0
    return int(seen.sum()) - int(seen[0] and seen[1 << 15])  # 0 and -0 are one number
