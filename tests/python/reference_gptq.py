"""GPTQ in torch, column by column, as readable as it can be: what the compiled solver is compared with.

The arithmetic follows Frantar et al. 2022 (arXiv 2210.17323) with lowbit's rules: a scale is rounded to its stored
dtype before it is used, a weight becomes an integer code, dynamic grids come from the weights as updated so far.
"""

from __future__ import annotations

import torch
from torch import Tensor


def find_grid(x: Tensor, bits: int, symmetric: bool, clip: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N] (float32) of the rows of x [N, group]."""
    low = x.amin(1).clamp(max=0)
    high = x.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = grid_of_range(low, high, bits, symmetric, scale_dtype)
    if not clip:
        return scale, zero
    best = torch.full_like(scale, float("inf"))
    for i in range(80):
        p = torch.tensor((100 - i) / 100, dtype=torch.float32)
        s, z = grid_of_range(p * low, p * high, bits, symmetric, scale_dtype)
        error = clipping_loss(x, s, z, bits)
        better = error < best
        scale, zero, best = (
            torch.where(better, s, scale),
            torch.where(better, z, zero),
            torch.minimum(error, best),
        )
    return scale, zero


def grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype):
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(max=torch.finfo(scale_dtype).max).to(scale_dtype).float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale).clamp(0, top)
    empty = scale == 0
    return torch.where(empty, 1.0, scale), torch.where(empty, 2.0 ** (bits - 1), zero)


def clipping_loss(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """sum |error|^2.4 of each row, in float64."""
    q = quantize(x, scale[:, None], zero[:, None], bits)
    return (scale[:, None] * (q - zero[:, None]) - x).double().abs().pow(2.4).sum(1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def gptq(
    weight: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    clip: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    static: tuple[Tensor, Tensor] | None = None,
    group_index: Tensor | None = None,
    block_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K], scales and zeros [N, G], loss [N], for columns already in solving order.

    factor: U, upper triangular, H^-1 = U^T U. static: scales and zeros given, indexed by group_index [K].
    """
    w = weight.clone()
    n, k = w.shape
    groups = -(-k // group_size)
    codes = torch.empty(n, k, dtype=torch.uint8)
    loss = torch.zeros(n, dtype=torch.float64)
    scales, zeros = static if static is not None else (torch.empty(n, groups), torch.empty(n, groups))
    for start in range(0, k, block_size):
        end = min(start + block_size, k)
        errors = torch.zeros(n, end - start)
        for i in range(start, end):
            if static is None and i % group_size == 0:
                last = min(i + group_size, k)
                group = w[:, i:last].clone()
                # Columns beyond the block have not seen this block's errors yet.
                if last > end:
                    group[:, end - i :] -= errors[:, : i - start] @ factor[start:i, end:last]
                s, z = find_grid(group, bits, symmetric, clip, scale_dtype)
                scales[:, i // group_size], zeros[:, i // group_size] = s, z
            g = i // group_size if group_index is None else int(group_index[i])
            s, z = scales[:, g], zeros[:, g]
            q = quantize(w[:, i], s, z, bits)
            e = (w[:, i] - s * (q - z)) / factor[i, i]
            w[:, i:end] -= e[:, None] * factor[i, i:end]
            codes[:, i] = q.to(torch.uint8)
            errors[:, i - start] = e
            loss += e.double() ** 2
        w[:, end:] -= errors @ factor[start:end, end:]
    return codes, scales, zeros, loss


def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """U by the textbook: Cholesky, inverse, Cholesky; H^-1 = U^T U."""
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)
