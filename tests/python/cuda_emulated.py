"""The GPU verbs from Python without a GPU: CPU tensors pose as CUDA ones, and the CUDA library is the emulated one,
whose device memory is the host's. test_cuda.py runs this file in a process of its own, since the library is looked for
once.

By hand: LOWBIT_CUDA_LIBRARY=build/dev/tests/emulation/liblowbit_cuda_emulated.so LOWBIT_TORCH_KERNELS=python \
         pytest tests/python/cuda_emulated.py
"""

import ctypes
import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from test_matrix import random_matrix
from tiny_models import build, outputs, token_ids

import lowbit
from lowbit import PackedMatrix, abi, cuda, doctor
from lowbit.abi import FORMATS
from lowbit.cli.torch_options import parse_device
from lowbit.nn import Embedding, EmbeddingBag, Linear, TernaryLinear
from lowbit.quantize.gptq import solve

LIBRARY = ctypes.CDLL(os.environ["LOWBIT_CUDA_LIBRARY"])
VIOLATIONS, MESSAGE, CLEAR = (
    getattr(LIBRARY, name)
    for name in (
        "_ZN6lowbit9emulation10violationsEv",
        "_ZN6lowbit9emulation7messageEi",
        "_ZN6lowbit9emulation5clearEv",
    )
)
VIOLATIONS.restype, MESSAGE.restype = ctypes.c_int64, ctypes.c_char_p
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]


@pytest.fixture(autouse=True)
def no_violations():
    yield
    found, first = VIOLATIONS(), MESSAGE(0)
    CLEAR()
    assert found == 0, first.decode()


def aligned(device, size):
    """Scratch at a multiple of 256 that is full of what a kernel must not rely on."""
    memory = torch.full((size + 255,), 0xA5, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + size]


@contextmanager
def gpu(capturing=False):
    """Every tensor lies on GPU 0."""
    with (
        mock.patch.object(abi, "device_index", lambda tensor, name: 0),
        mock.patch.object(cuda, "torch_device", lambda device: torch.device("cpu")),
        mock.patch.object(cuda, "stream", lambda device: 0),
        mock.patch.object(cuda, "is_capturing", lambda device: capturing),
        mock.patch.object(cuda, "scratch", aligned),
    ):
        yield


def moved(packed):
    """The matrix on GPU 0, over the same memory."""
    layout = packed.layout
    return PackedMatrix(
        *packed._tensors, format=layout.format, cols=layout.cols, group_size=layout.group_size, validate=False
    )


def relative_error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


def some_matrix(format, cols=320, rows=50, seed=0, **options):
    options = {"group_size": 64, "zeros": seed % 2 == 1, "scale_dtype": FLOATS[seed % 3]} | options
    return random_matrix(rows, cols, format, seed=seed, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("perm", [False, True])
def test_rows_and_codes_have_the_bits_of_the_cpu(format, perm):
    packed = some_matrix(format, perm=perm, seed=1)
    ids = torch.tensor([[3, 49, 0], [7, 7, 12]])
    expected = {dtype: (packed.unpack(dtype), packed.gather(ids, dtype)) for dtype in FLOATS}
    codes, some = packed.unpack_codes(), packed.unpack(rows=slice(5, 9))
    with gpu():
        there = moved(packed)
        for dtype, (rows, gathered) in expected.items():
            assert torch.equal(there.unpack(dtype), rows)
            assert torch.equal(there.gather(ids.int(), dtype), gathered)
            assert torch.equal(there.gather(ids.t(), dtype), gathered.transpose(0, 1))
            out = torch.empty(2, 3, packed.cols, dtype=dtype)
            assert there.gather(ids, dtype, out=out) is out and torch.equal(out, gathered)
            assert there.gather(ids[:0], dtype).shape == (0, 3, packed.cols)
        assert torch.equal(there.unpack(rows=slice(5, 9)), some)
        assert torch.equal(there.unpack_codes(), codes)
        assert torch.equal(there.unpack_codes(slice(3, 4)), codes[3:4])
        made = PackedMatrix.from_codes(
            codes, packed.scales, packed.zeros, packed.perm, format=format, group_size=packed.group_size
        )
        assert made.equal(there) and made._view.device == 0


def test_ids_outside():
    packed = some_matrix("int4")
    ids = torch.tensor([1, 2, 50, -1])
    clamped = packed.gather(ids, policy="clamp")
    zeroed = packed.gather(ids, policy="zero")
    with pytest.raises(IndexError) as refused:
        packed.gather(ids)
    with gpu():
        there = moved(packed)
        assert torch.equal(there.gather(ids, policy="clamp"), clamped)
        assert torch.equal(there.gather(ids, policy="zero"), zeroed)
        with pytest.raises(IndexError) as also_refused:
            there.gather(ids)
        with pytest.raises(ValueError, match="policy: expected one of"):
            there.gather(ids, policy="wrap")
    assert str(also_refused.value) == str(refused.value)
    with gpu(capturing=True):
        assert torch.equal(there.gather(ids), zeroed)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bags(mode, dtype):
    packed = some_matrix("int3", perm=True, seed=2)
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([2, 5, 5, 30, 41])
    options = {"mode": mode, "dtype": dtype, "padding_id": int(ids[7])}
    rows = packed.gather_bags(ids, offsets, **options)
    whole = packed.gather_bags(ids, torch.tensor([0, 7, 40]), mode)
    weight = packed.unpack()
    reference = torch.nn.functional.embedding_bag(ids, weight, torch.tensor([0, 7]), mode=mode)
    assert torch.allclose(whole, reference, atol=1e-6)
    assert not rows[1].any()
    outside = ids.clone()
    outside[3], outside[9] = 50, -4
    zeroed = packed.gather_bags(outside, offsets, policy="zero", **options)
    with pytest.raises(IndexError, match=r"ids\[3\]: expected a row in \[0, 50\), got 50"):
        packed.gather_bags(outside, offsets, **options)
    with gpu():
        there = moved(packed)
        assert torch.equal(there.gather_bags(ids, offsets, **options), rows)
        assert torch.equal(there.gather_bags(outside, offsets, policy="zero", **options), zeroed)
        with pytest.raises(IndexError, match=r"ids\[3\]: expected a row in \[0, 50\), got 50"):
            there.gather_bags(outside, offsets, **options)
        assert there.gather_bags(ids, offsets[:1]).shape == (0, packed.cols)
        with pytest.raises(NotImplementedError, match='weights: expected mode "sum"'):
            there.gather_bags(ids, offsets, "mean", weights=torch.ones(40))
        for wrong in (offsets.int(), offsets[None], offsets[:0]):
            with pytest.raises(ValueError, match="offsets: expected"):
                there.gather_bags(ids, wrong)


@pytest.mark.parametrize("format", FORMATS)
def test_weighted_bags_have_the_bits_of_the_cpu(format):
    packed = some_matrix(format, perm=format == "int8", seed=1)
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(2))
    ids[4], offsets = -1, torch.tensor([1, 6, 6, 39])
    weights = torch.randn(40, generator=torch.Generator().manual_seed(3))
    options = {"policy": "zero", "padding_id": int(ids[9])}
    for dtype in FLOATS:
        for given in (weights, weights.half(), weights[:1].expand(40)):
            expected = packed.gather_bags(ids, offsets, dtype=dtype, weights=given, **options)
            with gpu():
                there = moved(packed)
                assert torch.equal(there.gather_bags(ids, offsets, dtype=dtype, weights=given, **options), expected)
    module = EmbeddingBag.from_packed(packed, "sum", policy="clamp")
    expected = module(ids.view(8, 5), None, weights.view(8, 5))
    with gpu():
        module.load(moved(packed), replace=True)
        assert torch.equal(module(ids.view(8, 5), None, weights.view(8, 5)), expected)


def test_padding_id_gives_zeros():
    packed = some_matrix("int8")
    ids = torch.tensor([[4, 5], [4, 6]])
    rows = packed.gather(ids, padding_id=4)
    assert not rows[:, 0].any() and torch.equal(rows[:, 1], packed.gather(ids[:, 1]))
    with gpu():
        assert torch.equal(moved(packed).gather(ids, padding_id=4), rows)
        with pytest.raises(ValueError, match="padding_id: expected a row"):
            moved(packed).gather(ids, padding_id=50)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [64, 32, -1])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_products(format, group_size, activations):
    packed = some_matrix(format, 700, rows=70, group_size=group_size, perm=format == "int4", seed=1)
    weight, tolerance = packed.unpack().double(), 2e-3
    for dtype in FLOATS:
        for tokens in (0, 1, 5, 16, 17, 40):
            x = torch.randn(tokens, 700, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            bias = torch.randn(70).to(dtype) if tokens % 2 else None
            exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
            if activations == "int8":
                exact = packed.matmul(x, bias, activations).double()
            with gpu():
                y = moved(packed).matmul(x, bias, activations)
            assert y.dtype == dtype and y.shape == (tokens, 70)
            assert not tokens or relative_error(y, exact) <= (tolerance if dtype != torch.bfloat16 else 4e-3)


def test_ternary_products_of_one_scale_a_row_have_the_bits_of_the_cpu():
    packed = some_matrix("trit", 960, group_size=-1)
    x = torch.randn(9, 960)
    for activations in ("float", "int8"):
        expected = packed.matmul(x.half(), activations=activations)
        with gpu():
            assert torch.equal(moved(packed).matmul(x.half(), activations=activations), expected)


def test_operands_of_any_shape_and_stride():
    packed = some_matrix("int4", 128)
    x = torch.randn(3, 4, 256).half()
    with gpu():
        there = moved(packed)
        for operand in (
            x[..., :128],  # rows apart
            x[..., ::2],  # columns apart
            x[:, -1:, :128],  # the last tokens of a batch
            x[0, :1, :128].expand(5, 128),  # one row, five times
            x[..., :128].transpose(0, 1),
            x[0, 0, :128],
        ):
            expected = there.matmul(operand.contiguous())
            assert expected.shape == (*operand.shape[:-1], 50)
            assert torch.equal(there.matmul(operand), expected)
        for empty in ((0, 128), (2, 0, 128)):
            assert there.matmul(torch.empty(empty)).shape == (*empty[:-1], 50)
        assert there.matmul(x[0, :, :128].numpy()).shape == (4, 50)


def test_scratch_of_one_product_is_garbage_to_the_next():
    """Shapes that split K and shapes that do not, in turn, on memory that is never clean."""
    wide, tall = some_matrix("int4", 9000, rows=20), some_matrix("int4", 256, rows=200)
    for tokens in (1, 16, 20, 3, 1):
        for packed in (wide, tall, wide):
            x = torch.randn(tokens, packed.cols).half()
            exact = x.double() @ packed.unpack().double().t()
            with gpu():
                assert relative_error(moved(packed).matmul(x), exact) <= 2e-3


@pytest.mark.parametrize("format", ["int4", "trit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batch_invariance(format, dtype):
    packed = some_matrix(format, 640, rows=40)
    x = torch.randn(400, 640).to(dtype)
    with gpu():
        there = moved(packed)
        _, prefers_unpack, _, _ = there._view.cuda_matmul_plan(400, abi.FLOAT_DTYPES[dtype], 0)
        assert prefers_unpack
        dense = there.matmul(x)
        with lowbit.cuda.batch_invariant():
            one_by_one = torch.cat([there.matmul(x[i : i + 1]) for i in range(37)])
            assert torch.equal(there.matmul(x)[:37], one_by_one)
            assert torch.equal(there.matmul(x[:37]), one_by_one)
        assert torch.equal(there.matmul(x), dense)  # as before
        cuda.batch_invariant(True)
        assert torch.equal(there.matmul(x[:20]), one_by_one[:20])
        cuda.batch_invariant(False)


@pytest.mark.parametrize("bias", [False, True])
def test_large_products_unpack_some_rows_at_a_time(monkeypatch, bias):
    packed = some_matrix("int8", 256, rows=100)
    x, bias = torch.randn(900, 256).bfloat16(), torch.randn(100) if bias else None
    expected = x.double() @ packed.unpack(torch.bfloat16).double().t() + (0 if bias is None else bias.double())
    monkeypatch.setattr(cuda, "SLAB_BYTES", 256 * 2 * 30)
    with gpu():
        assert relative_error(moved(packed).matmul(x, bias), expected) < 4e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("clip", [False, True])
def test_packing_floats_gives_the_bits_of_the_cpu(format, clip):
    for symmetric in (True, False)[: 1 if format == "trit" else 2]:
        for group_size, scale_dtype, cols in (
            (-1, torch.float16, 200),
            (64, torch.bfloat16, 200),
            (48, torch.float32, 96),
        ):
            w = torch.randn(9, cols, generator=torch.Generator().manual_seed(3))
            w[2] = 0
            w[3] = w[3].sign() * 0.3
            options = {"symmetric": symmetric, "scale_dtype": scale_dtype, "clip": clip}
            expected = PackedMatrix.from_float(w.bfloat16(), format, group_size, **options)
            with gpu():
                made = PackedMatrix.from_float(w.bfloat16(), format, group_size, **options)
                assert made.equal(expected) and made._view.device == 0


def test_packing_by_the_mean_and_repacking():
    w = torch.randn(6, 320)
    expected = PackedMatrix.from_float(w, "trit", per_tensor=True)
    with gpu():
        made = PackedMatrix.from_float(w, "trit", per_tensor=True)
        assert made.equal(expected)
        assert made.repack("int2").repack("trit").equal(expected)


def test_words_of_gptq_pass_through_the_cpu():
    packed = some_matrix("int4", 128, rows=64, zeros=True, perm=True)
    words = packed.to_gptq()
    with gpu(), mock.patch.object(PackedMatrix, "cpu", lambda self: packed):
        assert all(torch.equal(words[name], tensor) for name, tensor in moved(packed).to_gptq().items())


def test_refusals_are_those_of_the_cpu():
    codes, ones = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1)
    codes[2, 3] = 16

    def change(tensor, place, value):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    int4 = some_matrix("int4", 64, rows=4, group_size=32, zeros=True, perm=True)
    trit = some_matrix("trit", 700, rows=4, group_size=-1)
    tensors, layout = int4._tensors, {"format": "int4", "cols": 64, "group_size": 32}
    ternary = {"format": "trit", "cols": 700}
    calls = [
        lambda: PackedMatrix.from_codes(codes, ones, format="int4"),
        lambda: PackedMatrix.from_float(change(torch.ones(3, 32), (1, 2), torch.nan), "int4"),
        lambda: PackedMatrix(tensors[0], change(tensors[1], (3, 1), torch.inf), *tensors[2:], **layout),
        lambda: PackedMatrix(*tensors[:2], change(tensors[2], (1, 0), 16), tensors[3], **layout),
        lambda: PackedMatrix(*tensors[:3], change(tensors[3], 5, 64), **layout),
        lambda: PackedMatrix(*tensors[:3], change(tensors[3], 5, int(tensors[3][0])), **layout),
        lambda: PackedMatrix(trit.codes, change(trit.scales, (2, 0), 0), **ternary),
        lambda: PackedMatrix(change(trit.codes, (2, 1, 5), 1), trit.scales, **ternary),
        lambda: PackedMatrix(trit.codes, trit.scales.expand(4, 2).contiguous(), **ternary),
        lambda: PackedMatrix(tensors[0].int(), *tensors[1:], **layout),
    ]
    messages = []
    for call in calls:
        with pytest.raises((ValueError, TypeError, IndexError)) as refused:
            call()
        messages.append((type(refused.value), str(refused.value)))
    with gpu():
        for call, (kind, message) in zip(calls, messages, strict=True):
            with pytest.raises(kind) as refused:
                call()
            assert str(refused.value) == message


def test_mixed_devices_are_refused():
    packed = some_matrix("int4", 64)
    with gpu():
        there = moved(packed)
    for name, call in {
        "x": lambda: there.matmul(torch.ones(1, 64)),
        "ids": lambda: there.gather(torch.tensor([1])),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cuda:0, where the matrix is, got cpu"):
            call()
    index = {id(packed.codes): 1}
    with (
        mock.patch.object(abi, "device_index", lambda tensor, name: index.get(id(tensor), -1)),
        pytest.raises(ValueError, match="scales: expected a tensor on cuda:1"),
    ):
        moved(packed)


def test_operators_and_gradients():
    packed = some_matrix("int4", 128, perm=True)
    x = torch.randn(3, 128, requires_grad=True)
    weight = packed.unpack()
    with gpu():
        there = moved(packed)
        module = Linear.from_packed(there)
        module(x).sum().backward()
        assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-4)
        layout = (there.format, there.cols, there.group_size)
        ids = torch.tensor([1, 2, 3])
        rows = torch.ops.lowbit.gather(ids, *there._tensors, *layout, torch.float32, "error")
        assert torch.equal(rows, weight[ids])
        bags = torch.ops.lowbit.gather_bags(
            ids, torch.tensor([0, 3]), *there._tensors, *layout, torch.float32, "sum", "error"
        )
        assert torch.allclose(bags, weight[ids].sum(0, keepdim=True), atol=1e-6)


def test_embeddings_wait_only_when_asked():
    packed = some_matrix("int4", 64)
    with gpu():
        embedding = Embedding.from_packed(moved(packed))
        assert not embedding(torch.tensor([50])).any()
        with pytest.raises(IndexError, match=r"ids\[0\]"):
            Embedding.from_packed(moved(packed), checked=True)(torch.tensor([50]))


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("grids", ["updated", "static"])
def test_the_solver_gives_the_bits_of_the_cpu(order, grids):
    weight, x = torch.randn(20, 200), torch.randn(400, 200)
    options = {"format": "int3", "group_size": 48, "symmetric": False, "clip": True, "order": order, "grids": grids}
    expected = solve(weight, x.t() @ x, **options)
    with gpu():
        solution = solve(weight, x.t() @ x, **options)
        assert solution.packed.equal(expected.packed) and solution.packed._view.device == 0
    assert (solution.loss, solution.relative_error) == (expected.loss, expected.relative_error)


def dense_product(view, x, bias, activations):
    return torch.nn.functional.linear(x, abi.unpack(view, 0, view.rows, x.dtype), bias)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantizing_a_model_gives_the_codes_of_the_cpu(monkeypatch, method):
    ids = token_ids(4, 16)
    recipe = {"bits": 4, "group_size": 32, "method": method, "embed_bits": 8, "order": "act", "clip": True}
    here, there = build("qwen3"), build("qwen3")
    # Later modules are calibrated on what the packed ones before them give, which must not differ either.
    monkeypatch.setattr(abi, "matmul", dense_product)
    lowbit.quantize(here, ids, recipe)
    solver = mock.Mock(side_effect=cuda.gptq_solve)
    with gpu(), mock.patch.object(cuda, "gptq_solve", solver):
        lowbit.quantize(there, ids, recipe)
        packed = {name: m.packed for name, m in there.named_modules() if isinstance(m, Linear | Embedding)}
    monkeypatch.undo()
    assert solver.call_count >= len(packed) - 1 > 10
    for name, matrix in packed.items():
        assert matrix._view.device == 0 and matrix.equal(here.get_submodule(name).packed), name
    assert there.lm_head.weight is there.model.embed_tokens.weight
    expected = outputs(here, ids).double()
    with gpu():
        assert relative_error(outputs(there, ids), expected) < 2e-3


def test_ternary_layers():
    layer = TernaryLinear(320, 24)
    expected = layer.pack()
    with gpu():
        assert layer.pack().equal(expected)


def test_commands_say_why_they_cannot_use_a_gpu():
    for name in ("tpu", "cuda:x", "cuda:0:1"):
        with pytest.raises(ValueError, match=f"device: expected cpu, cuda or cuda:N, got '{name}'"):
            parse_device(name)
    assert parse_device("cpu") == torch.device("cpu")
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        pytest.raises(NotImplementedError, match=r"device: cuda cannot be used: this torch .* finds no GPU"),
    ):
        parse_device("cuda")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert parse_device("cuda:0").index == 0


def test_doctor_names_the_gpu():
    facts = doctor.gpu()
    assert facts["usable"] and facts["devices"][0]["name"].startswith("emulated")
    assert facts["state"] == "emulated sm_90, sm_90, 4 multiprocessors; built for emulated"
