"""TernaryLinear and models made ready for ternary training: the forward and its gradients, and the way to packed form
and back, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import PackedMatrix
from lowbit.nn import Linear, TernaryLinear
from lowbit.ternary import weight_quant

transformers = pytest.importorskip("transformers")
from tiny_models import build, outputs, token_ids  # noqa: E402


def latent(rows=24, cols=64, dtype=torch.float32, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)


def layer(dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    module = TernaryLinear(64, 24, bias, dtype=dtype, **options)
    with torch.no_grad():
        module.weight.copy_(latent())
    return module


def literal(weight):
    """The definition as it is written, one scale for the matrix."""
    s = 1 / weight.abs().mean().clamp(min=1e-5)
    return (weight * s).round().clamp(-1, 1) / s


# ---- the quantizer ----


def test_weight_quant_is_the_definition():
    weight = latent()
    trits, scale = weight_quant(weight)
    assert set(trits.unique().tolist()) == {-1, 0, 1} and scale.shape == (1, 1)
    assert torch.equal(trits, literal(weight).sign())
    torch.testing.assert_close(trits * scale, literal(weight), rtol=2**-22, atol=0)


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_groups_are_matrices_of_their_own(group_size):
    trits, scales = weight_quant(latent(), group_size)
    assert scales.shape == (24, 64 // group_size)
    for row in range(24):
        for g, part in enumerate(latent()[row].split(group_size)):
            expected = weight_quant(part[None])
            assert torch.equal(trits[row, g * group_size :][:group_size], expected[0][0])
            assert scales[row, g] == expected[1]


def test_the_storage_dtype_may_be_what_it_is_computed_in():
    """MatMulFreeLLM's way: every step rounded to bfloat16, which moves weights at the borders."""
    weight = latent(256, 256, torch.bfloat16)
    trits, scale = weight_quant(weight, dtype=None)
    assert torch.equal(trits * scale, literal(weight))
    assert (trits != weight_quant(weight)[0]).any()


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_ternary_keeps_its_scale(dtype, group_size):
    module = layer(dtype, group_size=group_size)
    once = module.quantized_weight().detach()
    again = TernaryLinear(64, 24, dtype=dtype, group_size=group_size)
    again.weight.data = once
    assert torch.equal(again.quantized_weight(), once)
    assert again.pack().equal(module.pack())


def test_zeros_stay_zeros():
    trits, scale = weight_quant(torch.zeros(2, 16))
    assert not trits.any() and scale.item() == 1
    assert weight_quant(torch.full((2, 16), 1e-9).index_fill(1, torch.tensor([0]), 2e-9))[1].item() == pytest.approx(
        1e-5
    )


# ---- the module ----


def test_it_is_a_linear_layer_over_ternary_weights():
    module, x = layer(), torch.randn(2, 3, 64)
    trits, scale = weight_quant(module.weight)
    assert torch.equal(module(x), F.linear(x, trits * scale, module.bias))
    assert isinstance(module, nn.Linear) and (module.in_features, module.out_features) == (64, 24)
    assert "group_size=matrix" in repr(module)


def test_the_state_is_that_of_nn_linear():
    plain, module = nn.Linear(64, 24), layer()
    plain.load_state_dict(module.state_dict())
    made = TernaryLinear.from_linear(plain.eval())
    assert made.weight is plain.weight and made.bias is plain.bias and not made.training
    x = torch.randn(3, 64)
    assert torch.equal(made(x), module(x))
    assert TernaryLinear.from_linear(nn.Linear(64, 24, bias=False)).bias is None


def test_gradients_pass_straight_through():
    module, x = layer(), torch.randn(5, 64, requires_grad=True)
    module(x).square().sum().backward()
    plain, again = nn.Linear(64, 24), x.detach().clone().requires_grad_()
    plain.weight.data, plain.bias.data = module.quantized_weight().detach(), module.bias.detach()
    plain(again).square().sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)
    assert torch.equal(module.bias.grad, plain.bias.grad)
    assert torch.equal(x.grad, again.grad)


def test_int8_activations_pass_straight_through_too():
    module, x = layer(activations="int8"), torch.randn(5, 64, requires_grad=True)
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(x.detach() / step).clamp(-128, 127) * step
    y = module(x)
    torch.testing.assert_close(y, F.linear(rounded, module.quantized_weight(), module.bias), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.quantized_weight().detach().sum(0).expand(5, -1))
    assert torch.isfinite(module(torch.zeros(1, 64))).all()


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("group_size", [None, -1, 16])
def test_compiled_it_gives_the_same(activations, group_size):
    module, x = layer(activations=activations, group_size=group_size), torch.randn(5, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, module(x), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    gradient, module.weight.grad = module.weight.grad, None
    module(x).sum().backward()
    torch.testing.assert_close(gradient, module.weight.grad)


def test_autocast_rounds_the_product_and_not_the_quantizer():
    module, x = layer(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert module.quantized_weight().dtype == torch.float32
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), module.quantized_weight().bfloat16(), module.bias.bfloat16())
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("group_size", [None, -1, 16])
@pytest.mark.parametrize("quant_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_it_is_the_same_matrix(dtype, quant_dtype, group_size):
    module = layer(dtype, quant_dtype=quant_dtype, group_size=group_size)
    packed, weight = module.pack(), module.quantized_weight().detach()
    assert packed.format == "trit" and packed.scales.dtype == torch.float32
    assert packed.scales.shape == ((1, 1) if group_size is None else (24, 1 if group_size == -1 else 4))
    assert torch.equal(packed.unpack(), weight.float()) and torch.equal(packed.unpack(dtype), weight)


@pytest.mark.parametrize("activations, tolerance", [("float", 2e-4), ("int8", 1e-6)])
def test_the_packed_layer_takes_its_place(activations, tolerance):
    module, x = layer(activations=activations).eval(), torch.randn(7, 64)
    packed = module.to_linear()
    assert isinstance(packed, Linear) and packed.bias is module.bias and not packed.training
    assert packed.activations == activations
    assert (packed(x) - module(x)).norm() < tolerance * module(x).norm()


def test_refusals():
    with pytest.raises(ValueError, match="group_size: expected a divisor of in_features, 64, got 48"):
        TernaryLinear(64, 24, group_size=48)
    with pytest.raises(ValueError, match="group_size: expected -1, a multiple of 16 up to cols"):
        TernaryLinear(64, 24, group_size=8)
    with pytest.raises(ValueError, match="activations: expected one of float, int8, got 'int4'"):
        TernaryLinear(64, 24, activations="int4")
    module = layer()
    module.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[1, 2\]: expected a finite number, got nan"):
        module.pack()


def test_packing_floats_per_tensor_is_the_trained_quantizer():
    """What `lowbit ternarize --method absmean` makes of a latent matrix, in float32 whatever its dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        packed = PackedMatrix.from_float(latent(dtype=dtype), "trit", per_tensor=True, scale_dtype=torch.float32)
        trits, scale = weight_quant(latent(dtype=dtype).float())
        assert torch.equal(packed.unpack(), trits * scale)


# ---- models ----


def linears(model):
    return [name for name, module in model.named_modules() if type(module) is TernaryLinear]


def test_the_linear_layers_of_the_blocks_are_prepared():
    model = build("qwen3")  # its head is tied to its embedding
    before = dict(model.named_parameters())
    names = lowbit.prepare_ternary_training(model, group_size=-1, activations="int8")
    assert names == linears(model) and len(names) == 14
    assert all(".layers." in name for name in names)
    assert dict(model.named_parameters()) == before  # the objects themselves
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {(m.group_size, m.activations) for m in map(model.get_submodule, names)} == {(64, "int8"), (96, "int8")}


def test_modules_are_chosen_by_patterns():
    model = build("llama")
    assert lowbit.prepare_ternary_training(model, ["mlp", "lm_head"], skip=["layers.0"]) == [
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "lm_head",
    ]
    lowbit.prepare_ternary_training(model, ["lm_head"], group_size=16)
    assert model.lm_head.group_size == 16


@pytest.mark.parametrize(
    "architecture, modules, message",
    [
        ("llama", ["nowhere"], "matches no matrix"),
        ("llama", [], "modules: expected linear layers to train, found none"),
        ("qwen3", ["lm_head"], "embed_tokens: expected an nn.Linear to train, got Embedding"),
        ("gpt2", None, "c_attn: expected an nn.Linear to train, got Conv1D"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_changes(architecture, modules, message):
    model = build(architecture)
    with pytest.raises(ValueError, match=message):
        lowbit.prepare_ternary_training(model, modules)
    assert not linears(model)


def test_layers_that_share_a_weight_still_do():
    model = build("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight  # two modules, one weight
    second.gate_proj = first.gate_proj  # one module, two names
    lowbit.prepare_ternary_training(model)
    assert type(first.up_proj) is type(second.up_proj) is TernaryLinear
    assert second.up_proj.weight is first.up_proj.weight and second.gate_proj is first.gate_proj
    lowbit.quantize(model, recipe=lowbit.Recipe(bits="trit", method="exact"))
    assert second.up_proj.packed is not None and second.gate_proj is first.gate_proj


def test_a_weight_that_is_also_used_as_it_is_stays():
    model = build("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    first.up_proj = TernaryLinear.from_linear(first.up_proj)
    report = lowbit.quantize(model, recipe=lowbit.Recipe(bits=8, method="rtn"))
    assert type(first.up_proj) is TernaryLinear
    assert "make different matrices of it" in str([row["reason"] for row in report.kept if "up_proj" in row["name"]])


@pytest.mark.parametrize("recipe", [{"bits": "trit", "method": "exact"}, {"bits": 4}])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_trained_model_is_packed_as_it_was_trained(activations, recipe):
    """Whatever the recipe asks for; layers that are not ternary follow it."""
    model, ids = build("llama"), token_ids(4)
    names = lowbit.prepare_ternary_training(model, skip=["down_proj"], activations=activations)
    before = outputs(model, ids)
    matrices = {name: model.get_submodule(name).pack() for name in names}
    report = lowbit.quantize(model, ids, lowbit.Recipe(rules=["down_proj=8:g32"], **recipe | {"method": "rtn"}))
    for row in report.modules:
        if row["name"] in names:
            assert model.get_submodule(row["name"]).packed.equal(matrices[row["name"]])
            assert (row["method"], row["relative_error"], row["format"]) == ("exact", 0, "trit")
            assert model.get_submodule(row["name"]).activations == activations
    assert len(report.modules) == 14
    assert (outputs(model, ids) - before).norm() < (0.02 if activations == "float" else 0.05) * before.norm()


def test_weights_that_are_not_finite_are_packed_with_a_note():
    model = build("llama")
    lowbit.prepare_ternary_training(model, ["layers.0.mlp"])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    report = lowbit.quantize(model, recipe=lowbit.Recipe(bits="trit", method="exact"))
    assert [row["fallback"] for row in report.modules] == [None, "1 weights are not finite, taken as 0", None]


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_training_learns_and_its_folder_is_an_ordinary_one(activations, tmp_path):
    """A few steps on one batch: the loss falls, and what was learnt survives packing, saving and loading."""
    model, ids = build("llama", tie_word_embeddings=True), token_ids(8)
    lowbit.prepare_ternary_training(model, activations=activations)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = outputs(model.eval(), ids)

    lowbit.save(model, tmp_path / "latents")
    again = lowbit.load(tmp_path / "latents")
    assert not linears(again) and "quantization_config" not in (tmp_path / "latents" / "config.json").read_text()
    lowbit.prepare_ternary_training(again, activations=activations)
    assert torch.equal(outputs(again, ids), trained)

    lowbit.quantize(model, recipe=lowbit.Recipe(bits="trit", method="exact"))
    packed = outputs(model, ids)
    assert (packed - trained).norm() < (1e-3 if activations == "float" else 0.05) * trained.norm()
    lowbit.save(model, tmp_path / "packed")
    assert torch.equal(outputs(lowbit.load(tmp_path / "packed"), ids), packed)
