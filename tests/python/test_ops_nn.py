"""The torch side: operators under opcheck and torch.compile, gradients, modules that swap and share their weights."""

import copy
import os

import pytest
import torch
from test_matrix import random_matrix
from torch.library import opcheck

from lowbit import PackedMatrix, ops
from lowbit.nn import Embedding, EmbeddingBag, Linear


def operands(packed):
    return packed.codes, packed.scales, packed.zeros, packed.perm


def layout(packed):
    return packed.format, packed.cols, packed.group_size


@pytest.mark.parametrize("zeros_perm", [False, True])
def test_opcheck(zeros_perm):
    packed = random_matrix(24, 64, "int4", 32, zeros=zeros_perm, perm=zeros_perm)
    x = torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    opcheck(torch.ops.lowbit.matmul, (x, *operands(packed), bias, *layout(packed), "float"))
    opcheck(torch.ops.lowbit.matmul, (torch.randn(2, 3, 64), *operands(packed), None, *layout(packed), "int8"))
    opcheck(
        torch.ops.lowbit.gather, (torch.tensor([[1, 2]]), *operands(packed), *layout(packed), torch.bfloat16, "error")
    )
    bags = (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]), *operands(packed), *layout(packed))
    opcheck(torch.ops.lowbit.gather_bags, (*bags, torch.float16, "mean", "error", 3))
    weights = torch.randn(3, requires_grad=True)
    opcheck(torch.ops.lowbit.gather_bags, (*bags, torch.float32, "sum", "error", 3, weights))
    opcheck(torch.ops.lowbit.unpack, (*operands(packed), *layout(packed), torch.float32))


@pytest.mark.parametrize("perm", [False, True])
def test_gradients_of_input_and_bias(perm):
    packed = random_matrix(24, 64, "int3", 32, zeros=True, perm=perm)
    module = Linear.from_packed(packed, torch.nn.Parameter(torch.randn(24)))
    x = torch.randn(2, 5, 64, requires_grad=True)
    weights = torch.randn(2, 5, 24)
    (module(x) * weights).sum().backward()
    assert torch.allclose(x.grad, weights @ packed.unpack(), atol=1e-5)
    assert torch.allclose(module.bias.grad, weights.sum((0, 1)), atol=1e-5)
    assert all(not p.requires_grad for name, p in module.named_parameters() if name != "bias")


def test_operators_need_no_python_where_torch_has_its_stable_abi():
    """test_torch_kernels.py has what they do; it is skipped where they are not."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    wanted = (2, 10) <= (major, minor) < (3, 0) and os.environ.get("LOWBIT_TORCH_KERNELS") != "python"
    assert wanted == ops._NATIVE


def test_compile_fullgraph_gives_the_same_bits():
    table = random_matrix(50, 64, "int8")
    model = torch.nn.Sequential(
        Embedding.from_packed(table), Linear.from_packed(random_matrix(64, 64, "int4", 32)), Linear.from_packed(table)
    )
    ids = torch.tensor([[3, 1, 49]])
    assert torch.equal(torch.compile(model, fullgraph=True)(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_is_a_linear(dtype):
    packed = random_matrix(24, 64, "int4", 32)
    module = Linear.from_packed(packed, torch.randn(24))
    x = torch.randn(2, 3, 64, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    expected = torch.nn.functional.linear(x.float(), packed.unpack(), module.bias)
    assert torch.allclose(y.float(), expected, atol=2e-3, rtol=1e-2)
    for empty in ((0, 64), (2, 0, 64)):
        assert module(torch.empty(empty, dtype=dtype)).shape == (*empty[:-1], 24)
    strided = torch.randn(3, 128, dtype=dtype)[:, ::2]
    assert torch.equal(module(strided), module(strided.contiguous()))
    assert torch.equal(module(x[0, 0]), y[0, 0])


def test_embedding_and_head_share_one_table():
    table = random_matrix(50, 64, "int4", 64)
    embedding, head = Embedding.from_packed(table, padding_idx=0), Linear.from_packed(table)
    assert embedding.weight.data_ptr() == head.weight.data_ptr() == table.codes.data_ptr()
    assert embedding.packed.equal(head.packed)
    assert torch.equal(embedding(torch.tensor([[7]]))[0, 0], table.unpack()[7])
    assert embedding.padding_idx == 0
    with pytest.raises(IndexError, match="ids"):
        embedding(torch.tensor([50]))


def test_a_tied_table_stays_one_wherever_it_goes():
    table = random_matrix(50, 64, "int4", 32, zeros=True, scale_dtype=torch.float32)
    model = torch.nn.Sequential(Embedding.from_packed(table), Linear.from_packed(table, torch.randn(50)))
    embedding, head = model
    alone = Linear.from_packed(random_matrix(50, 64, "int4", 32))

    def move(tensor):  # what to(device) does to every tensor, as far as one device goes
        return tensor.clone()

    for fn in (move, lambda tensor: tensor.clone().half() if tensor.is_floating_point() else tensor.clone(), move):
        old = embedding.weight
        model._apply(fn)
        assert embedding.weight is head.weight is not old and embedding.weight_zero is head.weight_zero
        assert embedding.weight_scale is head.weight_scale and head.weight_scale.dtype == torch.float32
    assert embedding.packed.equal(table) and embedding.dtype == torch.float16
    assert model._apply(torch.Tensor.float) is model and embedding.dtype == torch.float32
    # What a function gave is not given again once the tensor has changed, or is another one.
    table.codes[0] = 0
    embedding.load(table, replace=True), alone._apply(move), embedding._apply(move)
    assert not embedding.weight[0].any() and embedding.weight is not alone.weight


def test_embed_scale_rounds_like_the_model_does():
    table = random_matrix(5, 64, "int8")
    embedding = Embedding.from_packed(table, dtype=torch.bfloat16, embed_scale=64**0.5 + 0.01)
    expected = table.unpack(torch.bfloat16)[[2]] * torch.tensor(64**0.5 + 0.01, dtype=torch.bfloat16)
    assert torch.equal(embedding(torch.tensor([2])), expected)


def test_policies_of_ids_outside():
    table = random_matrix(5, 64, "int8")
    rows, ids = table.unpack(), torch.tensor([[1, 5], [-7, 4]])
    for policy in (None, "error"):
        with pytest.raises(IndexError, match=r"ids\[1\]: expected a row in \[0, 5\), got 5"):
            Embedding.from_packed(table, policy=policy)(ids)
    zero, clamp = (Embedding.from_packed(table, policy=policy) for policy in ("zero", "clamp"))
    nothing = torch.zeros(64)
    assert torch.equal(zero(ids), torch.stack([rows[1], nothing, nothing, rows[4]]).view(2, 2, 64))
    assert torch.equal(clamp(ids), rows[torch.tensor([[1, 4], [0, 4]])])
    assert torch.equal(torch.compile(clamp, fullgraph=True)(ids), clamp(ids))
    # What a module decides on a GPU, where an error would be waited for.
    assert [Embedding(5, 64, checked=c, policy=p)._policy(0) for c, p in ((0, None), (1, None), (1, "clamp"))] == [
        "zero",
        "error",
        "clamp",
    ]
    for make in (Embedding, EmbeddingBag):
        with pytest.raises(ValueError, match="policy: expected one of error, zero, clamp"):
            make(5, 64, policy="wrap")


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_embedding_bag_is_an_embedding_bag(mode, padding_idx, weighted):
    table = random_matrix(30, 65, "int4", 32, zeros=True)
    ids = torch.randint(0, 30, (24,), generator=torch.Generator().manual_seed(1))
    ids[5:7] = 3
    offsets, weights = torch.tensor([0, 4, 4, 11]), torch.randn(24) if weighted else None
    for include_last in (False, True):
        theirs = torch.nn.EmbeddingBag.from_pretrained(
            table.unpack(), mode=mode, include_last_offset=include_last, padding_idx=padding_idx
        )
        ours = EmbeddingBag.from_packed(table, mode, include_last, padding_idx)
        assert ours.padding_idx == theirs.padding_idx
        starts = torch.cat([offsets, torch.tensor([24])]) if include_last else offsets
        calls = [(ids.view(6, 4), None), (ids, starts), (ids.int(), starts.int())]
        for input, starts in calls:
            sample = None if weights is None else weights.view(input.shape)
            if weighted and mode == "mean":
                for module in (theirs, ours):
                    with pytest.raises(NotImplementedError, match="weights"):
                        module(input, starts, sample)
                continue
            expected = theirs(input, starts, sample)
            assert torch.allclose(ours(input, starts, sample), expected, atol=1e-6)
    ours.load(table.unpack(), replace=True)
    if not (weighted and mode == "mean"):
        assert torch.equal(ours(*calls[-1], weights), theirs(*calls[-1], weights))
    assert ours.half().dtype == torch.float16


def test_a_compiled_bag_has_the_same_bits():
    module = EmbeddingBag.from_packed(random_matrix(30, 64, "int4"), "sum")
    arguments = torch.arange(12), torch.tensor([0, 5]), torch.randn(12)
    assert torch.equal(torch.compile(module, fullgraph=True)(*arguments), module(*arguments))


def test_gradients_of_the_weights_of_a_bag():
    table = random_matrix(30, 65, "int3", 32)
    ids, offsets = torch.tensor([3, 29, 4, 4, 3, 7]), torch.tensor([0, 2, 2, 5])
    theirs = torch.nn.EmbeddingBag.from_pretrained(table.unpack(), mode="sum", padding_idx=4)
    ours = EmbeddingBag.from_packed(table, "sum", padding_idx=4)
    gradients = []
    for module in (theirs, ours):
        weights = torch.arange(1.0, 7, requires_grad=True)
        module(ids, offsets, weights).square().sum().backward()
        gradients.append(weights.grad)
    assert torch.allclose(*gradients, atol=1e-5) and gradients[0][:2].all()
    # Ids before the first bag and behind the last have none.
    weights = torch.ones(6, requires_grad=True)
    table.gather_bags(ids, torch.tensor([1, 5]), weights=weights).sum().backward()
    assert torch.allclose(weights.grad[1:5], table.unpack()[ids[1:5]].sum(1), atol=1e-5)
    assert weights.grad[0] == 0 and weights.grad[5] == 0


def test_embedding_bag_refuses():
    module = EmbeddingBag.from_packed(random_matrix(30, 64, "int4"))
    ids = torch.arange(6)
    for arguments, error, message in (
        ((ids,), ValueError, "offsets: expected 1 dimension .* got None"),
        ((ids, ids.view(2, 3)), ValueError, r"offsets: expected 1 dimension .* got \[2, 3\]"),
        ((ids.view(2, 3), ids), ValueError, "offsets: expected None"),
        ((ids.view(1, 2, 3),), ValueError, "input: expected 1 or 2 dimensions, got 3"),
        ((ids, torch.tensor([0.0])), TypeError, "offsets dtype"),
        ((ids, torch.tensor([0, 4, 2])), ValueError, r"offsets\[2\]: expected at least 4"),
        ((ids.view(2, 3), None, torch.ones(6)), ValueError, r"per_sample_weights: expected shape \[2, 3\], got \[6\]"),
        ((ids + 27, torch.tensor([0])), IndexError, r"ids\[3\]: expected a row in \[0, 30\), got 30"),
    ):
        with pytest.raises(error, match=message):
            module(*arguments)
    with pytest.raises(NotImplementedError, match='mode: expected "sum" or "mean" of a packed table, got "max"'):
        EmbeddingBag(30, 64, mode="max")
    with pytest.raises(ValueError, match="padding_idx: expected a row of 30"):
        EmbeddingBag(30, 64, padding_idx=30)
    module.unload()
    with pytest.raises(RuntimeError, match="weight: expected one to be loaded, got none"):
        module(ids.view(2, 3))


@pytest.mark.parametrize("make", [lambda p: Linear.from_packed(p), lambda p: Embedding.from_packed(p)])
def test_load_and_unload(make):
    packed, dense = random_matrix(24, 64, "int4", 32), torch.randn(24, 64)
    module = make(packed)
    argument = torch.randn(2, 64) if isinstance(module, Linear) else torch.tensor([1, 2])
    before = module(argument)
    assert "weight_scale" in module.state_dict()
    held = module.unload()
    assert held.equal(packed) and not module.state_dict()
    with pytest.raises(RuntimeError, match="weight: expected one to be loaded, got none"):
        module(argument)
    module.load(dense)
    expected = argument @ dense.t() if isinstance(module, Linear) else dense[argument]
    assert torch.allclose(module(argument), expected) and list(module.state_dict()) == ["weight"]
    with pytest.raises(RuntimeError, match="weight: expected none while another is loaded"):
        module.load(held)
    with pytest.raises(ValueError, match="weight: expected shape"):
        module.load(torch.randn(24, 63), replace=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.load("nowhere.safetensors", replace=True)
    with pytest.raises(TypeError, match="weight: expected a PackedMatrix, a tensor or a path, got list"):
        module.load([1.0], replace=True)
    with pytest.raises(TypeError, match="weight: expected a float tensor"):
        module.load(torch.zeros(24, 64, dtype=torch.int8), replace=True)
    assert torch.allclose(module(argument), expected)  # a refused load changes nothing
    module.load(held, replace=True)
    assert torch.equal(module(argument), before)


def test_a_float_weight_of_another_dtype_computes_in_its_own():
    dense, bias, x = torch.randn(24, 64), torch.randn(24).bfloat16(), torch.randn(2, 64).bfloat16()
    module = Linear(64, 24, bias)
    module.load(dense)
    expected = torch.nn.functional.linear(x.float(), dense, bias.float()).bfloat16()
    assert torch.equal(module(x), expected)
    embedding = Embedding(24, 64, dtype=torch.bfloat16)
    embedding.load(dense)
    assert torch.equal(embedding(torch.tensor([3])), dense[[3]].bfloat16())


def test_assigning_the_codes_of_a_matrix_ties_its_scales_too():
    """Transformers ties by assigning `weight`."""
    table, other = random_matrix(24, 64, "int4", 32), random_matrix(24, 64, "int4", 32)
    embedding, x = Embedding.from_packed(table), torch.randn(2, 64)
    unloaded = Linear(64, 24)
    as_float = Linear(64, 24)
    as_float.load(torch.randn(24, 64))
    for head in (Linear.from_packed(other), unloaded, as_float):
        head.weight = embedding.weight
        assert head.packed.equal(table) and head.weight_scale is embedding.weight_scale
        assert torch.equal(head(x), table.matmul(x))
    head, embedding = Linear.from_packed(other), Embedding.from_packed(table)
    torch.nn.ModuleList([head, embedding])._apply(torch.clone)  # as to() does
    head.weight = embedding.weight
    assert head.packed.equal(table) and head.weight_scale is embedding.weight_scale is not table.scales
    head.weight = torch.nn.Parameter(torch.ones(24, 64))
    assert head.packed is None and torch.allclose(head(x)[:, :1], x.sum(1, keepdim=True), atol=1e-4)


def test_modules_copy_and_move():
    module = Linear.from_packed(random_matrix(24, 64, "int4", 32, zeros=True), torch.randn(24))
    x = torch.randn(2, 64)
    clone = copy.deepcopy(module)
    assert clone.weight.data_ptr() != module.weight.data_ptr() and torch.equal(clone(x), module(x))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert list(state) == ["bias", "weight", "weight_scale", "weight_zero"]
    clone.load_state_dict(state)
    assert torch.equal(clone(x), module(x))
    assert torch.equal(module.to("cpu")(x), clone(x))


def test_a_cast_changes_outputs_and_not_the_packed_weight():
    packed = random_matrix(24, 64, "int4", 32, scale_dtype=torch.float32)
    linear, embedding = Linear.from_packed(packed, torch.randn(24)), Embedding.from_packed(packed)
    weight = packed.unpack()
    for cast, dtype in ((torch.nn.Module.half, torch.float16), (torch.nn.Module.bfloat16, torch.bfloat16)):
        cast(linear), cast(embedding)
        assert linear.weight.dtype == torch.uint8 and linear.weight_scale.dtype == torch.float32
        assert linear.bias.dtype == dtype and torch.equal(linear.packed.unpack(), weight)
        assert linear(torch.randn(2, 64, dtype=dtype)).dtype == dtype
        assert torch.equal(embedding(torch.tensor([3])), weight[[3]].to(dtype))
    assert embedding.double().dtype == torch.float64  # which gather refuses, by name
    with pytest.raises(TypeError, match="dtype: expected one of"):
        embedding(torch.tensor([3]))


def test_bad_bias_and_activations():
    packed = random_matrix(24, 64, "int4", 32)
    with pytest.raises(ValueError, match=r"bias: expected shape \[24\]"):
        Linear.from_packed(packed, torch.randn(23))
    with pytest.raises(ValueError, match="activations: expected one of float, int8"):
        Linear.from_packed(packed, activations="fp8")


def test_repr_names_the_format():
    packed = PackedMatrix.from_float(torch.randn(8, 64), "int2", 32, symmetric=False)
    assert "int2" in repr(packed) and "zeros" in repr(packed) and "8x64" in repr(packed)
    assert "int2, group_size=32" in repr(Linear.from_packed(packed))
