"""How a latent weight becomes ternary: the same in every forward pass of training and once, for good, in packing.

    s = 1 / clamp(mean|W|, 1e-5)      t = clamp(round_half_even(W * s), -1, 1)      W' = t / s

The mean is summed in float64 and rounded, so that it is the same number on every device and for every number of
threads (a float32 sum is not); all else is computed in the dtype of choice. A matrix whose nonzero |w| are all one
number is ternary already and keeps it: its mean would shrink it by the share of its zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

LEAST_MEAN = 1e-5


def weight_quant(
    weight: Tensor, group_size: int | None = None, dtype: torch.dtype | None = torch.float32
) -> tuple[Tensor, Tensor]:
    """(trits, scales) of a latent weight [rows, cols]; W' is their product.

    group_size: columns that share a scale, a divisor of cols; None: one scale for the matrix, as ternary models are
        trained.
    dtype: what it is computed in: float32 as in Hugging Face's BitNet; None: the weight's own, as in MatMulFreeLLM.

    trits [rows, cols] hold -1, 0 and 1, scales [1, 1] or [rows, groups] the factors 1 / s rounded to the weight's
    dtype, as W' is; both have that dtype. Scales of zeros are 1. Weights that are not finite give NaN.
    """
    rows, cols = weight.shape
    groups = weight.reshape(1, 1, -1) if group_size is None else weight.reshape(rows, -1, group_size)
    groups = groups.to(dtype or weight.dtype)
    sizes = groups.abs()
    inverse = 1.0 / sizes.mean(-1, keepdim=True, dtype=torch.float64).to(groups.dtype).clamp(min=LEAST_MEAN)
    largest = sizes.amax(-1, keepdim=True)
    is_ternary = ((sizes == largest) | (sizes == 0)).all(-1, keepdim=True)
    trits = torch.where(is_ternary, groups.sign(), (groups * inverse).round().clamp(-1, 1))
    scales = torch.where(is_ternary, torch.where(largest == 0, 1.0, largest), 1.0 / inverse)
    return trits.view(rows, cols).to(weight.dtype), scales.squeeze(-1).to(weight.dtype)


class WeightQuant(Function):
    """apply(weight, group_size, dtype) -> W' of `weight_quant` in the weight's dtype; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, weight: Tensor, group_size: int | None, dtype: torch.dtype | None) -> Tensor:
        trits, scales = weight_quant(weight, group_size, dtype)
        return (trits.view(*scales.shape, -1) * scales[..., None]).view(weight.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class ActivationQuant(Function):
    """apply(x) -> BitNet's 8-bit activations as floats of x's dtype; the gradient passes unchanged.

    x [..., cols]: with a = clamp(max|x|, 1e-5) of each token, round_half_even(x * (127 / a)) * (a / 127) in float32:
    the integers and the step that packed ternary matrices multiply by in mode "int8" (docs/numerics.md).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_MEAN)
        return ((wide * (127.0 / largest)).round().clamp(-128, 127) * (largest / 127.0)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
