"""PackedMatrix against NumPy: packing, unpacking, products, rows, GPTQ words, and everything it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import _C, PackedMatrix
from lowbit.abi import FORMATS
from lowbit.matrix import perm_from_g_idx

INTEGER_FORMATS = [name for name in FORMATS if name != "trit"]
LEVELS = ("ref", "avx2", "avxvnni", "avx512vnni", "amx")
ISAS = [isa for isa in LEVELS if any(n.endswith(f"__{isa}") and ok for n, ok in _C.kernels())]


def random_matrix(rows, cols, format, group_size=-1, *, zeros=False, perm=False, scale_dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top = 3 if format == "trit" else 1 << FORMATS[format]
    zeros = zeros and format != "trit"
    groups = 1 if group_size == -1 else -(-cols // group_size)
    return PackedMatrix.from_codes(
        torch.randint(0, top, (rows, cols), dtype=torch.uint8, generator=generator),
        (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).to(scale_dtype),
        torch.randint(0, top, (rows, groups), dtype=torch.uint8, generator=generator) if zeros else None,
        torch.randperm(cols, generator=generator).to(torch.int32) if perm else None,
        format=format,
        group_size=group_size,
    )


def dense(packed):
    """float64 [rows, cols] in original column order, by NumPy alone."""
    codes = packed.unpack_codes().numpy().astype(np.float64)
    group = np.arange(packed.cols) // packed.group_size
    scales = np.broadcast_to(packed.scales.double().numpy(), (packed.rows, group[-1] + 1))
    zeros = np.full_like(scales, 1 << (FORMATS[packed.format] - 1)) if packed.zeros is None else packed.zeros.numpy()
    zeros = np.broadcast_to(zeros, scales.shape).astype(np.float64)
    weight = scales[:, group] * (codes - zeros[:, group])
    if packed.perm is None:
        return weight
    original = np.empty_like(weight)
    original[:, packed.perm.numpy()] = weight
    return original


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 20),
    cols=st.integers(1, 700),
    group=st.sampled_from([-1, 16, 32, 48, 64, 128, 160]),
    zeros=st.booleans(),
    perm=st.booleans(),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1 << 30),
)
def test_verbs_agree_with_numpy(format, rows, cols, group, zeros, perm, tokens, dtype, seed):
    packed = random_matrix(
        rows, cols, format, group if group <= cols else -1, zeros=zeros, perm=perm, scale_dtype=dtype, seed=seed
    )
    weight = dense(packed)
    assert np.array_equal(packed.unpack().double().numpy(), weight.astype(np.float32).astype(np.float64))
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    y, exact = packed.matmul(x).double().numpy(), x.double().numpy() @ weight.T
    size = np.sqrt(x.double().numpy() ** 2 @ weight.T**2)
    assert (np.abs(y - exact) <= 1e-3 * size + 1e-7).all()
    ids = torch.randint(0, rows, (3, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packed.gather(ids), packed.unpack()[ids])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [128, 32, -1])
def test_error_of_the_product_in_float_mode(format, group_size):
    """The promise of the default mode: at most 3e-4 relative to float64 on the same activations."""
    packed = random_matrix(256, 1024, format, group_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = x.double() @ torch.from_numpy(dense(packed)).t()
        error = ((packed.matmul(x.float()).double() - exact).norm() / exact.norm()).item()
        assert error <= 3e-4
        if dtype == torch.bfloat16:  # nearly all of bf16's values are exact in 16-bit fixed point
            assert error <= 5e-5


@pytest.mark.parametrize("format", FORMATS)
def test_bits_do_not_depend_on_isa_threads_or_batch(format):
    packed = random_matrix(130, 640, format, 64, zeros=True)
    x = torch.randn(37, 640, generator=torch.Generator().manual_seed(2))
    results = []
    try:
        for isa in ISAS:
            _C.set_isa(isa)
            for threads in (1, 2, 3):
                _C.set_threads(threads)
                for mode in ("float", "int8"):
                    whole = packed.matmul(x, activations=mode)
                    assert _C.last_kernel("matmul") == f"{format}_matmul__{isa}"
                    rows = torch.cat([packed.matmul(x[i : i + 1], activations=mode) for i in range(37)])
                    assert torch.equal(whole, rows)
                    results.append((mode, whole))
    finally:
        _C.set_isa("auto")
        _C.set_threads(0)
    for mode, whole in results:
        assert torch.equal(whole, next(y for m, y in results if m == mode))


@pytest.mark.parametrize("format", INTEGER_FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_float_rounds_to_the_nearest_of_its_grid(format, symmetric):
    w = torch.randn(9, 200, generator=torch.Generator().manual_seed(3))
    packed = PackedMatrix.from_float(w, format, 64, symmetric=symmetric, scale_dtype=torch.float32)
    assert (packed.zeros is None) == symmetric
    error = (packed.unpack() - w).abs()
    step = packed.scales.repeat_interleave(64, 1)[:, :200]
    # Half a step inside the grid; a symmetric grid of 2^b levels has its largest code half a step below the maximum.
    beyond = w > step * ((1 << packed.bits) / 2 - 1)
    assert bool((error <= step * 0.5 + 1e-6).logical_or(beyond).all()) and (symmetric or not beyond.all())
    assert (error.pow(2).mean().sqrt() / w.std()).item() < {2: 0.6, 3: 0.3, 4: 0.15, 8: 0.01}[packed.bits]
    for dtype in (torch.float16, torch.bfloat16):
        half = PackedMatrix.from_float(w.to(dtype), format, 64, symmetric=symmetric)
        assert half.equal(PackedMatrix.from_float(w.to(dtype).float(), format, 64, symmetric=symmetric))


def test_clipping_lowers_the_error_it_minimises():
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    w[:, 7] *= 6
    plain, clipped = (PackedMatrix.from_float(w, "int3", 128, clip=clip).unpack() - w for clip in (False, True))
    assert clipped.abs().pow(2.4).sum() < plain.abs().pow(2.4).sum()


def test_edge_weights():
    assert PackedMatrix.from_float(torch.zeros(2, 33), "int4").unpack().eq(0).all()
    assert PackedMatrix.from_float(torch.full((1, 1), 5.0), "int8").unpack().item() == pytest.approx(5.0, rel=0.01)
    tiny = PackedMatrix.from_float(torch.full((1, 16), 1e-30), "int4")  # a scale that underflows fp16
    assert tiny.unpack().eq(0).all() and torch.isfinite(tiny.scales.float()).all()
    huge = PackedMatrix.from_float(torch.full((1, 16), 3e38), "int4")
    assert torch.isfinite(huge.scales.float()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_words_round_trip(bits, act_order):
    format = f"int{bits}"
    packed = random_matrix(64, 128, format, 32, zeros=True, perm=False)
    packed.zeros.clamp_(min=1)
    if act_order:
        order = torch.argsort(torch.randint(0, 4, (128,)), stable=True).to(torch.int32)
        packed = PackedMatrix(packed.codes, packed.scales, packed.zeros, order, format=format, cols=128, group_size=32)
    for version in (1, 2):
        if version == 1 and bits != 3:
            packed.zeros.clamp_(max=(1 << bits) - 1)
        words = packed.to_gptq(version)
        assert words["qweight"].shape == (128 * bits // 32, 64) and words["qzeros"].shape == (4, 64 * bits // 32)
        back = PackedMatrix.from_gptq(**words, bits=bits, group_size=32, version=version)
        assert torch.equal(back.unpack(), packed.unpack())
        g = words["g_idx"].long()
        code = stream(words["qweight"], bits).t()
        zero = stream(words["qzeros"].t(), bits).t() + (version == 1)
        if bits == 3 and version == 1:
            zero %= 8
        by_hand = words["scales"].t().float()[:, g] * (code - zero.t()[:, g]).float()
        assert torch.equal(by_hand, packed.unpack())


def stream(words, bits):
    """int64 [32 * words / bits, ...]: fields of a little-endian bit stream down dim 0, by Python integers."""
    columns = []
    for column in words.t().tolist():
        value = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(column))
        columns.append([(value >> (bits * j)) & ((1 << bits) - 1) for j in range(32 * len(column) // bits)])
    return torch.tensor(columns).t()


def test_symmetric_gptq_zeros_become_none():
    packed = random_matrix(32, 64, "int4", 32)
    back = PackedMatrix.from_gptq(**packed.to_gptq(2), bits=4, group_size=32, version=2)
    assert back.zeros is None and back.equal(packed)


def test_g_idx():
    assert perm_from_g_idx(torch.arange(64) // 32, 64, 32) is None
    assert perm_from_g_idx(torch.tensor([-2] * 32 + [-1] * 32), 64, 32) is None  # negative counts from the end
    swapped = torch.tensor([1] * 32 + [0] * 32)
    assert perm_from_g_idx(swapped, 64, 32).tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(ValueError, match="g_idx: expected 32 columns in group 0, got 33"):
        perm_from_g_idx(torch.tensor([0] * 33 + [1] * 31), 64, 32)
    with pytest.raises(ValueError, match="g_idx: expected groups"):
        perm_from_g_idx(torch.tensor([0] * 63 + [2]), 64, 32)


def test_numpy_in_numpy_out():
    packed = random_matrix(8, 64, "int4", 32)
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    y = packed.matmul(x)
    assert isinstance(y, np.ndarray) and np.array_equal(y, packed.matmul(torch.from_numpy(x)).numpy())
    assert PackedMatrix.from_float(x, "int4").rows == 3
    assert packed.gather(np.array([1, 2])).shape == (2, 64)


def test_gather_policies_and_out():
    packed = random_matrix(5, 64, "int3", 32)
    w = packed.unpack()
    ids = torch.tensor([4, 5, -1], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"ids\[1\]: expected a row in \[0, 5\), got 5"):
        packed.gather(ids)
    assert torch.equal(packed.gather(ids, policy="clamp"), w[[4, 4, 0]])
    assert torch.equal(packed.gather(ids, policy="zero"), torch.stack([w[4], w[0] * 0, w[0] * 0]))
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    assert packed.gather(ids, policy="clamp", out=out) is out
    assert torch.equal(out, w[[4, 4, 0]].bfloat16())
    with pytest.raises(ValueError, match="out: expected"):
        packed.gather(ids, policy="clamp", out=torch.empty(3, 63))
    assert packed.gather(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bags_are_those_of_torch(format, dtype):
    packed = random_matrix(40, 129, format, 48, zeros=True, perm=True)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 40, (300,), generator=generator)
    weights = torch.randn(300, generator=generator)
    offsets = torch.tensor([0, 3, 3, 100, 101, 299])  # torch's last bag ends with the ids
    table, edges = torch.from_numpy(dense(packed)), torch.cat([offsets, torch.tensor([300])])
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for padding_id in (None, int(ids[50])):
        for mode, row_weights in (("sum", None), ("mean", None), ("sum", weights)):
            for chosen in (ids, ids.int()):
                bags = packed.gather_bags(chosen, edges, mode, dtype, weights=row_weights, padding_id=padding_id)
                exact = torch.nn.functional.embedding_bag(
                    ids,
                    table,
                    offsets,
                    mode=mode,
                    padding_idx=padding_id,
                    per_sample_weights=None if row_weights is None else row_weights.double(),
                )
                assert bags.dtype == dtype and bags.shape == (6, 129)
                assert (bags.double() - exact).abs().max() <= tolerance * exact.abs().max()
                assert not bags[1].any()


def test_bags_add_in_order_and_fuse_weights():
    packed = PackedMatrix.from_codes(
        torch.tensor([[129], [129], [128]], dtype=torch.uint8), torch.tensor([[1.0], [2.0**25], [0.0]]), format="int8"
    )
    edges = torch.tensor([0, 3])
    assert packed.gather_bags(torch.tensor([0, 1, 0]), edges).item() == 2.0**25  # (1 + 2^25) rounds twice to 2^25
    weights = torch.tensor([1.0, 1.0, -1.0])
    assert packed.gather_bags(torch.tensor([1, 0, 1]), edges, weights=weights).item() == 0
    # A fused product keeps what its rounding alone would lose: (1 + 2^-12)^2 - 1 - 2^-11 = 2^-24.
    near_one = PackedMatrix.from_codes(
        torch.tensor([[129], [129]], dtype=torch.uint8), torch.tensor([[1 + 2.0**-12], [1.0]]), format="int8"
    )
    weights = torch.tensor([-1 - 2.0**-11, 1 + 2.0**-12])
    assert near_one.gather_bags(torch.tensor([1, 0]), torch.tensor([0, 2]), weights=weights).item() == 2.0**-24


def test_bags_refuse():
    packed = random_matrix(5, 64, "int4", 32)
    ids, edges = torch.tensor([4, 5, -1, 0]), torch.tensor([0, 2, 4])
    with pytest.raises(IndexError, match=r"ids\[1\]: expected a row in \[0, 5\), got 5"):
        packed.gather_bags(ids, edges)
    rows = packed.unpack()
    assert torch.equal(packed.gather_bags(ids, edges, policy="zero"), torch.stack([rows[4], rows[0]]))
    assert torch.equal(packed.gather_bags(ids, edges, policy="clamp")[0], rows[4] + rows[4])
    assert torch.equal(packed.gather_bags(ids, torch.tensor([3, 4])), rows[:1])  # ids in no bag are not looked at
    with pytest.raises(ValueError, match=r"offsets\[1\]: expected at least 3, as before it, got 1"):
        packed.gather_bags(ids, torch.tensor([3, 1]), policy="zero")
    good = {"ids": ids, "offsets": edges, "policy": "zero"}
    for change, error, message in (
        ({"ids": ids[None]}, ValueError, "ids: expected 1 dimension"),
        ({"ids": ids.float()}, TypeError, "ids dtype"),
        ({"offsets": edges.int()}, ValueError, "offsets: expected torch.int64"),
        ({"offsets": edges[:0]}, ValueError, "offsets: expected torch.int64"),
        ({"mode": "max"}, ValueError, "mode: expected one of sum, mean"),
        ({"policy": "wrap"}, ValueError, "policy: expected one of"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected one of"),
        ({"padding_id": 5}, ValueError, "padding_id: expected a row"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected one an id, \[4\], got \[3\]"),
        ({"weights": torch.ones(4, dtype=torch.int32)}, TypeError, "weights dtype"),
        ({"weights": torch.ones(4), "mode": "mean"}, NotImplementedError, 'weights: expected mode "sum"'),
    ):
        with pytest.raises(error, match=message):
            packed.gather_bags(**{**good, **change})


def test_unpack_some_rows():
    packed = random_matrix(5, 70, "int3", 32)
    w = packed.unpack()
    assert torch.equal(packed.unpack(rows=3), w[3:4]) and torch.equal(packed.unpack(rows=-5), w[:1])
    assert torch.equal(packed.unpack(rows=[4, 0, -1]), w[[4, 0, -1]])
    assert torch.equal(packed.unpack(torch.bfloat16, torch.tensor([[1], [2]])), w[torch.tensor([[1], [2]])].bfloat16())
    assert packed.unpack(rows=[]).shape == (0, 70)
    for rows, place, found in ((5, 0, 5), ([0, -6], 1, -6), (torch.tensor([[0], [9]]), 1, 9)):
        with pytest.raises(IndexError, match=rf"rows\[{place}\]: expected a row in \[-5, 5\), got {found}"):
            packed.unpack(rows=rows)
    with pytest.raises(TypeError, match="rows dtype: expected one of"):
        packed.unpack(rows=[0.5])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_resized(format, perm, scale_dtype):
    packed = random_matrix(9, 200, format, 64, zeros=True, perm=perm, scale_dtype=scale_dtype)
    before = [None if t is None else t.clone() for t in packed._tensors]
    rows = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)) * 0.01
    larger = packed.resized(13, rows)
    assert larger.layout == packed.layout and larger.shape == (13, 200) and larger.codes.data_ptr() % 64 == 0
    assert larger.resized(9).equal(packed) and larger.resized(13) is larger
    assert torch.equal(larger.codes[:9], packed.codes) and torch.equal(larger.unpack()[:9], packed.unpack())
    for new, old in zip(larger._tensors, packed._tensors, strict=True):
        assert (new is None) == (old is None) and (new is None or new.dtype == old.dtype)
    # The new rows are those that the matrix would have been packed with, column order and all.
    order = slice(None) if packed.perm is None else packed.perm.long()
    options = {"symmetric": packed.zeros is None, "scale_dtype": scale_dtype}
    alone = PackedMatrix.from_float(rows[:, order], format, 64, **options).unpack()
    assert torch.equal(larger.unpack(rows=slice(9, 13))[:, order], alone)
    # By default the mean; the cut is the first rows.
    mean = packed.unpack().double().mean(0).float().expand(2, -1)
    assert packed.resized(11).equal(packed.resized(11, mean))
    small = packed.resized(2)
    assert torch.equal(small.unpack(), packed.unpack()[:2]) and small.codes.data_ptr() != packed.codes.data_ptr()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, packed._tensors, strict=True))


def test_resized_under_one_scale():
    codes = torch.tensor([[0, 8, 15], [7, 9, 8]], dtype=torch.uint8)
    packed = PackedMatrix.from_codes(codes, torch.tensor([[0.5]]), format="int4")
    larger = packed.resized(4, torch.tensor([[-4.0, 0.2, 3.7], [0.3, 0.76, -1.1]]))
    assert torch.equal(larger.scales, packed.scales) and larger.scales is not packed.scales
    assert larger.unpack(rows=[2, 3]).tolist() == [[-4.0, 0.0, 3.5], [0.5, 1.0, -1.0]]
    assert larger.resized(2).equal(packed) and packed.resized(1).scales.shape == (1, 1)
    message = r"new_rows\[0\]: expected values in \[-4.25, 3.75\], which the one scale of the matrix reaches, got 3.8"
    with pytest.raises(ValueError, match=message):
        packed.resized(3, torch.tensor([[0.0, 3.8, 0.0]]))
    trits = PackedMatrix.from_float(
        torch.randn(4, 50, generator=torch.Generator().manual_seed(2)), "trit", per_tensor=True
    )
    scale = float(trits.scales)
    row = torch.linspace(-3, 3, 50)[None] * scale
    assert torch.equal(trits.resized(5, row).unpack(rows=4), (row / scale).round().clamp(-1, 1) * scale)
    nothing = PackedMatrix.from_codes(codes, torch.tensor([[0.0]]), format="int4")
    assert not nothing.resized(3).unpack().any()
    with pytest.raises(ValueError, match=r"new_rows\[0\]: expected values in \[-0, 0\]"):
        nothing.resized(3, torch.ones(1, 3))


def test_resized_refuses():
    packed = random_matrix(5, 64, "int4", 32)
    for arguments, error, message in (
        ((0,), ValueError, "rows: expected at least 1, got 0"),
        ((7, torch.ones(1, 64)), ValueError, r"new_rows: expected shape \[2, 64\] for 7 rows, got \[1, 64\]"),
        ((3, torch.ones(2, 64)), ValueError, r"new_rows: expected shape \[0, 64\] for 3 rows, got \[2, 64\]"),
        ((6, torch.ones(1, 64).double()), TypeError, "new_rows dtype"),
        ((6, torch.full((1, 64), torch.inf)), ValueError, r"new_rows\[0, 0\]: expected a finite number, got inf"),
    ):
        with pytest.raises(error, match=message):
            packed.resized(*arguments)


LINE = 64


def touched(rows, stride, start):
    """Bytes of the cache lines that a row of an array at address `start` lies on, on average over its rows."""
    first = start + torch.arange(rows) * stride
    return (((first + stride - 1) // LINE - first // LINE + 1) * LINE).double().mean().item()


@pytest.mark.parametrize("rows, cols", [(128256, 4096), (50257, 768), (32003, 5120), (257, 16384)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_lookup_touches_little_more_than_the_bytes_of_its_row(rows, cols, format, zeros):
    """The lines of a row's codes, fp16 scales (groups of 128) and zeros beside the bytes that they must be: the mean
    over all rows of the table. Codes begin lines; rows of scales lie behind each other and straddle lines as they come,
    from wherever the array starts (mapped from a file: anywhere), so the worst start counts."""
    sample = random_matrix(3, cols, format, 128, zeros=zeros)  # its strides are those of a table of any length
    assert sample.codes.data_ptr() % LINE == 0 and sample.codes.stride(0) % LINE == 0
    total, least, arrays = sample.codes.stride(0), cols * sample.bits / 8, 1
    for tensor in (sample.scales, sample.zeros):
        if tensor is not None:
            size = tensor.element_size()
            stride = tensor.stride(0) * size
            starts = range(0, LINE, size) if size > 1 else [tensor.data_ptr() % LINE]  # zeros: as they are here
            total, least = total + max(touched(rows, stride, start) for start in starts), least + stride
            arrays += 1
    assert total < least + arrays * LINE  # a row of any width: one line more for each array
    if cols >= 4096:
        assert total <= 1.11 * least


def test_codes_are_aligned_and_large_ones_on_a_huge_page_boundary():
    assert random_matrix(3, 70, "int4").codes.data_ptr() % 64 == 0
    assert random_matrix(1024, 4096, "int4").codes.data_ptr() % (2 << 20) == 0


GOOD = {"rows": 4, "cols": 64, "format": "int4", "group_size": 32}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"format": "int5"}, ValueError, "format: expected one of int2, int3, int4, int8, trit, got 'int5'"),
        ({"cols": 0}, ValueError, "cols: expected at least 1"),
        ({"cols": 200}, ValueError, "codes: expected shape"),
        ({"group_size": 40}, ValueError, "group_size: expected -1, a multiple of 16"),
        ({"group_size": 16}, ValueError, "scales: expected shape"),
        ({"scales": torch.ones(4, 2, dtype=torch.float64)}, TypeError, "scales dtype"),
        ({"scales": torch.ones(8)}, ValueError, "scales: expected 2 dimensions"),
        ({"scales": torch.tensor([[1.0, float("nan")]] * 4)}, ValueError, r"scales\[0, 1\]: expected a finite number"),
        ({"scales": torch.ones(2, 4).t()}, ValueError, "scales: expected a contiguous"),
        ({"zeros": torch.ones(4, 1, dtype=torch.uint8)}, ValueError, "zeros: expected"),
        ({"zeros": torch.full((4, 2), 16, dtype=torch.uint8)}, ValueError, r"zeros\[0, 0\]: expected at most 15"),
        ({"perm": torch.zeros(64, dtype=torch.int32)}, ValueError, "perm: expected every column once"),
        ({"perm": torch.arange(64)}, ValueError, "perm: expected torch.int32"),
        ({"perm": torch.arange(1, 65, dtype=torch.int32)}, ValueError, r"perm\[63\]: expected a column"),
        ({"codes": torch.zeros(4, 1, 64)}, TypeError, "codes: expected dtype torch.uint8"),
        (
            {"codes": torch.zeros(4, 1, 64, dtype=torch.uint8, device="meta")},
            NotImplementedError,
            "codes: expected a tensor on the CPU",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {
        "codes": torch.zeros(4, 1, 64, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "format": "int4",
        "cols": 64,
        "group_size": 32,
    } | change
    with pytest.raises(error, match=message):
        PackedMatrix(**arguments)


def test_refuses_operands():
    packed = random_matrix(4, 64, "int4", 32)
    with pytest.raises(ValueError, match=r"x: expected 64 columns \(in_features\), got shape \[2, 63\]"):
        packed.matmul(torch.ones(2, 63))
    with pytest.raises(TypeError, match="x: expected float32"):
        packed.matmul(torch.ones(2, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="x: expected a tensor"):
        packed.matmul([1.0] * 64)
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\]"):
        packed.matmul(torch.ones(2, 64), bias=torch.ones(5))
    with pytest.raises(ValueError, match="activations: expected one of float, int8"):
        packed.matmul(torch.ones(2, 64), activations="int4")
    with pytest.raises(TypeError, match="ids dtype"):
        packed.gather(torch.ones(2))
    with pytest.raises(ValueError, match="policy"):
        packed.gather(torch.tensor([0]), policy="wrap")
    with pytest.raises(ValueError, match=r"weight\[1, 2\]: expected a finite number"):
        w = torch.ones(2, 64)
        w[1, 2] = float("inf")
        PackedMatrix.from_float(w, "int4")
    with pytest.raises(ValueError, match="weight: expected shape"):
        PackedMatrix.from_float(torch.ones(64), "int4")
    with pytest.raises(IndexError, match=r"codes\[0, 3\]: expected at most 3, got 4"):
        codes = torch.zeros(1, 16, dtype=torch.uint8)
        codes[0, 3] = 4
        PackedMatrix.from_codes(codes, torch.ones(1, 1), format="int2")
    with pytest.raises(ValueError, match="in_features: expected a multiple of 32"):
        random_matrix(32, 33, "int4").to_gptq()
