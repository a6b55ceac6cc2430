"""Ternary matrices: five trits in a byte, packing floats, BitNet's activations, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from test_matrix import ISAS, dense

from lowbit import _C, PackedMatrix

UNUSED = {1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237}


def random_trits(rows, cols, seed=0):
    return torch.randint(-1, 2, (rows, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def pack(trits, scales, group_size=-1):
    return PackedMatrix.from_codes((trits + 1).to(torch.uint8), scales, format="trit", group_size=group_size)


def test_every_byte():
    """All 243 numbers of five digits, at the byte the documentation gives them."""
    digits = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)  # [243, 5], d0 first
    codes = torch.zeros(1, 320 * 4, dtype=torch.uint8)
    planes = codes.view(4, 5, 64)
    for q in range(243):
        planes[q // 64, :, q % 64] = digits[q]
    packed = PackedMatrix.from_codes(codes, torch.ones(1, 1), format="trit")
    expected = [(256 * q + 242) // 243 for q in range(243)]
    assert packed.codes.flatten()[:243].tolist() == expected
    assert set(range(256)) - set(expected) == UNUSED
    assert torch.equal(packed.unpack_codes(), codes)


@pytest.mark.parametrize("cols", [1, 63, 64, 65, 319, 320, 321, 640, 1000])
def test_padding_decodes_to_zero(cols):
    packed = pack(random_trits(3, cols), torch.ones(1, 1))
    lines = packed.codes.shape[1]
    assert lines == -(-cols // 320)
    whole = PackedMatrix(packed.codes, packed.scales, format="trit", cols=lines * 320)
    assert torch.equal(whole.unpack_codes()[:, :cols], packed.unpack_codes())
    assert (whole.unpack_codes()[:, cols:] == 1).all()
    assert (pack(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1)).codes == 128).all()


@pytest.mark.parametrize("byte", sorted(UNUSED))
def test_bytes_that_encode_nothing_are_refused(byte):
    codes = pack(random_trits(4, 700), torch.ones(1, 1)).codes.clone()
    codes[2, 1, 5] = byte
    with pytest.raises(ValueError, match=rf"codes\[2, 1, 5\]: expected a byte of five trits, got {byte}"):
        PackedMatrix(codes, torch.ones(1, 1), format="trit", cols=700)


def test_packing_floats_by_the_mean():
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    f32 = {"scale_dtype": torch.float32}
    for group in (-1, 64, 128, 256):
        packed = PackedMatrix.from_float(w, "trit", group, **f32)
        groups = w.view(6, -1, 512 if group == -1 else group)
        mean = groups.abs().mean(-1)
        assert torch.allclose(packed.scales, mean, rtol=1e-6)
        expected = torch.round(groups / packed.scales[..., None]).clamp(-1, 1).view(6, 512)
        assert torch.equal(packed.unpack_codes().float() - 1, expected)
    packed = PackedMatrix.from_float(w, "trit", per_tensor=True, **f32)
    assert packed.scales.shape == (1, 1) and packed.scales.item() == pytest.approx(w.abs().mean().item(), rel=1e-6)
    assert torch.equal(packed.unpack_codes().float() - 1, torch.round(w / packed.scales).clamp(-1, 1))


def test_the_searched_scale_is_better_than_the_mean():
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    mean, searched = (PackedMatrix.from_float(w, "trit", 128, clip=clip).unpack() - w for clip in (False, True))
    assert searched.abs().pow(2.4).sum() < mean.abs().pow(2.4).sum()
    assert searched.norm() < 0.9 * mean.norm()


@pytest.mark.parametrize("options", [{}, {"group_size": 64}, {"clip": True}, {"per_tensor": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_twice_changes_nothing(options, dtype):
    w = torch.randn(5, 320, generator=torch.Generator().manual_seed(2)).to(dtype)
    once = PackedMatrix.from_float(w, "trit", scale_dtype=dtype, **options)
    again = PackedMatrix.from_float(once.unpack(dtype), "trit", scale_dtype=dtype, **options)
    assert once.equal(again)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_ternary_matrix_keeps_its_scale(per_tensor):
    """The mean would shrink it by the share of its zeros: the mistake of quantizing twice."""
    w = random_trits(4, 320, seed=3).float() * 0.37
    packed = PackedMatrix.from_float(w, "trit", scale_dtype=torch.float32, per_tensor=per_tensor)
    assert torch.equal(packed.unpack(), w)
    assert (packed.scales == torch.tensor(0.37)).all()


def test_edge_weights():
    for per_tensor in (False, True):
        zeros = PackedMatrix.from_float(torch.zeros(2, 33), "trit", per_tensor=per_tensor)
        assert zeros.unpack().eq(0).all() and (zeros.scales == 1).all()
        one = PackedMatrix.from_float(torch.full((1, 1), -5.0), "trit", per_tensor=per_tensor)
        assert one.unpack().item() == -5
        with pytest.raises(ValueError, match=r"weight\[1, 2\]: expected a finite number"):
            PackedMatrix.from_float(
                torch.ones(3, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
                "trit",
                per_tensor=per_tensor,
            )


def bitnet_activations(x):
    """(q, step) as BitNet defines them, in fp32."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return torch.round(x.float() * (127 / largest)).clamp(-128, 127), largest / 127


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", [-1, 64])
def test_int8_activations_are_those_of_bitnet(isa, group_size):
    """One step a token; the integers, the accumulation and the one rounding at the end, exactly."""
    trits = random_trits(40, 768, seed=4)
    groups = 1 if group_size == -1 else 12
    scales = torch.rand(40, groups, generator=torch.Generator().manual_seed(5)) + 0.5
    packed = pack(trits, scales, group_size)
    x = torch.randn(19, 768, generator=torch.Generator().manual_seed(6))
    x[0, 3] = 90  # an outlier sets the step of its whole token
    x[1] = 0
    x[2] *= 1e-7  # below the smallest step
    q, step = bitnet_activations(x)
    _C.set_isa(isa)
    try:
        y = packed.matmul(x, activations="int8")
        assert _C.last_kernel("matmul") == f"trit_matmul__{isa}"
    finally:
        _C.set_isa("auto")
    if group_size == -1:
        assert torch.equal(y, (q @ trits.float().t()) * (scales.t() * step))
    else:
        exact = q.double() @ torch.from_numpy(dense(packed)).t() * step.double()
        assert ((y.double() - exact).norm() / exact.norm()).item() < 1e-6


def test_ternary_weights_as_int2():
    packed = pack(random_trits(7, 700, seed=8), torch.full((1, 1), 0.25))
    int2 = packed.repack("int2")
    assert (int2.format, int2.bits_per_weight > packed.bits_per_weight) == ("int2", True)
    assert torch.equal(int2.unpack(), packed.unpack())
    assert int2.repack("trit").equal(packed) and packed.repack("trit") is packed
    with pytest.raises(ValueError, match="expected 0, 1 and 2"):
        codes = torch.full((1, 16), 3, dtype=torch.uint8)
        PackedMatrix.from_codes(codes, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.uint8), format="int2").repack(
            "trit"
        )
    with pytest.raises(ValueError, match="expected 1 everywhere"):
        PackedMatrix.from_codes(torch.ones(1, 16, dtype=torch.uint8), torch.ones(1, 1), format="int2").repack("trit")
    with pytest.raises(ValueError, match="to repack ternary codes"):
        packed.repack("int4")


def test_refusals():
    good = random_trits(4, 64)
    with pytest.raises(IndexError, match=r"codes\[0, 0\]: expected at most 2, got 3"):
        PackedMatrix.from_codes(torch.full((4, 64), 3, dtype=torch.uint8), torch.ones(1, 1), format="trit")
    with pytest.raises(ValueError, match="zeros: expected NULL for trit"):
        zeros = torch.ones(1, 1, dtype=torch.uint8)
        PackedMatrix.from_codes((good + 1).to(torch.uint8), torch.ones(1, 1), zeros, format="trit")
    for scale in (0.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"scales\[0, 0\]: expected"):
            pack(good, torch.full((1, 1), scale))
    with pytest.raises(ValueError, match="per_tensor: expected"):
        PackedMatrix.from_float(torch.ones(4, 64), "int4", per_tensor=True)
    with pytest.raises(ValueError, match="per_tensor: expected"):
        PackedMatrix.from_float(torch.ones(4, 64), "trit", 16, per_tensor=True)
    with pytest.raises(ValueError, match="got trit"):
        pack(random_trits(32, 64), torch.ones(1, 1)).to_gptq()
    with pytest.raises(ValueError, match="zeros: expected NULL for trit"):
        PackedMatrix.from_float(torch.ones(4, 64), "trit", symmetric=False)
