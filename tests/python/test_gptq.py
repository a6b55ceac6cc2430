"""Preparing a factor, solving a layer, and what happens when the numbers are bad."""

import pytest
import torch
from reference_gptq import gptq as reference
from reference_gptq import inverse_factor as textbook_factor

from lowbit import PackedMatrix
from lowbit.quantize.gptq import inverse_factor, prepare_factor, relative_output_error, solve

FORMATS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}


def inputs(tokens, cols, seed=0):
    """Correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.3 * torch.eye(cols) + cols**-0.5 * torch.randn(cols, cols, generator=generator)
    sizes = torch.exp(0.7 * torch.randn(cols, generator=generator))
    return (torch.randn(tokens, cols, generator=generator) @ mix) * sizes


def layer(rows, cols, seed=0):
    x = inputs(3 * cols + 20, cols, seed)
    weight = 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.T @ x / len(x), x


def dequantize(solution):
    """scales * (codes - zeros) in original column order, from the solution's plain tensors."""
    bits = FORMATS[solution.packed.format]
    zeros = torch.full_like(solution.codes, 2 ** (bits - 1)) if solution.zeros is None else None
    order = torch.arange(solution.codes.shape[1]) if solution.perm is None else solution.perm.long()
    g_idx = solution.g_idx.long()[order]
    zeros = zeros if zeros is not None else solution.zeros[:, g_idx]
    packed_order = solution.scales.float()[:, g_idx] * (solution.codes.float() - zeros.float())
    out = torch.empty_like(packed_order)
    out[:, order] = packed_order
    return out


# -- the factor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 2, 17, 255, 256, 257, 600])
def test_factor_is_that_of_the_textbook(cols):
    hessian = layer(1, cols)[1].double() + 0.01 * torch.eye(cols)
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper, textbook_factor(hessian, damp=0.0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(upper.T @ upper @ hessian, torch.eye(cols).double(), rtol=0, atol=1e-9)


def test_factor_of_an_indefinite_matrix_is_none():
    assert inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None
    assert inverse_factor(torch.zeros(3, 3)) is None


def test_damping_is_a_share_of_the_mean_diagonal():
    hessian = layer(1, 40)[1]
    factor = prepare_factor(hessian, damp=0.05)
    expected = textbook_factor(hessian.double(), damp=0.05).float()
    torch.testing.assert_close(factor.upper, expected, rtol=1e-3, atol=1e-5)
    assert factor.damp == 0.05 and factor.fallback is None and factor.perm is None


def test_act_order_sorts_by_the_diagonal():
    hessian = torch.diag(torch.tensor([1.0, 5, 3, 5]))
    assert prepare_factor(hessian, order="act").perm.tolist() == [1, 3, 2, 0]


def test_group_aware_order_keeps_groups_together():
    diagonal = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 0.1
    factor = prepare_factor(torch.diag(diagonal), order="gar", group_size=32)
    perm, groups = factor.perm, factor.group_order
    assert groups[-1] == 3  # the short one
    largest = [diagonal[32 * g : 32 * g + 32].max().item() for g in groups[:-1].tolist()]
    assert largest == sorted(largest, reverse=True)
    for i, g in enumerate(groups.tolist()):
        members = perm[32 * i : 32 * i + 32]
        assert (members // 32 == g).all()
        assert (diagonal[members].diff() <= 0).all()
    assert perm.sort().values.tolist() == list(range(100))


def test_a_given_factor_saves_work_and_changes_nothing():
    weight, hessian, _ = layer(20, 96)
    factor = prepare_factor(hessian, order="gar", group_size=32)
    shared = solve(weight, hessian, format="int4", group_size=32, order="gar", factor=factor)
    alone = solve(weight, hessian, format="int4", group_size=32, order="gar")
    assert shared.packed.equal(alone.packed)
    with pytest.raises(ValueError, match="factor: expected one for order 'act', group_size 32 and 96 columns"):
        solve(weight, hessian, format="int4", group_size=32, order="act", factor=factor)


# -- solving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
@pytest.mark.parametrize("rows, cols, group_size", [(24, 96, 32), (9, 100, 32), (1, 17, 128), (33, 64, -1)])
def test_what_is_packed_is_what_was_solved(format, symmetric, order, grids, rows, cols, group_size):
    weight, hessian, x = layer(rows, cols)
    s = solve(
        weight, hessian, format=format, group_size=group_size, symmetric=symmetric, order=order, grids=grids, clip=True
    )
    assert s.packed.shape == (rows, cols) and s.packed.format == format
    assert s.fallback is None and s.damp == 0.01
    assert torch.equal(s.packed.unpack_codes(), s.codes)
    assert torch.equal(s.packed.unpack(), dequantize(s))
    assert (s.perm is not None) == (order == "act" and grids == "updated")
    group_size = cols if group_size == -1 else min(group_size, cols)
    if s.perm is None:
        assert s.g_idx.tolist() == [k // group_size for k in range(cols)]
    else:
        assert s.g_idx[s.perm.long()].tolist() == [k // group_size for k in range(cols)]
    delta = s.packed.unpack().double() - weight.double()
    output_error = (delta @ x.T.double()).norm() / (weight.double() @ x.T.double()).norm()
    assert s.relative_error == pytest.approx(output_error.item(), rel=1e-3)


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
def test_codes_of_the_reference(order, grids):
    """The permutations, done by hand around the column loop."""
    weight, hessian, _ = layer(40, 200)
    s = solve(weight, hessian, format="int3", group_size=48, symmetric=False, order=order, grids=grids)
    perm = {
        "none": torch.arange(200),
        "act": hessian.diagonal().argsort(descending=True, stable=True),
        "gar": prepare_factor(hessian, order="gar", group_size=48).perm,
    }[order]
    factor = textbook_factor(hessian[perm][:, perm].double()).float()
    options = dict(bits=3, group_size=48, symmetric=False)
    if grids == "static":
        plain = solve(weight, torch.zeros(200, 200), format="int3", group_size=48, symmetric=False)
        static = plain.scales.float(), plain.zeros.float()
        codes, *_ = reference(weight[:, perm], factor, static=static, group_index=perm // 48, **options)
    else:
        codes, scales, zeros, _ = reference(weight[:, perm], factor, **options)
    if s.perm is None:
        codes = torch.empty_like(codes).scatter_(1, perm.expand_as(codes), codes)
    else:
        assert torch.equal(s.perm.long(), perm)
    assert (s.codes == codes).float().mean() > 0.995
    if grids == "updated":
        g_idx = perm[::48] // 48 if order == "gar" else torch.arange(5)
        assert (s.scales.float()[:, g_idx] == scales).float().mean() > 0.98
        assert (s.zeros.float()[:, g_idx] == zeros).float().mean() > 0.98


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
def test_better_than_rounding(format, order, grids):
    ratios = []
    for seed in range(4):
        weight, hessian, _ = layer(64, 128, seed)
        rounded = PackedMatrix.from_float(weight, format, 32, clip=True)
        error = solve(weight, hessian, format=format, group_size=32, order=order, grids=grids, clip=True).relative_error
        ratios.append(error / relative_output_error(weight, rounded.unpack(), hessian))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.95


def test_an_uncorrelated_hessian_is_rounding():
    weight, _, _ = layer(10, 64)
    s = solve(weight, torch.diag(torch.rand(64) + 0.5), format="int4", group_size=16, symmetric=False)
    assert s.packed.equal(PackedMatrix.from_float(weight, "int4", 16, symmetric=False))


def test_loss_is_the_damped_output_error():
    weight, hessian, _ = layer(30, 80)
    s = solve(weight, hessian, format="int4", group_size=16, order="act")
    delta = s.packed.unpack().double() - weight.double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(80)
    assert s.loss == pytest.approx(((delta @ damped) * delta).sum().item(), rel=1e-4)


def test_the_unit_of_the_hessian_does_not_matter():
    weight, hessian, _ = layer(12, 64)
    expected = solve(weight, hessian, format="int3", group_size=32, order="gar")
    for unit in (2.0**-60, 2.0**40):
        scaled = solve(weight, hessian * unit, format="int3", group_size=32, order="gar")
        assert scaled.packed.equal(expected.packed)
        assert scaled.relative_error == pytest.approx(expected.relative_error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_weight(dtype):
    weight, hessian, _ = layer(8, 32)
    weight = weight.to(dtype)
    s = solve(weight, hessian, format="int4", group_size=16)
    assert s.packed.equal(solve(weight.float(), hessian, format="int4", group_size=16).packed)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_are_stored_as_solved(scale_dtype):
    weight, hessian, _ = layer(8, 64)
    s = solve(weight, hessian, format="int4", group_size=32, scale_dtype=scale_dtype)
    assert s.scales.dtype == scale_dtype and s.packed.scales.dtype == scale_dtype
    assert torch.equal(s.packed.unpack(), dequantize(s))


def test_neither_weight_nor_hessian_is_changed():
    weight, hessian, _ = layer(8, 64)
    hessian[:, 3] = hessian[3] = 0
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, format="int4", group_size=32, order="act")
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


# -- bad numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
def test_dead_columns_become_zero(order, grids):
    weight, hessian, _ = layer(16, 100)
    dead = torch.zeros(100, dtype=torch.bool)
    dead[[0, 31, 32, 99]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    s = solve(weight, hessian, format="int4", group_size=32, order=order, grids=grids)
    assert (s.packed.unpack()[:, dead] == 0).all()
    assert s.fallback is None
    assert s.relative_error < 0.2


def test_dead_columns_do_not_change_the_others():
    weight, hessian, _ = layer(16, 64)
    padded = torch.zeros(80, 80)
    padded[:64, :64] = hessian
    s = solve(torch.cat([weight, torch.ones(16, 16)], 1), padded, format="int4", group_size=16)
    assert torch.equal(s.codes[:, :64], solve(weight, hessian, format="int4", group_size=16).codes)


@pytest.mark.parametrize("rank", [1, 5, 63])
@pytest.mark.parametrize("order", ["none", "act", "gar"])
def test_singular_hessians(rank, order):
    x = inputs(rank, 64)
    weight = layer(16, 64)[0]
    hessian = x.T @ x / rank
    s = solve(weight, hessian, format="int4", group_size=32, order=order)
    assert s.fallback is None
    rounded = PackedMatrix.from_float(weight, "int4", 32).unpack()
    assert s.relative_error < relative_output_error(weight, rounded, hessian)


def test_float64_saves_what_float32_cannot_factor():
    """A damping below float32's resolution of the largest eigenvalue."""
    x = inputs(40, 200).double()
    hessian = (x.T @ x / 40).float()
    damp = 3e-7
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(200)
    assert inverse_factor(h) is None and inverse_factor(h.double()) is not None
    s = solve(layer(16, 200)[0], hessian, format="int4", group_size=32, damp=damp)
    assert s.damp == damp and s.fallback is None and s.relative_error < 0.2


def test_damping_is_raised_until_it_suffices():
    weight, hessian, _ = layer(16, 64)
    lowest = torch.linalg.eigvalsh(hessian)[0]
    hessian -= (lowest + 0.05 * hessian.diagonal().mean()) * torch.eye(64)  # the lowest eigenvalue: -5% of the mean
    s = solve(weight, hessian, format="int4", group_size=32)
    assert s.damp == pytest.approx(0.1)
    assert s.fallback == "damping raised to 0.1: not positive definite with 0.01"
    assert s.loss < float("inf")


def test_without_damping_the_first_step_is_small():
    x = inputs(20, 64)
    s = solve(layer(4, 64)[0], x.T @ x, format="int4", group_size=32, damp=0.0)
    assert 0 <= s.damp <= 1e-2
    assert (s.damp > 0) == (s.fallback is not None)


def test_the_diagonal_is_raised_when_damping_is_not_enough():
    weight, hessian, _ = layer(16, 64)
    hessian[3, 40] = hessian[40, 3] = 1e3 * hessian.abs().max()
    s = solve(weight, hessian, format="int4", group_size=32)
    assert s.fallback == "diagonal raised to dominance: not positive definite with damping 1"
    assert s.damp == 0.01


def rounds_to_nearest(s, weight):
    return s.packed.equal(PackedMatrix.from_float(weight, "int4", 32)) and s.perm is None


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite(order, grids, value):
    weight, hessian, _ = layer(16, 64)
    hessian[5, 9] = value
    s = solve(weight, hessian, format="int4", group_size=32, order=order, grids=grids)
    assert rounds_to_nearest(s, weight)
    assert s.fallback == "round to nearest: the Hessian is not finite"
    assert s.damp == 0.0


def test_a_zero_hessian_keeps_the_weights():
    weight, _, _ = layer(16, 64)
    s = solve(weight, torch.zeros(64, 64), format="int4", group_size=32, order="act")
    assert rounds_to_nearest(s, weight)
    assert s.fallback == "round to nearest: the Hessian is zero"


def test_a_hessian_beyond_float32():
    weight, hessian, _ = layer(16, 64)
    s = solve(weight, hessian * 1e37, format="int4", group_size=32)
    assert s.packed.shape == (16, 64)
    tiny = solve(weight, hessian * 1e-44, format="int4", group_size=32)
    assert tiny.packed.shape == (16, 64)


def test_a_zero_weight_is_exact():
    _, hessian, _ = layer(1, 64)
    s = solve(torch.zeros(5, 64), hessian, format="int2", group_size=32)
    assert (s.packed.unpack() == 0).all() and s.relative_error == 0 and s.loss == 0


def test_weights_on_the_grid_are_kept():
    _, hessian, _ = layer(1, 64)
    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = 0.25 * (codes - 6.0)
    for order in ("none", "act", "gar"):
        # A permutation may part the ends of a group from the rest of it; static grids keep them.
        s = solve(weight, hessian, format="int4", group_size=32, symmetric=False, order=order, grids="static")
        assert torch.equal(s.packed.unpack(), weight)
        assert s.relative_error == 0 and s.loss == 0


# -- wrong arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, hessian, options, message",
    [
        (torch.zeros(4), torch.eye(4), {}, r"weight: expected shape \[N, K\] .*, got \[4\]"),
        (torch.zeros(0, 4), torch.eye(4), {}, r"weight: expected shape .*, got \[0, 4\]"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.eye(4), {}, "weight: expected a floating dtype, got torch.int8"),
        (
            torch.tensor([[0.0, 1.0], [2.0, float("nan")]]),
            torch.eye(2),
            {},
            r"weight\[1, 1\]: expected a finite number, got nan",
        ),
        (torch.tensor([[float("-inf")]]), torch.eye(1), {}, r"weight\[0, 0\]: expected a finite number, got -inf"),
        (torch.zeros(2, 4), torch.eye(5), {}, r"hessian: expected shape \[4, 4\] .*, got \[5, 5\]"),
        (torch.zeros(2, 4), torch.zeros(4, 5), {}, r"hessian: expected shape \[K, K\] .*, got \[4, 5\]"),
        (torch.zeros(2, 4), torch.eye(4, dtype=torch.int64), {}, "hessian: expected a floating dtype, got torch.int64"),
        (torch.zeros(2, 64), torch.eye(64), {"group_size": 24}, "group_size: .* got 24"),
        (torch.zeros(2, 64), torch.eye(64), {"format": "int5"}, "format: expected one of .*, got 'int5'"),
        (torch.zeros(2, 64), torch.eye(64), {"order": "desc"}, "order: expected one of none, act, gar, got 'desc'"),
        (torch.zeros(2, 64), torch.eye(64), {"grids": "old"}, "grids: expected one of updated, static, got 'old'"),
        (torch.zeros(2, 64), torch.eye(64), {"damp": -0.1}, "damp: expected a finite number of at least 0, got -0.1"),
        (torch.zeros(2, 64), torch.eye(64), {"damp": float("nan")}, "damp: expected a finite number"),
    ],
)
def test_wrong_arguments_are_named(weight, hessian, options, message):
    with pytest.raises(ValueError, match=message):
        solve(weight, hessian, **{"format": "int4", "group_size": -1} | options)


def test_a_scale_dtype_that_is_none_is_a_type_error():
    with pytest.raises(TypeError, match="scale_dtype"):
        solve(torch.zeros(2, 64), torch.eye(64), format="int4", scale_dtype=torch.int8)
