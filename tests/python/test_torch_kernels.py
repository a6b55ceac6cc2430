"""The operators' kernels that need no Python: the same tensors, the same errors, and what is not plain passed on."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_matrix import random_matrix

from lowbit import _C, abi, ops
from lowbit.abi import FORMATS

OPERATORS = torch.ops.lowbit
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(not ops._NATIVE, reason="this torch lacks the C functions of 2.10")


def layout(packed):
    return packed.format, packed.cols, packed.group_size


def matrices():
    for format in FORMATS:
        options = [{}] if format == "trit" else [{}, {"zeros": True}, {"perm": True}]
        yield from (random_matrix(33, 96, format, 32, **more) for more in options)


def refused(call) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        call()
    return error.type, str(error.value)


@pytest.fixture
def no_python(monkeypatch):
    """The verbs in Python may not be called."""

    def fail(*_):
        raise AssertionError("went through Python")

    for verb in ("gather", "matmul"):
        monkeypatch.setattr(abi, verb, fail)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_python(dtype, request):
    ids = [
        torch.tensor(3),
        torch.tensor([32, 0], dtype=torch.int32),
        torch.randint(0, 33, (2, 3)),
        torch.empty(0, 2).int(),
    ]
    cases = [(packed, some, packed.gather(some, dtype=dtype)) for packed in matrices() for some in ids]
    request.getfixturevalue("no_python")
    for packed, some, expected in cases:
        got = OPERATORS.gather(some, *packed._tensors, *layout(packed), dtype, "error")
        assert got.dtype == dtype and torch.equal(got, expected)
    packed = random_matrix(33, 96, "int4", 32)
    beyond = torch.tensor([-1, 40, 5])
    rows = packed.unpack(dtype=dtype)
    for policy, expected in (("zero", rows[[0, 0, 5]] * torch.tensor([[0], [0], [1]])), ("clamp", rows[[0, 32, 5]])):
        assert torch.equal(OPERATORS.gather(beyond, *packed._tensors, *layout(packed), dtype, policy), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_without_python(dtype, request):
    inputs = [torch.randn(96), torch.randn(1, 96), torch.randn(2, 9, 96), torch.randn(0, 96)]
    biases = [None, *(torch.randn(33).to(kind) for kind in FLOATS)]
    cases = []
    for packed in matrices():
        for x in (x.to(dtype) for x in inputs):
            for bias in biases:
                for mode in abi.ACTIVATIONS:
                    cases.append((packed, x, bias, mode, packed.matmul(x, bias=bias, activations=mode)))
    request.getfixturevalue("no_python")
    for packed, x, bias, mode, expected in cases:
        got = OPERATORS.matmul(x, *packed._tensors, bias, *layout(packed), mode)
        assert got.dtype == dtype and torch.equal(got, expected)


def test_a_kernel_of_the_table_ran():
    packed = random_matrix(33, 96, "int4", 32)
    OPERATORS.matmul(torch.randn(1, 96), *packed._tensors, None, *layout(packed), "float")
    assert _C.last_kernel("matmul") == _C.selected_kernel("matmul", FORMATS["int4"])


def test_what_is_not_plain_goes_through_python(no_python):
    packed = random_matrix(33, 96, "int4", 32)
    tensors, rest = packed._tensors, layout(packed)
    calls = [
        lambda: OPERATORS.gather(torch.arange(8).view(2, 4).t(), *tensors, *rest, torch.float32, "error"),
        lambda: OPERATORS.gather(torch.tensor([1]), *tensors, *rest, torch.float32, "error", 1),
        lambda: OPERATORS.gather(torch.zeros((1,) * 17).int(), *tensors, *rest, torch.float32, "error"),
        lambda: OPERATORS.matmul(torch.randn(96, 2).t(), *tensors, None, *rest, "float"),
        lambda: OPERATORS.matmul(torch.randn(2, 96), *tensors, torch.randn(66)[::2], *rest, "float"),
    ]
    for call in calls:
        assert refused(call) == (AssertionError, "went through Python")


def test_what_is_not_plain():
    packed = random_matrix(33, 96, "int4", 32, perm=True)
    tensors, rest = packed._tensors, layout(packed)
    ids = torch.arange(8).view(2, 4).t()
    rows = packed.unpack()
    assert torch.equal(OPERATORS.gather(ids, *tensors, *rest, torch.float32, "error"), rows[ids])
    padded = rows[ids].masked_fill(ids[..., None] == 3, 0)
    assert torch.equal(OPERATORS.gather(ids, *tensors, *rest, torch.float32, "error", 3), padded)
    deep = torch.randint(0, 33, (1,) * 16 + (2,))
    assert torch.equal(OPERATORS.gather(deep, *tensors, *rest, torch.float32, "error"), rows[deep])
    x, bias = torch.randn(96, 2), torch.randn(66)
    expected = packed.matmul(x.t().contiguous(), bias=bias[::2].contiguous())
    assert torch.equal(OPERATORS.matmul(x.t(), *tensors, bias[::2], *rest, "float"), expected)


def test_errors_are_those_of_python():
    packed, other = random_matrix(33, 96, "int4", 32, zeros=True), random_matrix(33, 96, "int8", 32)
    tensors, rest = packed._tensors, layout(packed)
    codes, scales, zeros, _ = tensors
    ids, x = torch.tensor([3]), torch.randn(1, 96)
    perm = torch.arange(96, dtype=torch.int32)
    gathers = [
        (torch.tensor([2, 33]), *tensors, *rest, torch.float32, "error"),
        (torch.tensor([2.0]), *tensors, *rest, torch.float32, "error"),
        (ids, *tensors, *rest, torch.float64, "error"),
        (ids, *tensors, *rest, torch.int8, "error"),
        (ids, *tensors, *rest, torch.float32, "wrap"),
        (ids, *tensors, *rest, torch.float32, "error", 33),
        (ids, *tensors, "int5", 96, 32, torch.float32, "error"),
        (ids, *tensors, "int4", 4096, 32, torch.float32, "error"),
        (ids, *tensors, "int4", 0, 32, torch.float32, "error"),
        (ids, *tensors, "int4", 96, 17, torch.float32, "error"),
        (ids, *other._tensors, *rest, torch.float32, "error"),
        (ids, codes.int(), scales, zeros, None, *rest, torch.float32, "error"),
        (ids, codes.view(-1), scales, zeros, None, *rest, torch.float32, "error"),
        (ids, codes, scales[0], zeros, None, *rest, torch.float32, "error"),
        (ids, codes, scales[:5], zeros[:5], None, *rest, torch.float32, "error"),
        (ids, codes, scales.double(), zeros, None, *rest, torch.float32, "error"),
        (ids, codes, scales, zeros[1:], None, *rest, torch.float32, "error"),
        (ids, codes, scales, zeros.int(), None, *rest, torch.float32, "error"),
        (ids, codes, scales, zeros, perm.long(), *rest, torch.float32, "error"),
        (ids, codes, scales, zeros, perm[1:], *rest, torch.float32, "error"),
        (ids, codes, scales, zeros, perm + 1, *rest, torch.float32, "error"),
    ]
    matmuls = [
        (x[:, 1:], *tensors, None, *rest, "float"),
        (torch.tensor(1.0), *tensors, None, *rest, "float"),
        (x.double(), *tensors, None, *rest, "float"),
        (x, *tensors, torch.randn(32), *rest, "float"),
        (x, *tensors, torch.randn(33).double(), *rest, "float"),
        (x, *tensors, torch.randn(33, 1), *rest, "float"),
        (x, *tensors, None, *rest, "int4"),
        (x, codes, scales, zeros, perm + 1, None, *rest, "float"),
    ]
    for operator, function, calls in (
        (OPERATORS.gather, ops._gather, gathers),
        (OPERATORS.matmul, ops._matmul, matmuls),
    ):
        for arguments in calls:
            assert refused(lambda: operator(*arguments)) == refused(lambda: function(*arguments))  # noqa: B023


def test_an_error_is_raised_once_and_only_where_it_was_made():
    packed = random_matrix(33, 96, "int4", 32)
    rest = layout(packed)
    OPERATORS._gather(torch.tensor([99]), *packed._tensors, *rest, torch.float32, "error")  # by hand: nobody raises it
    ids = torch.arange(8).view(2, 4).t()
    assert torch.equal(OPERATORS.gather(ids, *packed._tensors, *rest, torch.float32, "error"), packed.unpack()[ids])
    with pytest.raises(IndexError):
        OPERATORS.gather(torch.tensor([99]), *packed._tensors, *rest, torch.float32, "error")
    assert torch.equal(OPERATORS.gather(ids, *packed._tensors, *rest, torch.float32, "error"), packed.unpack()[ids])


def test_threads_keep_their_errors_apart():
    packed = random_matrix(33, 96, "int4", 32)

    def look_up(id):
        try:
            return OPERATORS.gather(torch.tensor([id]), *packed._tensors, *layout(packed), torch.float32, "error")
        except IndexError as error:
            return str(error)

    ids = [i % 66 for i in range(2000)]
    rows = packed.unpack()
    with ThreadPoolExecutor(8) as pool:
        for id, got in zip(ids, pool.map(look_up, ids), strict=True):
            assert torch.equal(got[0], rows[id]) if id < 33 else got == f"ids[0]: expected a row in [0, 33), got {id}"


WITHOUT = """
import torch
from lowbit import PackedMatrix, _C, ops
assert not ops._NATIVE
packed = PackedMatrix.from_float(torch.randn(8, 32), "int4", group_size=32)
layout = (packed.format, packed.cols, packed.group_size)
rows = torch.ops.lowbit.gather(torch.tensor([1]), *packed._tensors, *layout, torch.float32, "error")
assert torch.equal(rows, packed.unpack()[1:2])
assert not _C.register_torch_kernels("/no/such/libtorch_cpu.so")
assert not _C.register_torch_kernels(_C.__file__)  # loaded, but not torch
"""


def test_without_the_kernels():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "LOWBIT_TORCH_KERNELS": "python"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
