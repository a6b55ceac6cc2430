"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes for one layer that keep its outputs, given its inputs' Hessian.

`prepare_factor` turns the Hessian into what the compiled solver needs, `solve` runs it and packs the result. Numeric
trouble never raises: damping is raised, then the diagonal, then weights are rounded to nearest, and `fallback` says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.abi import SCALE_DTYPES, format_bits, gptq_solve, lookup, normalise_group_size
from lowbit.matrix import PackedMatrix

ORDERS = ("none", "act", "gar")
GRIDS = ("updated", "static")
_MAX_DAMP = 1.0


@dataclass(frozen=True)
class Factor:
    """A Hessian, ready to solve with.

    upper: float32 [K, K], U upper triangular with H⁻¹ = UᵀU for the damped, permuted H; None: round to nearest.
    perm: int64 [K], column j of the solver is column perm[j] of the weight; None: the identity.
    group_order: int64 [G], GAR only: group j of the solver is group group_order[j] of the weight.
    dead: bool [K], columns whose inputs were always zero (original order).
    order, group_size: what perm was made for.
    damp: the damping used, a share of the mean diagonal.
    fallback: None, or what had to be done instead of the method asked for, and why.
    """

    upper: Tensor | None
    perm: Tensor | None
    group_order: Tensor | None
    dead: Tensor
    order: str
    group_size: int
    damp: float
    fallback: str | None


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    packed: the matrix, original column order unless it has a perm.
    codes: uint8 [N, K], one a byte, in packed column order.
    scales: [N, G] in the scale dtype. zeros: uint8 [N, G], or None when symmetric.
    perm: int32 [K] or None, as PackedMatrix has it; g_idx: int32 [K], the group of every original column.
    loss: sum of squared weighted errors, tr(ΔW H ΔWᵀ) for the damped H.
    relative_error: sqrt(tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)) for the H given: the relative error of the layer's outputs. NaN when
        H is not finite, 0 when there is no error.
    damp, fallback: as in Factor. seconds: time taken, without a Factor that was given.
    """

    packed: PackedMatrix
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    g_idx: Tensor
    loss: float
    relative_error: float
    damp: float
    fallback: str | None
    seconds: float


def prepare_factor(hessian: Tensor, *, damp: float = 0.01, order: str = "none", group_size: int = -1) -> Factor:
    """Permutes, damps and factors a Hessian [K, K].

    damp: share of the mean diagonal added to the diagonal, at least 0. order: "none"; "act", columns by decreasing
    diagonal; "gar", columns by decreasing diagonal inside their groups and groups by their largest diagonal (a last
    group that is short stays last), which keeps every group of columns together and needs no permutation on disk.

    A factorization that fails is repeated in float64, then with ten times the damping up to 1, then with every diagonal
    element raised to the sum of its row's absolute values (diagonally dominant, so positive definite).
    A Hessian that is zero or not finite gives no factor. The factor is made where the Hessian is. Raises ValueError for
    a wrong shape, dtype, order or damp.
    """
    _check_hessian(hessian)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if not 0 <= damp < float("inf"):
        raise ValueError(f"damp: expected a finite number of at least 0, got {damp}")
    cols = len(hessian)
    group_size = normalise_group_size(cols if group_size > cols else group_size, cols)
    hessian = hessian.detach().to(torch.float32)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0

    def factor(upper, perm, group_order, used, fallback):
        return Factor(upper, perm, group_order, dead, order, group_size, used, fallback)

    # Without a Hessian no column is known to be dead, and rounding must not erase any.
    if not hessian.isfinite().all():
        dead = torch.zeros_like(dead)
        return factor(None, None, None, 0.0, "round to nearest: the Hessian is not finite")
    if dead.all():
        dead = torch.zeros_like(dead)
        return factor(None, None, None, 0.0, "round to nearest: the Hessian is zero")

    perm, group_order = _column_order(diagonal, order, group_size)
    h = hessian.clone() if perm is None else hessian[perm][:, perm]
    mean = diagonal[~dead].mean(dtype=torch.float64).item()
    if dead.any():
        alive = (~dead if perm is None else ~dead[perm]).float()
        h.mul_(alive[:, None]).mul_(alive[None, :])
        h.diagonal().add_(mean * (1 - alive))

    upper, used, fallback = _factor_with_fallbacks(h, mean, damp)
    return factor(upper, perm, group_order, used, fallback)


def solve(
    weight: Tensor,
    hessian: Tensor,
    *,
    format: str,
    group_size: int = -1,
    symmetric: bool = True,
    clip: bool = False,
    order: str = "none",
    grids: str = "updated",
    damp: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
    factor: Factor | None = None,
) -> Solution:
    """Quantizes weight [N, K] (any floating dtype) to `format` with hessian [K, K] (float32) by GPTQ.

    group_size: a multiple of 16; -1 or anything above K: one group a row.
    symmetric, clip, scale_dtype: the grids, as in PackedMatrix.from_float.
    grids: "updated", each group's grid from its weights with every correction so far, or "static", from the original
        weights.
    order, damp: see prepare_factor. Order "act" with updated grids needs a perm in the packed matrix.
    factor: prepare_factor's result for this very Hessian, order, group_size and damp, to be shared by layers with
        the same input.

    Weights of dead columns become zero. Everything happens, and the solution lies, where the weight is: on the CPU or
    on a GPU. Raises ValueError for wrong shapes, dtypes, names and non-finite weights.
    """
    begin = time.perf_counter()
    bits = format_bits(format)
    weight = _check_weight(weight)
    _check_hessian(hessian)
    rows, cols = weight.shape
    if len(hessian) != cols:
        raise ValueError(
            f"hessian: expected shape [{cols}, {cols}] for weight {[rows, cols]}, got {list(hessian.shape)}"
        )
    if grids not in GRIDS:
        raise ValueError(f"grids: expected one of {', '.join(GRIDS)}, got {grids!r}")
    group_size = normalise_group_size(cols if group_size > cols else group_size, cols)
    hessian = hessian.detach().to(weight.device)
    if factor is None:
        factor = prepare_factor(hessian, damp=damp, order=order, group_size=group_size)
    elif (factor.order, factor.group_size, len(factor.dead)) != (order, group_size, cols):
        raise ValueError(
            f"factor: expected one for order {order!r}, group_size {group_size} and {cols} columns, got "
            f"{factor.order!r}, {factor.group_size} and {len(factor.dead)}"
        )
    if factor.dead.device != weight.device:
        raise ValueError(f"factor: expected one on {weight.device}, where the weight is, got {factor.dead.device}")
    grid = _Grid(bits, group_size, symmetric, clip, scale_dtype)

    live = weight.masked_fill(factor.dead, 0) if factor.dead.any() else weight
    perm, fallback = factor.perm, factor.fallback
    if factor.upper is None:
        solved = grid.run(live, None)
    else:
        permuted = live if perm is None else live[:, perm]
        if grids == "static":
            fixed = grid.run(live, None)
            group_index = None if perm is None else (perm // group_size).to(torch.int32)
            solved = grid.run(permuted, factor.upper, fixed, group_index)
        else:
            solved = grid.run(permuted, factor.upper)
        if not solved.loss < float("inf"):
            fallback = "round to nearest: the solver's errors overflowed"
            solved, perm = grid.run(live, None), None
        elif perm is not None and (grids == "static" or order == "gar"):
            solved = _original_order(solved, perm, factor.group_order if grids == "updated" else None)
            perm = None

    g_idx = torch.arange(cols, device=weight.device)
    if perm is not None:
        g_idx = torch.empty_like(perm).scatter_(0, perm, g_idx)
        perm = perm.to(torch.int32)
    scales = solved.scales.to(scale_dtype)
    zeros = None if symmetric else solved.zeros
    packed = PackedMatrix.from_codes(solved.codes, scales, zeros, perm, format=format, group_size=group_size)
    return Solution(
        packed=packed,
        codes=solved.codes,
        scales=scales,
        zeros=zeros,
        perm=perm,
        g_idx=(g_idx // group_size).to(torch.int32),
        loss=solved.loss,
        relative_error=relative_output_error(weight, packed.unpack(), hessian),
        damp=factor.damp,
        fallback=fallback,
        seconds=time.perf_counter() - begin,
    )


def relative_output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """sqrt(tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)) for weight and quantized [N, K], hessian [K, K]; 0 without error, inf when only
    the quantized weights have an output."""
    hessian = hessian.detach().to(weight.device, torch.float32)
    error = output_energy(quantized.float() - weight.float(), hessian)
    energy = output_energy(weight.float(), hessian)
    if error == 0:
        return 0.0
    return float("inf") if energy == 0 else (error / energy) ** 0.5


def output_energy(w: Tensor, hessian: Tensor) -> float:
    """tr(w H wᵀ), at least 0; half of H's blocks suffice, because it is symmetric."""
    total, step = 0.0, 512
    for i in range(0, len(hessian), step):
        left = w[:, i : i + step]
        product = left @ hessian[i : i + step, i:]
        total += torch.linalg.vecdot(product[:, :step], left).sum(dtype=torch.float64).item()
        total += 2 * torch.linalg.vecdot(product[:, step:], w[:, i + step :]).sum(dtype=torch.float64).item()
    return max(total, 0.0) if total == total else total


@dataclass(frozen=True)
class _Solved:
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: float


@dataclass(frozen=True)
class _Grid:
    bits: int
    group_size: int
    symmetric: bool
    clip: bool
    scale_dtype: torch.dtype

    def run(
        self,
        weight: Tensor,
        upper: Tensor | None,
        fixed: _Solved | None = None,
        group_index: Tensor | None = None,
    ) -> _Solved:
        """The compiled solver on weight [N, K] float32 in solving order; without `upper` it rounds to nearest."""
        weight = weight.contiguous()
        rows, cols = weight.shape
        groups = -(-cols // self.group_size)
        new = partial(torch.empty, device=weight.device)
        codes = new(rows, cols, dtype=torch.uint8)
        scales = new(rows, groups) if fixed is None else fixed.scales.clone()
        zeros = new(rows, groups, dtype=torch.uint8) if fixed is None else fixed.zeros.clone()
        loss = new(rows, dtype=torch.float64)
        options = {
            "format": self.bits,
            "rows": rows,
            "cols": cols,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "clip": self.clip,
            "static_grids": fixed is not None,
            "scale_dtype": lookup(SCALE_DTYPES, self.scale_dtype, "scale_dtype"),
            "block_size": 0,
        }
        gptq_solve(
            options,
            {
                "weight": weight,
                "factor": upper,
                "group_index": group_index,
                "codes": codes,
                "scales": scales,
                "zeros": zeros,
                "loss": loss,
            },
        )
        return _Solved(codes, scales, zeros, loss.sum().item())


def _original_order(solved: _Solved, perm: Tensor, group_order: Tensor | None) -> _Solved:
    """Columns (and groups, where they were moved as wholes) back where they were in the weight."""
    codes = torch.empty_like(solved.codes)
    codes[:, perm] = solved.codes
    if group_order is None:
        return _Solved(codes, solved.scales, solved.zeros, solved.loss)
    scales, zeros = torch.empty_like(solved.scales), torch.empty_like(solved.zeros)
    scales[:, group_order], zeros[:, group_order] = solved.scales, solved.zeros
    return _Solved(codes, scales, zeros, solved.loss)


def _column_order(diagonal: Tensor, order: str, group_size: int) -> tuple[Tensor | None, Tensor | None]:
    """perm [K] and, for GAR, the order of the groups."""
    if order == "none":
        return None, None
    if order == "act":
        return diagonal.argsort(descending=True, stable=True), None
    cols = len(diagonal)
    whole = cols // group_size  # groups that may move; a short one stays last, or those after it would start elsewhere
    inside = [
        begin + diagonal[begin : begin + group_size].argsort(descending=True, stable=True)
        for begin in range(0, cols, group_size)
    ]
    largest = diagonal[: whole * group_size].view(whole, group_size).amax(1)
    group_order = torch.cat(
        [largest.argsort(descending=True, stable=True), torch.arange(whole, len(inside), device=diagonal.device)]
    )
    return torch.cat([inside[int(g)] for g in group_order]), group_order


def _factor_with_fallbacks(h: Tensor, mean: float, damp: float) -> tuple[Tensor | None, float, str | None]:
    """U of the damped h (overwritten), the damping used, and what went wrong before."""
    diagonal = h.diagonal().clone()
    used = damp
    while True:
        h.diagonal().copy_(diagonal + used * mean)
        upper = inverse_factor(h)
        if upper is None and h.dtype == torch.float32:
            upper = inverse_factor(h.double())
        if upper is not None:
            raised = None if used == damp else f"damping raised to {used:g}: not positive definite with {damp:g}"
            return upper.float(), used, raised
        if used >= _MAX_DAMP:
            break
        used = min(max(10 * used, 1e-4), _MAX_DAMP)
    h.diagonal().zero_()
    dominant = h.abs().sum(1)
    h.diagonal().copy_(torch.maximum(diagonal, dominant) + damp * mean)
    upper = inverse_factor(h)
    reason = f"not positive definite with damping {used:g}"
    if upper is None:
        return None, 0.0, f"round to nearest: {reason}"
    return upper, damp, f"diagonal raised to dominance: {reason}"


def inverse_factor(h: Tensor) -> Tensor | None:
    """U upper triangular with h⁻¹ = UᵀU, or None when h [K, K] is not positive definite in its dtype.

    With J reversing the columns, JhJ = LLᵀ gives h = (JLJ)(JLJ)ᵀ, JLJ upper triangular, so U = J L⁻¹ J: one Cholesky
    factorization and one triangular inverse, where the textbook takes Cholesky, inverse, Cholesky.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed.item() != 0:
        return None
    upper = _triangular_inverse(lower).flip(0, 1).contiguous()
    # A float32 factorization of a nearly singular matrix may succeed with a diagonal whose inverse overflows.
    return upper if upper.isfinite().all() and (upper.float().diagonal() > 0).all() else None


def _triangular_inverse(lower: Tensor, base: int = 256) -> Tensor:
    """The inverse of a lower triangular matrix by halves, [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹BA⁻¹, C⁻¹]]: matrix
    products all the way, a third of the time that solving against the identity takes."""
    inverse = torch.zeros_like(lower)

    def invert(begin: int, end: int) -> None:
        if end - begin <= base:
            block = lower[begin:end, begin:end]
            identity = torch.eye(end - begin, dtype=lower.dtype, device=lower.device)
            inverse[begin:end, begin:end] = torch.linalg.solve_triangular(block, identity, upper=False)
            return
        middle = begin + (end - begin) // 2
        invert(begin, middle)
        invert(middle, end)
        product = inverse[middle:end, middle:end] @ lower[middle:end, begin:middle]
        inverse[middle:end, begin:middle] = -(product @ inverse[begin:middle, begin:middle])

    invert(0, len(lower))
    return inverse


def _check_weight(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K] with N and K at least 1, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating dtype, got {weight.dtype}")
    weight = weight.detach().to(torch.float32)
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"weight[{row}, {column}]: expected a finite number, got {weight[row, column].item()}")
    return weight


def _check_hessian(hessian: Tensor) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or len(hessian) == 0:
        raise ValueError(f"hessian: expected shape [K, K] with K at least 1, got {list(hessian.shape)}")
    if not hessian.is_floating_point():
        raise ValueError(f"hessian: expected a floating dtype, got {hessian.dtype}")
