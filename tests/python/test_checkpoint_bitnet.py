"""BitNet checkpoints: the same tensors in Transformers' own modules and in ours, and folders in both directions.

What has to agree exactly is integer: trits, activations as 8-bit numbers (where the activations are float32, in which
we compute their scale) and the sums of products. Then Transformers divides by a product of two scales, or dequantizes
the activations before it multiplies; we multiply the sum by one factor. In float32 that is a few units in the last
place, relative to the sum of magnitudes.
"""

import json

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_models import build, digests, linears, llama, logits
from transformers.integrations import bitnet as theirs

import lowbit
from lowbit import nn as lowbit_nn
from lowbit.checkpoint import bitnet, native
from lowbit.checkpoint.ternary_blocks import pack_rows
from lowbit.checkpoint.ternary_matrix import TernaryMatrix
from lowbit.cli.inspect import examine

EPS = 2.0**-24
CLASSES = ["bitlinear", "autobitlinear"]
FORMAT = {"bitlinear": "bitnet", "autobitlinear": "bitnet_auto"}


@pytest.fixture(autouse=True)
def without_compiling():
    """Transformers compiles its BitNet functions; the arithmetic is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ternary(rows, cols, scale=0.0371, seed=0):
    trits = torch.randint(-1, 2, (rows, cols), generator=generator(seed)).to(torch.int8)
    return TernaryMatrix(trits, torch.tensor([[scale]]))


def stored_scale(matrix, linear_class):
    return 1.0 / matrix.scales.reshape(1) if linear_class == "bitlinear" else matrix.scales.reshape(1)


def their_module(matrix, linear_class, dtype=torch.float32):
    rows, cols = matrix.shape
    if linear_class == "bitlinear":
        module = theirs.BitLinear(cols, rows, bias=False, dtype=dtype)
        module.weight = pack_rows(matrix.trits)
    else:
        module = theirs.AutoBitLinear(cols, rows, bias=False, dtype=dtype)
        module.weight.data = matrix.trits.to(dtype)
    module.weight_scale = stored_scale(matrix, linear_class).to(dtype)
    return module


def plain_product(x, matrix):
    """(activations as int8 numbers, sums, product) of x float32 [tokens, cols], one rounding after another."""
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x * (127 / absmax)).round().clamp(-128, 127)
    sums = q.long() @ matrix.trits.long().T
    return q, sums, sums.float() * (matrix.scales * (absmax / 127))


def module_of(matrix, bias=None):
    return lowbit_nn.Linear.from_packed(matrix.to_packed(), bias, activations="int8")


# ---- modules ----


@pytest.mark.parametrize("shape", [(4, 64), (96, 320), (64, 1000), (256, 4096)])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_modules_agree_with_transformers_on_the_same_tensors(linear_class, shape):
    matrix = ternary(*shape)
    module = their_module(matrix, linear_class)
    x = torch.randn(5, shape[1], generator=generator(1)) * torch.tensor([1.0, 1e-3, 50.0, 1e-7, 0.0]).unsqueeze(1)
    q, sums, expected = plain_product(x, matrix)
    magnitudes = q.abs() @ matrix.trits.abs().float().T * (expected / sums.where(sums != 0, 1)).abs().amax(-1, True)
    with torch.no_grad():
        found = module(x)
    if linear_class == "bitlinear":
        their_q, _ = module.activation_quant(x)
        assert torch.equal(their_q.float(), q)
        # Sums of at most 4096 products up to 128 are exact in float32 too.
        product = torch.nn.functional.linear(their_q.float(), theirs.unpack_weights(module.weight, torch.float32))
        assert torch.equal(product, sums.float())
        assert ((found - expected).abs() <= 6 * EPS * expected.abs()).all()
    else:
        assert torch.equal((theirs.ActQuant.apply(x) * (127 / x.abs().amax(-1, True).clamp(min=1e-5))).round(), q)
        assert ((found - expected).abs() <= 40 * EPS * magnitudes).all()
    ours = module_of(matrix)
    assert torch.equal(ours(x), expected)
    bias = torch.randn(shape[0], generator=generator(2))
    assert torch.equal(module_of(matrix, bias)(x), expected + bias)


@pytest.mark.parametrize("linear_class", CLASSES)
def test_modules_agree_in_bfloat16_as_far_as_it_goes(linear_class):
    matrix = ternary(64, 512, scale=0.0371)
    x = torch.randn(7, 512, generator=generator(3)).bfloat16()
    with torch.no_grad():
        found = their_module(matrix, linear_class, torch.bfloat16)(x).float()
    ours = module_of(matrix)(x)
    assert ours.dtype == torch.bfloat16
    # bitlinear computes even the scale of the activations in bfloat16, eight bits of it.
    assert (found - ours.float()).norm() <= 0.02 * found.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_agree_with_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, expected = lowbit_nn.RMSNorm(96, 1e-5), LlamaRMSNorm(96, 1e-5)
    expected.weight.data = torch.rand(96, generator=generator(4)).to(dtype)
    norm.weight.data = expected.weight.data.clone()
    x = torch.randn(3, 4, 96, generator=generator(5)).to(dtype)
    assert torch.equal(norm(x), expected(x))
    assert norm(x).dtype == dtype


# ---- folders ----


def write_folder(folder, model, tensors, omit=(), **settings):
    """A folder made by hand: the tensors given, the model's own floats for the rest."""
    folder.mkdir(exist_ok=True)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in omit}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state.update(tensors)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = {"quant_method": "bitnet", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ternary_model(dtype=torch.float32, **changes):
    """(A tiny llama, {name: ternary matrix} for its linear layers, each with a scale of its own)."""
    model = llama(dtype=dtype, **changes)
    matrices = {}
    for seed, (name, weight) in enumerate(linears(model).items()):
        scale = torch.tensor(0.01 + 0.003 * seed).to(dtype).item()
        matrices[name] = ternary(*weight.shape, scale, seed)
    return model, matrices


def packed_tensors(matrices, linear_class, dtype=torch.float32):
    tensors = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.weight"] = pack_rows(matrix.trits)
        tensors[f"{name}.weight_scale"] = stored_scale(matrix, linear_class).to(dtype)
    return tensors


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def close(found, expected, share=1e-4):
    return (found - expected).norm() <= share * expected.norm()


@pytest.mark.parametrize("linear_class", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_as_transformers_loads_it(linear_class, dtype, tmp_path):
    model, matrices = ternary_model(dtype)
    folder = write_folder(
        tmp_path / "a", model, packed_tensors(matrices, linear_class, dtype), linear_class=linear_class
    )
    loaded = lowbit.load(folder)
    packed = dict((name, (module, matrix)) for name, module, matrix in native.packed_modules(loaded))
    assert packed.keys() == matrices.keys()
    for name, (module, found) in packed.items():
        stored = stored_scale(matrices[name], linear_class).to(dtype).float()
        scale = 1.0 / stored if linear_class == "bitlinear" else stored
        assert module.activations == "int8"
        assert found.format == "trit"
        assert TernaryMatrix.from_packed(found).equal(TernaryMatrix(matrices[name].trits, scale.reshape(1, 1)))
    assert loaded.lm_head.weight.dtype == dtype
    expected = their_model(folder)
    kind = theirs.BitLinear if linear_class == "bitlinear" else theirs.AutoBitLinear
    assert isinstance(expected.get_submodule(next(iter(matrices))), kind)
    assert close(logits(loaded).float(), logits(expected).float(), 1e-3 if dtype == torch.float32 else 0.05)
    lowbit.save(loaded, tmp_path / "b", format=FORMAT[linear_class])
    assert (tmp_path / "b" / "model.safetensors").stat().st_size > 0
    again = lowbit.load(tmp_path / "b")
    assert torch.equal(logits(again), logits(loaded))
    lowbit.save(again, tmp_path / "c", format=FORMAT[linear_class])
    assert digests(tmp_path / "c") == digests(tmp_path / "b")
    written = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    original = safetensors.torch.load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize("linear_class", CLASSES)
def test_a_written_folder_loads_in_transformers(linear_class, tmp_path):
    model, matrices = ternary_model(tie=False)
    folder = write_folder(tmp_path / "a", model, packed_tensors(matrices, linear_class), linear_class=linear_class)
    loaded = lowbit.load(folder)
    lowbit.save(loaded, tmp_path / "b", format=FORMAT[linear_class])
    described = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert described == {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
    }
    expected = their_model(tmp_path / "b")
    assert type(expected.lm_head) is torch.nn.Linear
    assert torch.equal(logits(expected), logits(their_model(folder)))


def test_classes_convert_into_each_other(tmp_path):
    model, matrices = ternary_model()
    folder = write_folder(
        tmp_path / "a", model, packed_tensors(matrices, "autobitlinear"), linear_class="autobitlinear"
    )
    loaded = lowbit.load(folder)
    lowbit.save(loaded, tmp_path / "b", format="bitnet")
    lowbit.save(lowbit.load(tmp_path / "b"), tmp_path / "c", format="bitnet_auto")
    for name, found in linears_of(tmp_path / "c"):
        # A reciprocal in float32 holds a scale to the last place or next to it.
        difference = (found.scales.float() - matrices[name].scales).abs()
        assert difference <= 2.0**-23 * matrices[name].scales
    lowbit.save(lowbit.load(tmp_path / "c"), tmp_path / "native")
    again = lowbit.load(tmp_path / "native")
    assert torch.equal(logits(again), logits(lowbit.load(tmp_path / "c")))


def linears_of(folder):
    return [(name, matrix) for name, _, matrix in native.packed_modules(lowbit.load(folder))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.0.mlp.down_proj"]])
def test_latent_weights_are_ternarized_as_transformers_does(dtype, skipped, tmp_path):
    model = llama(dtype=dtype, tie=False)
    settings = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    folder = write_folder(tmp_path / "a", model, {}, **settings, modules_to_not_convert=skipped)
    loaded, expected = lowbit.load(folder), their_model(folder)
    packed = dict((name, matrix) for name, _, matrix in native.packed_modules(loaded))
    assert packed.keys() == {n for n, module in expected.named_modules() if isinstance(module, theirs.AutoBitLinear)}
    assert len(packed) == (14 if skipped is None else 13)
    for name, matrix in packed.items():
        weight = expected.get_submodule(name).weight
        assert torch.equal(matrix.unpack(dtype), theirs.WeightQuant.apply(weight))
    assert close(logits(loaded).float(), logits(expected).float(), 1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_is_ternarized_once(dtype):
    latent = torch.randn(24, 64, generator=torch.Generator().manual_seed(10)).mul(0.02).to(dtype)
    first, was = bitnet.ternarize(latent)
    assert not was
    mean = latent.float().abs().mean()
    assert first.scales.item() == pytest.approx(mean.item(), rel=2**-8)
    assert torch.equal(first.trits, (latent.float() * (1.0 / mean)).round().clamp(-1, 1).to(torch.int8))
    again, was = bitnet.ternarize(first.unpack(dtype))
    assert was
    assert again.equal(first)
    zeros, was = bitnet.ternarize(torch.zeros(2, 16, dtype=dtype))
    assert was
    assert not zeros.trits.any()


def test_latent_weights_that_are_ternary_are_kept_with_a_warning(tmp_path):
    model, matrices = ternary_model()
    name = "model.layers.1.self_attn.q_proj"
    settings = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    folder = write_folder(tmp_path / "a", model, {f"{name}.weight": matrices[name].unpack()}, **settings)
    with pytest.warns(UserWarning, match=rf"1 latent weights are ternary already and keep their scale, {name} for one"):
        loaded = lowbit.load(folder)
    assert TernaryMatrix.from_packed(loaded.get_submodule(name).packed).equal(matrices[name])


def test_bitlinear_does_not_know_the_mode(tmp_path):
    model, matrices = ternary_model()
    tensors = packed_tensors(matrices, "bitlinear")
    folder = write_folder(tmp_path / "a", model, tensors, linear_class="bitlinear", quantization_mode="online")
    assert {name for name, _ in linears_of(folder)} == matrices.keys()


def test_trits_may_be_floats_beside_a_scale_that_multiplies(tmp_path):
    model, matrices = ternary_model()
    tensors = packed_tensors(matrices, "autobitlinear")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = matrices[name].trits.float()
    folder = write_folder(tmp_path / "a", model, tensors, linear_class="autobitlinear")
    assert TernaryMatrix.from_packed(dict(linears_of(folder))[name]).equal(matrices[name])


@pytest.mark.parametrize("linear_class", CLASSES)
def test_norms_in_front_of_layers(linear_class, tmp_path):
    model, matrices = ternary_model()
    tensors = packed_tensors(matrices, linear_class)
    for seed, (name, matrix) in enumerate(matrices.items()):
        tensors[f"{name}.rms_norm.weight"] = torch.rand(matrix.shape[1], generator=generator(seed)).add(0.5)
    settings = {"linear_class": linear_class, "use_rms_norm": True, "rms_norm_eps": 1e-4}
    folder = write_folder(tmp_path / "a", model, tensors, **settings)
    loaded = lowbit.load(folder)
    assert close(logits(loaded), logits(their_model(folder)), 1e-3)
    name = "model.layers.1.mlp.down_proj"
    module = loaded.get_submodule(name)
    x = torch.randn(3, 128, generator=generator(6))
    bare = module_of(TernaryMatrix.from_packed(module.packed))
    assert module.rms_norm.eps == 1e-4
    assert torch.equal(module(x), bare(module.rms_norm(x)))
    assert torch.equal(module.rms_norm.weight, tensors[f"{name}.rms_norm.weight"])
    lowbit.save(loaded, tmp_path / "b", format=FORMAT[linear_class])
    lowbit.save(loaded, tmp_path / "native")
    for folder in (tmp_path / "b", tmp_path / "native"):
        assert torch.equal(logits(lowbit.load(folder)), logits(loaded))
    with pytest.raises(ValueError, match="rms_norm: expected none, which a GPTQ checkpoint has no place for"):
        lowbit.save(loaded, tmp_path / "gptq", format="gptq")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    for eps in ("1e-4", 1, -0.5, True):
        config["quantization_config"]["modules"][name]["rms_norm_eps"] = eps
        (tmp_path / "native" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{name}: rms_norm_eps: expected a fraction .*, got {eps!r}"):
            lowbit.load(tmp_path / "native")
    module.rms_norm = None
    with pytest.raises(ValueError, match="rms_norm: expected the same norm in front of every packed layer or none"):
        lowbit.save(loaded, tmp_path / "c", format=FORMAT[linear_class])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_biases(linear_class, dtype, tmp_path):
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    model = build(config, dtype)
    matrices = {name: ternary(*weight.shape, 0.03125) for name, weight in linears(model).items()}
    tensors = packed_tensors(matrices, linear_class, dtype)
    folder = write_folder(tmp_path / "a", model, tensors, linear_class=linear_class)
    loaded, expected = lowbit.load(folder), their_model(folder)
    assert close(logits(loaded).float(), logits(expected).float(), 1e-3 if dtype == torch.float32 else 0.05)
    name = "model.layers.0.self_attn.q_proj"
    stored = model.get_submodule(name).bias.float()
    # Transformers multiplies the sum, the bias included, by autobitlinear's scale.
    bias = stored if linear_class == "bitlinear" else stored * 0.03125
    assert torch.equal(loaded.get_submodule(name).bias.float(), bias)
    x = torch.randn(3, 64, generator=generator(8)).to(dtype)
    with torch.no_grad():
        assert close(loaded.get_submodule(name)(x).float(), expected.get_submodule(name)(x).float(), 0.02)
    lowbit.save(loaded, tmp_path / "b", format=FORMAT[linear_class])
    written = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    original = safetensors.torch.load_file(folder / "model.safetensors")
    for key in (f"{name}.{part}" for part in ("weight", "weight_scale", "bias")):
        assert written[key].dtype == original[key].dtype
        assert torch.equal(written[key], original[key]), key


@pytest.mark.parametrize("linear_class", CLASSES)
def test_inspect_reads_the_files_alone(linear_class, tmp_path):
    model, matrices = ternary_model()
    folder = write_folder(tmp_path / "a", model, packed_tensors(matrices, linear_class), linear_class=linear_class)
    facts = examine(folder)
    modules = {module["name"]: module for module in facts["modules"]}
    assert modules.keys() == {*matrices, "model.embed_tokens"}
    assert facts["quant_method"] == "bitnet"
    assert facts["totals"]["other_tensors"] == 5  # the norms
    for name, matrix in matrices.items():
        rows, cols = matrix.shape
        assert (modules[name]["format"], modules[name]["shape"]) == ("bitnet", [rows, cols])
        assert modules[name]["bytes"] == rows * cols // 4 + 4
        assert modules[name]["scales"] == pytest.approx([matrix.scales.item()] * 2, rel=2**-22)


# ---- what is refused ----

NAME = "model.layers.0.mlp.up_proj"  # 128 x 64


def two_bits(value):
    packed = torch.full((32, 64), 0x55, dtype=torch.uint8)
    packed[3, 5] = value
    return packed


DAMAGED = {
    "code 3": ({"weight": two_bits(0xD5)}, {}, "codes: expected 0, 1 or 2, got 3"),
    "scale 0": ({"weight_scale": torch.zeros(1)}, {}, "weight_scale: expected positive finite numbers, got 0.0"),
    "infinite scale": ({"weight_scale": torch.tensor([torch.inf])}, {}, "weight_scale: .* got inf"),
    "NaN": ({"weight_scale": torch.tensor([torch.nan])}, {}, "weight_scale: .* got nan"),
    "negative scale": ({"weight_scale": torch.tensor([-1.0])}, {}, "weight_scale: .* got -1.0"),
    "tiny scale": ({"weight_scale": torch.tensor([1e-45])}, {}, "weight_scale: its reciprocal: .* got inf"),
    "two scales": ({"weight_scale": torch.ones(2)}, {}, r"weight_scale: expected one float, \[1\], got .* \[2\]"),
    "integer scale": ({"weight_scale": torch.ones(1).int()}, {}, "weight_scale: expected one float"),
    "signed codes": ({"weight": torch.zeros(32, 64, dtype=torch.int8)}, {}, "data: expected dtype torch.uint8"),
    "float trits": ({"weight": torch.zeros(128, 64)}, {}, r"weight: expected packed trits \(torch.uint8\)"),
    "floats that are no trits": (
        {"weight": torch.rand(128, 64)},
        {"linear_class": "autobitlinear"},
        "weight: expected nonzero elements of one magnitude",
    ),
    "NaN in floats": (
        {"weight": torch.full((128, 64), torch.nan)},
        {"linear_class": "autobitlinear"},
        "weight: expected finite numbers, got nan",
    ),
    "three dimensions": ({"weight": two_bits(0x55).view(32, 64, 1)}, {}, "data: expected 2 dimensions"),
    "rows missing": ({"weight": two_bits(0x55)[:31].clone()}, {}, r"expected a packed matrix of shape \(128, 64\)"),
    "linear_class": ({}, {"linear_class": "biglinear"}, "linear_class: expected one of bitlinear, autobitlinear"),
    "quantization_mode": ({}, {"quantization_mode": 1}, "quantization_mode: expected one of offline, online, got 1"),
    "use_rms_norm": ({}, {"use_rms_norm": "yes"}, "use_rms_norm: expected true or false, got 'yes'"),
    "rms_norm_eps": ({}, {"rms_norm_eps": -1}, "rms_norm_eps: expected a number from 0 to 1, got -1"),
    "skipped": ({}, {"modules_to_not_convert": [1]}, "modules_to_not_convert: expected a list of names"),
    "no norm": ({}, {"use_rms_norm": True}, r"rms_norm.weight: expected floats \[64\] \(use_rms_norm\), found none"),
    "pattern": (
        {},
        {"linear_class": "autobitlinear", "quantization_mode": "online", "modules_to_not_convert": ["("]},
        "modules_to_not_convert: expected regular expressions",
    ),
    "online beside a scale": (
        {"weight": torch.rand(128, 64)},
        {"linear_class": "autobitlinear", "quantization_mode": "online"},
        "expected a float weight alone in quantization_mode online",
    ),
}


@pytest.mark.parametrize(("parts", "settings", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_folders_are_refused_by_name(parts, settings, message, tmp_path):
    model, matrices = ternary_model()
    tensors = packed_tensors({NAME: matrices[NAME]}, "bitlinear")
    tensors.update((f"{NAME}.{part}", tensor) for part, tensor in parts.items())
    folder = write_folder(tmp_path / "a", model, tensors, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        lowbit.load(folder)
    assert str(folder) in str(caught.value)
    if parts:
        assert NAME in str(caught.value)


def test_missing_halves_are_refused(tmp_path):
    model, matrices = ternary_model()
    tensors = packed_tensors({NAME: matrices[NAME]}, "bitlinear")
    scale = tensors.pop(f"{NAME}.weight_scale")
    with pytest.raises(ValueError, match=rf"{NAME}: expected weight_scale beside weight \(torch.uint8\), found none"):
        lowbit.load(write_folder(tmp_path / "a", model, tensors))
    folder = write_folder(tmp_path / "b", model, {f"{NAME}.weight_scale": scale}, omit=[f"{NAME}.weight"])
    with pytest.raises(ValueError, match=f"{NAME}: expected weight beside weight_scale, found none"):
        lowbit.load(folder)


def test_what_bitnet_cannot_hold_is_refused_by_name(tmp_path):
    model, matrices = ternary_model()
    loaded = lowbit.load(write_folder(tmp_path / "a", model, packed_tensors(matrices, "bitlinear")))
    module = loaded.get_submodule(NAME)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            lowbit.save(loaded, tmp_path / "b", format="bitnet")
        assert not (tmp_path / "b").exists()

    module.activations = "float"
    refused(f"{NAME}: activations: expected int8, as BitNet multiplies, got float")
    module.activations = "int8"
    module.load(TernaryMatrix(matrices[NAME].trits, torch.rand(128, 1).add(1)).to_packed(), replace=True)
    refused(rf"{NAME}: scales: expected one for the matrix, got \[128, 1\] that differ")
    module.load(lowbit.PackedMatrix.from_float(matrices[NAME].unpack(), "int4"), replace=True)
    refused(rf'{NAME}: format: expected "trit" or "int2" to repack ternary codes, got int4 -> trit')
    with pytest.raises(ValueError, match="expected a model with packed linear layers, found none"):
        lowbit.save(model, tmp_path / "b", format="bitnet")
    with pytest.raises(ValueError, match="format: expected one of lowbit, gptq, gptq_v2, bitnet, bitnet_auto, got"):
        lowbit.save(model, tmp_path / "b", format="bitlinear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_scales_are_stored_as_narrowly_as_they_read_back(linear_class, dtype):
    for value in (torch.rand(200, generator=generator(7)) * 2 + 1e-3).tolist():
        stored = torch.tensor([value]).to(dtype)
        read = bitnet.factor(stored, linear_class)
        written = bitnet._stored_scale(read.reshape(1), linear_class, dtype)
        assert torch.equal(bitnet.factor(written, linear_class), read)
        if dtype != torch.float32:
            assert written.dtype == dtype
            assert torch.equal(written, stored)
