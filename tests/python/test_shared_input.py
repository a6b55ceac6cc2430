"""Products of one input in one call: matmul_group, and layers that find out that they are called together."""

import copy
import threading

import pytest
import torch
from checkpoint_models import llama, logits, pack

import lowbit
from lowbit import _C, abi
from lowbit.nn import Linear


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


@pytest.fixture
def calls(monkeypatch):
    """How many matrices each product since has had."""
    sizes = []
    single, group = abi.matmul, abi.matmul_group
    monkeypatch.setattr(abi, "matmul", lambda *a: sizes.append(1) or single(*a))
    monkeypatch.setattr(abi, "matmul_group", lambda views, *a: sizes.append(len(views)) or group(views, *a))
    return sizes


def without_sharing(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.shares_input = False
    return model


def test_layers_that_read_one_tensor_are_computed_together(calls):
    model = pack(llama(), table="int8")
    expected = logits(without_sharing(copy.deepcopy(model)))
    calls.clear()
    with torch.no_grad():
        for ids in (torch.arange(9)[None], torch.arange(9)[None], torch.arange(4)[None]):
            calls.clear()
            model(ids)
    assert calls == [3, 1, 2, 1] * 2 + [1]  # queries, keys and values; output; gate and up; down; and the head
    assert torch.equal(logits(model), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected) and torch.equal(logits(copied), expected)


def layers(count=3):
    made = [Linear.from_packed(w) for w in matrices(rows=(40, 16, 8))[:count]]
    x = torch.randn(2, 192)
    for layer in [*made, Linear.from_packed(matrices()[0])]:
        layer(x if layer in made else torch.randn(2, 192))
    return made


def test_results_are_for_the_very_input():
    first, second, _ = layers()
    x = torch.randn(2, 192)
    expected = second.packed.matmul(x)
    first(x)
    assert torch.equal(second(x.clone()), expected)  # equal, but not the same
    first(x)
    x.mul_(2)  # the same, but changed
    assert torch.equal(second(x), second.packed.matmul(x)) and not torch.equal(second(x), expected)
    first(x)
    second.load(lowbit.PackedMatrix.from_float(torch.randn(16, 192), "int4"), replace=True)
    y = torch.randn(2, 192)
    first(y)
    assert torch.equal(second(y), second.packed.matmul(y))


def test_a_weight_loaded_between_two_calls_counts():
    first, second, _ = layers()
    x = torch.randn(2, 192)
    first(x)
    second.load(lowbit.PackedMatrix.from_float(torch.randn(16, 192), "int4"), replace=True)
    assert torch.equal(second(x), second.packed.matmul(x))


def test_what_does_not_belong_together_is_let_go(calls):
    first, second, third = layers()
    assert first.shared_input is second.shared_input is third.shared_input is not None
    for _ in range(6):
        first(torch.randn(2, 192))
    assert first.shared_input is None and not first.shares_input
    calls.clear()
    first(torch.randn(2, 192))
    assert calls == [1]


def test_nothing_is_shared_in_inference_mode_or_under_gradients(calls):
    first, second, _ = layers()
    calls.clear()
    with torch.inference_mode():
        x = torch.randn(2, 192)
        assert torch.equal(first(x), first.packed.matmul(x)) and torch.equal(second(x), second.packed.matmul(x))
    assert max(calls) == 1
    x = torch.randn(2, 192, requires_grad=True)
    (first(x).sum() + second(x).sum()).backward()
    assert torch.allclose(x.grad[0], first.packed.unpack().sum(0) + second.packed.unpack().sum(0), atol=1e-3)


def test_threads_do_not_meet():
    first, second, _ = layers()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(2, 192, generator=generator)
            if not (torch.equal(first(x), first.packed.matmul(x)) and torch.equal(second(x), second.packed.matmul(x))):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
