import pytest
import torch

from lowbit.quantize.hessian import Hessian


def second_moment(x: torch.Tensor) -> torch.Tensor:
    x = x.double().reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


@pytest.mark.parametrize("cols", [1, 17, 512, 513, 1100])  # around the width of a block of columns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_mean_of_outer_products(cols, dtype):
    torch.manual_seed(cols)
    x = torch.randn(3, 50, cols).to(dtype)
    hessian = Hessian(cols)
    hessian.add(x)
    expected = second_moment(x)
    assert hessian.tokens == 150
    assert hessian.matrix.dtype == torch.float32
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_products_are_not_rounded():
    # 129/128 is a bfloat16; its square has more bits than one keeps.
    hessian = Hessian(1)
    hessian.add(torch.tensor([[1.0078125]], dtype=torch.bfloat16))
    assert hessian.matrix.item() == 1.0078125**2


def test_calls_of_any_shape_add_up():
    torch.manual_seed(0)
    x = torch.randn(5000, 8)  # more tokens than are converted at a time
    whole, parts = Hessian(8), Hessian(8)
    whole.add(x)
    for part in (x[:1], x[1:4000].reshape(3, 1333, 8), x[4000:], x[:0]):
        parts.add(part)
    assert parts.tokens == whole.tokens == 5000
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-5, atol=1e-6)


def test_a_single_vector_is_one_token():
    hessian = Hessian(3)
    hessian.add(torch.tensor([1.0, 2.0, 3.0]))
    assert hessian.tokens == 1
    assert torch.equal(hessian.matrix, torch.tensor([[1.0, 2, 3], [2, 4, 6], [3, 6, 9]]))


def test_is_zero_before_the_first_token():
    assert torch.equal(Hessian(4).matrix, torch.zeros(4, 4))


def test_inputs_are_not_changed_and_need_no_gradient():
    x = torch.randn(10, 4, requires_grad=True)
    before = x.detach().clone()
    hessian = Hessian(4)
    hessian.add(x)
    assert torch.equal(x.detach(), before)
    assert not hessian.matrix.requires_grad


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 5), r"x: expected shape \[..., 4\], got \[3, 5\]"),
        (torch.tensor(1.0), r"x: expected shape \[..., 4\], got \[\]"),
        (torch.zeros(3, 4, dtype=torch.int64), "x: expected a floating dtype, got torch.int64"),
    ],
)
def test_wrong_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        Hessian(4).add(x)


def test_no_columns_is_an_error():
    with pytest.raises(ValueError, match="cols: expected at least 1, got 0"):
        Hessian(0)
