"""Products of one input in one call."""

import pytest
import torch

import lowbit
from lowbit import _C


def matrices(cols=192, rows=(40, 16, 1)):
    formats = ("int4", "int8", "trit")
    return [lowbit.PackedMatrix.from_float(torch.randn(n, cols), f, 64) for n, f in zip(rows, formats, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_group_gives_the_bits_of_each(dtype, activations):
    weights, biases = matrices(), [torch.randn(40), None, torch.randn(1, dtype=dtype)]
    for shape in ((192,), (1, 192), (3, 5, 192), (20, 192), (0, 192)):
        x = torch.randn(shape).to(dtype)
        together = lowbit.matmul_group(x, weights, biases, activations)
        alone = [w.matmul(x, b, activations) for w, b in zip(weights, biases, strict=True)]
        assert all(torch.equal(y, e) and y.dtype == dtype for y, e in zip(together, alone, strict=True))
    many = [weights[0]] * (_C.MAX_GROUP + 3)
    assert all(torch.equal(y, weights[0].matmul(x)) for y in lowbit.matmul_group(x, many))


def test_a_group_refuses():
    weights, x = matrices(), torch.randn(2, 192)
    with pytest.raises(ValueError, match=r"x: expected 192 columns \(in_features\), got shape \[2, 64\]"):
        lowbit.matmul_group(torch.randn(2, 64), weights)
    with pytest.raises(ValueError, match=r"bias: expected shape \[16\], got \[40\]"):
        lowbit.matmul_group(x, weights, [None, torch.randn(40), None])
    with pytest.raises(ValueError, match="biases: expected one for each of 3 matrices, got 1"):
        lowbit.matmul_group(x, weights, [None])
    with pytest.raises(ValueError, match="activations"):
        lowbit.matmul_group(x, weights, activations="int9")
    assert lowbit.matmul_group(x, []) == []
