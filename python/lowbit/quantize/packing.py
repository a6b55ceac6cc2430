"""One weight matrix packed as its specification says, and how far it then is from what it was."""

from __future__ import annotations

import torch

from lowbit.matrix import PackedMatrix
from lowbit.quantize.gptq import Factor, Solution, prepare_factor, solve
from lowbit.quantize.recipe import ModuleSpec


def rounded(weight: torch.Tensor, spec: ModuleSpec) -> PackedMatrix:
    """The weight [rows, cols] rounded to nearest."""
    return PackedMatrix.from_float(
        weight,
        spec.format,
        spec.group_size_for(weight.shape[1]),
        symmetric=spec.symmetric,
        scale_dtype=getattr(torch, spec.scale_dtype),
        clip=spec.clip,
        per_tensor=spec.per_tensor,
    )


def solved(weight: torch.Tensor, spec: ModuleSpec, hessian: torch.Tensor, factors: dict[tuple, Factor]) -> Solution:
    """The weight [rows, cols] solved with its inputs' Hessian [cols, cols]. factors: those of this Hessian made so far,
    by the options that they depend on; a new one is added."""
    group_size = spec.group_size_for(weight.shape[1])
    options = (spec.damp, spec.order, group_size)
    if options not in factors:
        factors[options] = prepare_factor(hessian, damp=spec.damp, order=spec.order, group_size=group_size)
    return solve(
        weight,
        hessian,
        format=spec.format,
        group_size=group_size,
        symmetric=spec.symmetric,
        clip=spec.clip,
        order=spec.order,
        grids=spec.grids,
        damp=spec.damp,
        scale_dtype=getattr(torch, spec.scale_dtype),
        factor=factors[options],
    )


def finite(weight: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """A weight matrix [rows, cols] as the packers take it, and what had to be done to it: numbers that are
    infinite or none have no code nearest to them."""
    weight = weight.contiguous()
    bad = weight.numel() - int(weight.isfinite().sum())
    return (weight.nan_to_num(0.0, 0.0, 0.0), f"{bad} weights are not finite, taken as 0") if bad else (weight, None)


def relative_weight_error(weight: torch.Tensor, packed: PackedMatrix) -> float:
    """|packed - weight| / |weight| (Frobenius), some rows at a time."""
    difference = norm = 0.0
    rows = max(1, (1 << 22) // packed.cols)
    for begin in range(0, packed.rows, rows):
        part = slice(begin, min(begin + rows, packed.rows))
        exact = weight[part].double()
        difference += float((packed.unpack(rows=part) - exact).square().sum())
        norm += float(exact.square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0
