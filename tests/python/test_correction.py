"""The least-squares correction of one layer: what it is, when it changes nothing, and when there is none."""

import pytest
import torch

from lowbit.quantize.correction import Drift, LeastSquares, largest_eigenvalue


def moved_inputs(tokens=600, cols=48, moved=0.3, seed=0):
    """Correlated inputs [tokens, cols] and what became of them: shrunken, mixed with each other, and noisy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    mix = (1 - moved) * torch.eye(cols) + moved * cols**-0.5 * torch.randn(cols, cols, generator=generator)
    return x, x @ mix + moved * torch.randn(tokens, cols, generator=generator)


def moments(x, now):
    drift = Drift(x.shape[-1])
    drift.add(x, now)
    return now.T @ now / len(now), drift.matrix


def test_drift_is_the_mean_of_outer_products():
    x, now = moved_inputs(tokens=5000, cols=17)  # more tokens than are converted at a time
    drift = Drift(17)
    for part in (slice(0, 1), slice(1, 4999), slice(4999, 5000), slice(5000, 5000)):
        drift.add(x[part].reshape(-1, 1, 17), now[part].reshape(-1, 1, 17))
    expected = (x - now).double().T @ now.double() / 5000
    assert drift.tokens == 5000 and drift.matrix.dtype == torch.float32
    torch.testing.assert_close(drift.matrix.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(Drift(3).matrix, torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_have_not_moved_leave_the_weights_as_they_are(dtype):
    x = moved_inputs()[0].to(dtype)
    weight = torch.randn(10, 48)
    assert torch.equal(LeastSquares(*moments(x, x))(weight), weight)


def test_it_is_the_formula_of_the_two_moments():
    x, now = (t.double() for t in moved_inputs())
    weight = torch.randn(10, 48).double()
    hessian, cross = now.T @ now / len(now), x.T @ now / len(now)
    lam = 1e-6 * torch.linalg.eigvalsh(hessian)[-1] * torch.eye(48)
    expected = weight @ (cross + lam) @ torch.linalg.inv(hessian + lam)
    corrected = LeastSquares(hessian, cross - hessian)(weight)
    assert corrected.dtype == torch.float32
    torch.testing.assert_close(corrected.double(), expected, rtol=1e-4, atol=1e-5)


def test_outputs_on_moved_inputs_are_as_near_as_they_can_be():
    x, now = moved_inputs()
    weight = torch.randn(10, 48)

    def distance(w):
        return float((now @ w.T - x @ weight.T).norm())

    corrected = LeastSquares(*moments(x, now))(weight)
    best = torch.linalg.lstsq(now, x @ weight.T).solution.T
    assert distance(corrected) < 0.8 * distance(weight)
    assert distance(corrected) < 1.001 * distance(best)


def test_it_holds_on_inputs_that_it_has_not_seen():
    x, now = moved_inputs(tokens=4000)
    weight = torch.randn(10, 48)
    corrected = LeastSquares(*moments(x[:3000], now[:3000]))(weight)
    before, after = ((now[3000:] @ w.T - x[3000:] @ weight.T).norm() for w in (weight, corrected))
    assert after < 0.8 * before


def test_fewer_tokens_than_columns_and_dead_columns_do_no_harm():
    x, now = moved_inputs(tokens=20, cols=48)
    x[:, 5] = now[:, 5] = 0
    weight = torch.randn(10, 48)
    corrected = LeastSquares(*moments(x, now))(weight)
    assert corrected.isfinite().all() and torch.equal(corrected[:, 5], weight[:, 5])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_there_is_none_without_numbers(value):
    correct = LeastSquares(torch.full((4, 4), value), torch.zeros(4, 4))
    assert correct.lower is None
    with pytest.raises(ValueError, match="finite numbers that are not all zero"):
        correct(torch.ones(2, 4))
    assert LeastSquares(torch.eye(4), torch.full((4, 4), float("nan"))).lower is None


def test_the_same_bits_every_time():
    x, now = moved_inputs(tokens=5000)
    weight = torch.randn(33, 48)
    first, second = (LeastSquares(*moments(x, now))(weight) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("cols", [1, 2, 50])
def test_largest_eigenvalue(cols):
    x = moved_inputs(cols=cols)[0].double()
    hessian = x.T @ x
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert 0.8 * expected < largest_eigenvalue(hessian) <= 1.000001 * expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Drift(0), "cols: expected at least 1, got 0"),
        (lambda: Drift(4).add(torch.zeros(3, 4), torch.zeros(2, 4)), r"two of shape \[\.\.\., 4\], got \[3, 4\] and"),
        (lambda: Drift(4).add(torch.zeros(3, 5), torch.zeros(3, 5)), r"two of shape \[\.\.\., 4\], got \[3, 5\]"),
        (lambda: Drift(4).add(torch.zeros(3, 4).long(), torch.zeros(3, 4)), "floating dtype, got torch.int64"),
        (lambda: LeastSquares(torch.zeros(4, 3), torch.zeros(4, 3)), r"two of shape \[K, K\], got \[4, 3\]"),
        (lambda: LeastSquares(torch.eye(4), torch.eye(3)), r"two of shape \[K, K\], got \[4, 4\] and \[3, 3\]"),
        (lambda: LeastSquares(torch.eye(4), torch.eye(4))(torch.ones(2, 5)), r"weight: expected shape \[N, 4\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
