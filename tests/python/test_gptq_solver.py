"""The compiled column solver against the readable one, and against itself on every ISA and number of
threads."""

import pytest
import torch
from reference_gptq import clipping_loss, find_grid, gptq, inverse_factor

from lowbit import _C

DTYPES = {torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
ISAS = [name for name, runnable in _C.kernels() if name.startswith("gptq_solve__") and runnable]


@pytest.fixture(autouse=True)
def restore_choices():
    isa = _C.isa()
    yield
    _C.set_isa(isa)
    _C.set_threads(0)


def problem(rows, cols, seed=0):
    """Weights, and the factor of a correlated, well-conditioned Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, cols, generator=generator)
    mix = torch.eye(cols) + 0.5 * cols**-0.5 * torch.randn(cols, cols, generator=generator)
    x = torch.randn(2 * cols + 50, cols, generator=generator) @ mix
    return weight, inverse_factor((x.T @ x / len(x)).double()).float().contiguous()


def solve(
    weight,
    factor,
    bits,
    group_size,
    *,
    symmetric=True,
    clip=False,
    scale_dtype=torch.float16,
    static=None,
    group_index=None,
    block_size=0,
    optional=True,
):
    """Codes, scales, zeros and loss of the compiled solver."""
    rows, cols = weight.shape
    groups = 1 if group_size == -1 else -(-cols // group_size)
    codes = torch.full((rows, cols), 255, dtype=torch.uint8)
    scales = torch.full((rows, groups), -1.0) if static is None else static[0].clone()
    zeros = torch.full((rows, groups), 77, dtype=torch.uint8) if static is None else static[1].to(torch.uint8)
    losses = torch.full((rows,), -1.0, dtype=torch.float64)
    _C.gptq_solve(
        format=bits,
        rows=rows,
        cols=cols,
        group_size=group_size,
        symmetric=symmetric,
        clip=clip,
        static_grids=static is not None,
        scale_dtype=DTYPES[scale_dtype],
        block_size=block_size,
        weight=weight.data_ptr(),
        factor=0 if factor is None else factor.data_ptr(),
        group_index=0 if group_index is None else group_index.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr() if optional else 0,
        loss=losses.data_ptr() if optional else 0,
    )
    return codes, scales, zeros, losses


SHAPES = [(1, 1), (1, 17), (17, 1), (15, 16), (16, 33), (5, 48), (33, 100), (70, 300)]


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_same_bits_on_every_isa(rows, cols, bits, symmetric, clip):
    weight, factor = problem(rows, cols)
    for group_size in {16, 48, cols}:
        results = []
        for isa in ISAS:
            _C.set_isa(isa.removeprefix("gptq_solve__"))
            results.append(solve(weight, factor, bits, group_size, symmetric=symmetric, clip=clip))
            assert _C.last_kernel("solve") == isa
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_the_reference_on_given_grids(rows, cols, bits, symmetric):
    weight, factor = problem(rows, cols)
    group_size = 48 if cols > 48 else cols
    groups = -(-cols // group_size)
    index = torch.randperm(cols, generator=torch.Generator().manual_seed(1)) // group_size
    grids = [find_grid(weight[:, index == g], bits, symmetric, False, torch.float16) for g in range(groups)]
    static = torch.stack([s for s, _ in grids], 1), torch.stack([z for _, z in grids], 1)
    index = index.to(torch.int32)
    codes, scales, zeros, loss = solve(
        weight, factor, bits, group_size, symmetric=symmetric, static=static, group_index=index
    )
    expected, _, _, expected_loss = gptq(
        weight, factor, bits=bits, group_size=group_size, static=static, group_index=index
    )
    assert torch.equal(scales, static[0]) and torch.equal(zeros.float(), static[1])
    # The order of fp32 additions differs, so a weight that lies on the border of two codes may fall either
    # way.
    assert (codes == expected).float().mean() >= 0.999
    torch.testing.assert_close(loss.sum(), expected_loss.sum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("group_size", [32, 96, 160, 300])  # inside a block, across blocks, wider, one a row
def test_codes_of_the_reference_on_its_own_grids(bits, symmetric, clip, group_size):
    weight, factor = problem(40, 300)
    codes, scales, zeros, loss = solve(weight, factor, bits, group_size, symmetric=symmetric, clip=clip)
    expected, expected_scales, expected_zeros, expected_loss = gptq(
        weight, factor, bits=bits, group_size=group_size, symmetric=symmetric, clip=clip
    )
    assert (codes == expected).float().mean() >= 0.99
    assert (scales == expected_scales).float().mean() >= 0.97
    assert (zeros == expected_zeros).float().mean() >= 0.97
    torch.testing.assert_close(loss.sum(), expected_loss.sum(), rtol=5e-3, atol=0)


def test_same_bits_with_any_threads_and_block_size():
    weight, factor = problem(130, 400)
    _C.set_threads(1)
    expected = solve(weight, factor, 4, 64, symmetric=False)
    for threads, block_size in [(2, 0), (3, 16), (8, 48), (1, 400), (2, 4096)]:
        _C.set_threads(threads)
        for ours, theirs in zip(
            expected, solve(weight, factor, 4, 64, symmetric=False, block_size=block_size), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_row_does_not_depend_on_its_neighbours():
    weight, factor = problem(70, 200)
    expected = solve(weight, factor, 3, 32)
    alone = solve(weight[37:38].contiguous(), factor, 3, 32)
    for ours, theirs in zip(expected, alone, strict=True):
        assert torch.equal(ours[37:38], theirs)


def test_what_lies_below_the_diagonal_is_not_read():
    weight, factor = problem(20, 100)
    dirty = factor + torch.full((100, 100), float("nan")).tril(-1)
    for ours, theirs in zip(solve(weight, factor, 4, 32), solve(weight, dirty, 4, 32), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_are_left_as_they_are():
    weight, factor = problem(20, 100)
    before = weight.clone()
    solve(weight, factor, 4, 32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_a_factor_it_rounds_to_nearest(bits, symmetric, scale_dtype):
    weight, _ = problem(20, 100)
    codes, scales, zeros, loss = solve(weight, None, bits, 48, symmetric=symmetric, scale_dtype=scale_dtype)
    for g in range(3):
        group = weight[:, 48 * g : 48 * g + 48]
        s, z = find_grid(group, bits, symmetric, False, scale_dtype)
        assert torch.equal(scales[:, g], s) and torch.equal(zeros[:, g].float(), z)
        expected = (torch.round(group / s[:, None]) + z[:, None]).clamp(0, 2**bits - 1)
        assert torch.equal(codes[:, 48 * g : 48 * g + 48].float(), expected)
    assert torch.equal(scales.to(scale_dtype).float(), scales)
    index = torch.arange(100) // 48
    error = weight - scales[:, index] * (codes.float() - zeros.float()[:, index])
    torch.testing.assert_close(loss, error.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_are_rounded_as_torch_rounds(isa, scale_dtype):
    _C.set_isa(isa.removeprefix("gptq_solve__"))
    exponents = torch.arange(-140, 127, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weight = (2**exponents * (1 + torch.rand(267, generator=generator).double())).float()[:, None]
    weight = torch.cat([weight, torch.tensor([[0.0], [65504 * 7.5], [65520 * 7.5], [3.4e38]])])
    _, scales, _, _ = solve(weight, None, 4, 1, scale_dtype=scale_dtype)
    expected, _ = find_grid(weight, 4, True, False, scale_dtype)
    assert torch.equal(scales[:, 0], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_without_a_grid(isa, symmetric):
    """Zeros, and weights whose scale underflows fp16, get scale 1 and the middle code."""
    _C.set_isa(isa.removeprefix("gptq_solve__"))
    weight = torch.stack([torch.zeros(32), torch.full((32,), 1e-9), torch.full((32,), -1e-9)])
    codes, scales, zeros, _ = solve(weight, None, 4, 32, symmetric=symmetric, clip=True)
    assert (scales == 1).all() and (zeros == 8).all() and (codes == 8).all()


def test_scales_beyond_float16_stay_finite():
    weight = torch.tensor([[1e30, -1e30] * 16])
    codes, scales, _, _ = solve(weight, None, 4, 32)
    assert scales.item() == 65504
    assert codes[0].tolist() == [15, 0] * 16


def test_the_largest_floats_do_not_overflow_into_nan():
    weight = torch.tensor([[3.4e38, -3.4e38] * 16])
    for symmetric in (True, False):
        codes, scales, _, _ = solve(weight, None, 2, 32, symmetric=symmetric, clip=True, scale_dtype=torch.float32)
        assert scales.isfinite().all()
        assert codes.max() <= 3


def test_asymmetric_grids_contain_zero():
    weight = torch.linspace(1.0, 2.0, 32)[None]
    codes, scales, zeros, _ = solve(torch.cat([weight, -weight]), None, 4, 32, symmetric=False)
    assert zeros[:, 0].tolist() == [0, 15]
    torch.testing.assert_close(scales[:, 0], torch.full((2,), 2 / 15), rtol=1e-3, atol=0)
    assert codes[0, -1] == 15 and codes[1, -1] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_finds_what_the_reference_finds(bits, symmetric):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 3
    _, scales, zeros, _ = solve(weight, None, bits, 64, symmetric=symmetric, clip=True)
    s, z = find_grid(weight, bits, symmetric, True, torch.float16)
    ours = clipping_loss(weight, scales[:, 0], zeros[:, 0].float(), bits)
    # Powers are rounded differently, so candidates that tie to six digits may be chosen differently.
    torch.testing.assert_close(ours, clipping_loss(weight, s, z, bits), rtol=1e-5, atol=0)
    plain, _, _ = solve(weight, None, bits, 64, symmetric=symmetric)[1:]
    assert (scales[:, 0] <= plain[:, 0]).all()
    assert (scales[:, 0] < plain[:, 0]).float().mean() > 0.5 or bits == 8


def test_clipping_does_not_depend_on_the_unit_of_the_weights():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codes, scales, _, _ = solve(weight, None, 3, 64, clip=True, scale_dtype=torch.float32)
    for unit in (2.0**-90, 2.0**90):
        other = solve(weight * unit, None, 3, 64, clip=True, scale_dtype=torch.float32)
        assert torch.equal(other[0], codes)
        assert torch.equal(other[1], scales * unit)


@pytest.mark.parametrize("isa", ISAS)
def test_errors_that_overflow_still_give_codes(isa):
    """Off-diagonal entries large enough to overflow every weight: defined codes, the same on every ISA."""
    _C.set_isa(isa.removeprefix("gptq_solve__"))
    weight, _ = problem(3, 40)
    factor = torch.full((40, 40), 1e30).triu(1) + torch.eye(40)
    codes, scales, _, loss = solve(weight, factor, 4, 16)
    assert codes.max() <= 15 and scales.isfinite().all() and (scales > 0).all()
    assert not loss.isfinite().all()


def test_zeros_and_loss_are_optional():
    weight, factor = problem(5, 40)
    codes, _, zeros, loss = solve(weight, factor, 4, 16, optional=False)
    assert torch.equal(codes, solve(weight, factor, 4, 16)[0])
    assert (zeros == 77).all() and (loss == -1).all()


def call(**changes):
    """A valid call with some arguments replaced."""
    tensors = dict(
        weight=torch.zeros(2, 32),
        factor=torch.eye(32),
        group_index=None,
        codes=torch.zeros(2, 32, dtype=torch.uint8),
        scales=torch.ones(2, 2),
        zeros=torch.full((2, 2), 8, dtype=torch.uint8),
        loss=None,
    )
    numbers = dict(
        format=4,
        rows=2,
        cols=32,
        group_size=16,
        symmetric=True,
        clip=False,
        static_grids=False,
        scale_dtype=_C.F16,
        block_size=0,
    )
    tensors |= {k: v for k, v in changes.items() if k in tensors}
    numbers |= {k: v for k, v in changes.items() if k in numbers}
    _C.gptq_solve(**numbers, **{k: 0 if t is None else t.data_ptr() for k, t in tensors.items()})


def with_value(tensor, where, value):
    tensor[where] = value
    return tensor


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(format=5), ValueError, "format: expected int2, int3, int4, int8 or trit, got 5"),
        (dict(rows=0), ValueError, "rows: expected 1 to .*, got 0"),
        (dict(cols=-3), ValueError, "cols: expected 1 to .*, got -3"),
        (dict(group_size=24), ValueError, r"group_size: expected a multiple of 16, cols \(32\) or -1, got 24"),
        (dict(group_size=0), ValueError, "group_size: .* got 0"),
        (dict(block_size=8), ValueError, "block_size: expected a multiple of 16 or 0, got 8"),
        (dict(scale_dtype=_C.I32), ValueError, "scale_dtype: expected f32, f16 or bf16"),
        (dict(weight=None), ValueError, "gptq: expected pointers"),
        (dict(codes=None), ValueError, "gptq: expected pointers"),
        (dict(zeros=None, symmetric=False), ValueError, "zeros: expected a pointer for an asymmetric grid"),
        (
            dict(weight=with_value(torch.zeros(2, 32), (1, 7), float("nan"))),
            ValueError,
            r"weight\[1, 7\]: expected a finite number, got -?nan",
        ),
        (
            dict(weight=with_value(torch.zeros(2, 32), (0, 31), -float("inf"))),
            ValueError,
            r"weight\[0, 31\]: expected a finite number, got -inf",
        ),
        (
            dict(factor=with_value(torch.eye(32), (5, 5), 0.0)),
            ArithmeticError,
            r"factor\[5, 5\]: expected a positive finite diagonal, got 0",
        ),
        (
            dict(factor=with_value(torch.eye(32), (5, 5), float("nan"))),
            ArithmeticError,
            r"factor\[5, 5\]: expected a positive finite diagonal",
        ),
        (
            dict(group_index=torch.zeros(32, dtype=torch.int32)),
            ValueError,
            "group_index: expected NULL without static_grids",
        ),
        (
            dict(static_grids=True, group_index=with_value(torch.zeros(32, dtype=torch.int32), 9, 2)),
            IndexError,
            r"group_index\[9\]: expected 0 to 1, got 2",
        ),
        (
            dict(static_grids=True, scales=with_value(torch.ones(2, 2), (1, 0), 0.0)),
            ValueError,
            r"scales\[1, 0\]: expected a positive finite number, got 0",
        ),
        (
            dict(static_grids=True, symmetric=False, zeros=torch.full((2, 2), 16, dtype=torch.uint8)),
            IndexError,
            r"zeros\[0, 0\]: expected at most 15, got 16",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_call_that_the_errors_are_variations_of_is_valid():
    call()
