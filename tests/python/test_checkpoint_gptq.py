"""GPTQ checkpoints against an independent, plain-Python reading of the format (docs/formats.md, section 2)."""

import json
import re

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_models import act_order, build, digests, linears, llama, logits, pack

import lowbit
from lowbit import models
from lowbit.checkpoint import native
from lowbit.checkpoint.gptq import Settings

VERSIONS = {"gptq": 1, "gptq_v2": 2}

# docs/formats.md: the words of symmetric zero points, v1 and v2.
SYMMETRIC_WORDS = {
    2: ([0x55555555], [0xAAAAAAAA]),
    3: ([0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
    4: ([0x77777777], [0x88888888]),
    8: ([0x7F7F7F7F], [0x80808080]),
}


def stream(words, bits):
    """Codes of a list of int32 words, read as one little-endian bit stream."""
    value = 0
    for i, word in enumerate(words):
        value |= (word & 0xFFFFFFFF) << (32 * i)
    return [(value >> (bits * j)) & ((1 << bits) - 1) for j in range(len(words) * 32 // bits)]


def words_of(codes, bits):
    value = 0
    for j, code in enumerate(codes):
        value |= int(code) << (bits * j)
    words = [(value >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def plain_dequantize(tensors, bits, version):
    """W[n][k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])."""
    qweight, qzeros, scales = (tensors[part].tolist() for part in ("qweight", "qzeros", "scales"))
    g_idx = tensors["g_idx"].tolist()
    rows = len(qweight[0])
    q = [stream([word[n] for word in qweight], bits) for n in range(rows)]
    z = [[(zero + (version == 1)) % (1 << bits) for zero in stream(line, bits)] for line in qzeros]
    return torch.tensor([[scales[g][n] * (q[n][k] - z[g][n]) for k, g in enumerate(g_idx)] for n in range(rows)])


def write_folder(
    folder, model, matrices, quantization_config, name="model.safetensors", extra=(), omit=(), legacy=False
):
    """A GPTQ folder made by hand: the tensors given for some modules, the model's own floats for the rest."""
    folder.mkdir(exist_ok=True)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for module, tensors in matrices.items():
        state.pop(f"{module}.weight", None)
        state.update((f"{module}.{part}", tensor.contiguous()) for part, tensor in tensors.items())
    state.update(extra)
    for key in omit:
        del state[key]
    safetensors.torch.save_file(state, folder / name, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())
    if legacy:
        (folder / "quantize_config.json").write_text(json.dumps(quantization_config))
    else:
        config["quantization_config"] = {"quant_method": "gptq", **quantization_config}
    (folder / "config.json").write_text(json.dumps(config))


def random_model(bits, group_size, symmetric, permuted, lowest_zero=0):
    """A llama whose linear layers hold random codes; every layer has its own permutation."""
    model = llama()
    matrices = {}
    for seed, (name, weight) in enumerate(linears(model).items()):
        matrix = act_order(*weight.shape, f"int{bits}", group_size, symmetric, seed)
        zeros = None if matrix.zeros is None else matrix.zeros.clamp(min=lowest_zero)
        matrices[name] = lowbit.PackedMatrix.from_codes(
            matrix.unpack_codes(),
            matrix.scales,
            zeros,
            matrix.perm if permuted else None,
            format=matrix.format,
            group_size=group_size,
        )
    models.patch(model, matrices)
    return model


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("format", VERSIONS)
def test_written_files_mean_the_same_and_read_back_exactly(format, bits, symmetric, permuted, tmp_path):
    model = random_model(bits, 32, symmetric, permuted, lowest_zero=1)
    lowbit.save(model, tmp_path / "a", format=format)
    raw = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    for name, _, matrix in list(native.packed_modules(model))[:2]:
        tensors = {part: raw[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert tensors["qweight"].shape == (matrix.cols * bits // 32, matrix.rows)
        assert tensors["qzeros"].shape == (matrix.cols // 32, matrix.rows * bits // 32)
        assert tensors["scales"].dtype == torch.float16
        assert torch.equal(plain_dequantize(tensors, bits, VERSIONS[format]), matrix.unpack())
        if symmetric:
            words = SYMMETRIC_WORDS[bits][VERSIONS[format] - 1]
            found = [word & 0xFFFFFFFF for word in tensors["qzeros"].flatten().tolist()]
            assert found == words * (len(found) // len(words))
    loaded = lowbit.load(tmp_path / "a")
    for name, _, matrix in native.packed_modules(model):
        # A stable order: the columns of a group come in their original order, whatever perm said.
        found = loaded.get_submodule(name).packed
        assert torch.equal(found.unpack(), matrix.unpack())
        assert permuted or found.equal(matrix)
    assert permuted or torch.equal(logits(loaded), logits(model))
    lowbit.save(loaded, tmp_path / "b", format=format)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_group_sizes_and_gptq_to_lowbit_and_back(group_size, tmp_path):
    model = pack(llama(), "int4", group_size, symmetric=False)
    lowbit.save(model, tmp_path / "gptq", format="gptq_v2")
    loaded = lowbit.load(tmp_path / "gptq")
    lowbit.save(loaded, tmp_path / "native")
    again = lowbit.load(tmp_path / "native")
    assert torch.equal(logits(again), logits(model))
    lowbit.save(again, tmp_path / "gptq again", format="gptq_v2")
    assert digests(tmp_path / "gptq again") == digests(tmp_path / "gptq")


def test_gpt2_and_shards(tmp_path):
    model = pack(build(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, n_positions=64)))
    lowbit.save(model, tmp_path, format="gptq", max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(lowbit.load(tmp_path)), logits(model))


def test_a_packed_head_of_a_tied_model(tmp_path):
    model = pack(llama())
    models.patch(model, {"lm_head": lowbit.PackedMatrix.from_float(model.lm_head.weight, "int8", 32)})
    lowbit.save(model, tmp_path, format="gptq_v2")
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["quantization_config"]["lm_head"] is True and described["tie_word_embeddings"] is False
    loaded = lowbit.load(tmp_path)
    assert loaded.lm_head.packed.format == "int8" and torch.equal(logits(loaded), logits(model))


def test_the_configuration_says_what_others_need(tmp_path):
    model = llama()
    matrices = {name: lowbit.PackedMatrix.from_float(w.contiguous(), "int4", 32) for name, w in linears(model).items()}
    layer = "model.layers.1"
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"{layer}.self_attn.{part}"
        matrices[name] = lowbit.PackedMatrix.from_float(model.get_submodule(name).weight, "int8", 64)
    matrices[f"{layer}.mlp.down_proj"] = act_order(64, 128, "int4", 32, symmetric=True)
    for skipped in ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"):
        del matrices[f"{layer}.{skipped}"]
    models.patch(model, matrices)
    lowbit.save(model, tmp_path, format="gptq")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "quantize_config.json").read_text())
    expected = {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["meta"]["quantizer"][0].startswith("lowbit:")

    def rule(name):
        return next(((text, change) for text, change in config["dynamic"].items() if re.match(text[2:], name)), None)

    eight = {"bits": 8, "group_size": -1}
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        text, change = rule(f"{layer}.self_attn.{name}")
        assert text.startswith("+:") and change == eight
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "self_attn.o_proj"):
        assert rule(f"{layer}.{name}")[0].startswith("-:")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", f"{layer}.mlp.down_proj", "lm_head"):
        assert rule(name) is None
    assert torch.equal(
        lowbit.load(tmp_path).get_submodule(f"{layer}.mlp.down_proj").packed.unpack(),
        matrices[f"{layer}.mlp.down_proj"].unpack(),
    )


DOWN = "model.layers.0.mlp.down_proj"  # 64 x 128


def one_module(bits=4, group_size=32, zeros=None, version=2, seed=0):
    """(codes, zeros, scales, tensors) of a 64 x 128 module, packed in plain Python."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (64, 128), generator=generator, dtype=torch.uint8)
    groups = 128 // group_size
    if zeros is None:
        zeros = torch.randint(1, 1 << bits, (64, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(64, groups, generator=generator).add(0.01).half()
    stored = (zeros.int() - int(version == 1)) % (1 << bits)
    tensors = {
        "qweight": torch.tensor([words_of(row, bits) for row in codes.tolist()], dtype=torch.int32).t(),
        "qzeros": torch.tensor([words_of(row, bits) for row in stored.t().tolist()], dtype=torch.int32),
        "scales": scales.t(),
        "g_idx": (torch.arange(128) // group_size).int(),
    }
    return codes, zeros, scales, tensors


def dequantized(codes, zeros, scales, group):
    return scales.float()[:, group] * (codes.float() - zeros.float()[:, group])


def check_down(folder, expected):
    module = lowbit.load(folder).get_submodule(DOWN)
    assert torch.equal(module.packed.unpack(), expected)
    return module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_files_packed_in_plain_python_are_read(version, bits, tmp_path):
    codes, zeros, scales, tensors = one_module(bits, version=version)
    config = {
        "bits": bits,
        "group_size": 32,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    write_folder(tmp_path, llama(), {DOWN: tensors}, config)
    module = check_down(tmp_path, dequantized(codes, zeros, scales, torch.arange(128) // 32))
    assert torch.equal(module.packed.unpack_codes(), codes) and torch.equal(module.packed.zeros, zeros)
    assert type(lowbit.load(tmp_path).get_submodule("model.layers.1.mlp.down_proj")) is torch.nn.Linear


def test_act_order_with_negative_groups(tmp_path):
    codes, zeros, scales, tensors = one_module()
    group = torch.randperm(128, generator=torch.Generator().manual_seed(1)) // 32
    for g_idx in (group.int(), torch.where(group > 1, group - 4, group).int()):
        tensors["g_idx"] = g_idx
        config = {"bits": 4, "group_size": 32, "desc_act": True, "format": "gptq_v2"}
        write_folder(tmp_path, llama(), {DOWN: tensors}, config)
        module = check_down(tmp_path, dequantized(codes, zeros, scales, group))
        assert torch.equal(module.packed.perm.long(), torch.argsort(group, stable=True))


def test_groups_of_unequal_size_are_refused(tmp_path):
    tensors = one_module()[3]
    tensors["g_idx"] = torch.zeros(128, dtype=torch.int32)
    write_folder(tmp_path, llama(), {DOWN: tensors}, {"bits": 4, "group_size": 32, "format": "gptq_v2"})
    with pytest.raises(
        ValueError, match=rf"model.safetensors: {re.escape(DOWN)}: g_idx: expected 32 columns in group 0, got 128"
    ):
        lowbit.load(tmp_path)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_legacy_names_synonyms_no_g_idx_and_other_scale_dtypes(tmp_path, scale_dtype):
    codes, zeros, scales, tensors = one_module(version=1)
    del tensors["g_idx"]
    tensors["scales"] = tensors["scales"].to(scale_dtype)
    config = {"w_bit": 4, "q_group_size": 32, "desc_act": False, "sym": False, "model_file_base_name": None}
    write_folder(tmp_path, llama(), {DOWN: tensors}, config, name="gptq_model-4bit-32g.safetensors", legacy=True)
    module = check_down(tmp_path, dequantized(codes, zeros, scales.to(scale_dtype), torch.arange(128) // 32))
    assert module.packed.scales.dtype == scale_dtype


def test_a_bias_that_the_model_lacks(tmp_path):
    tensors = one_module()[3]
    config = {"bits": 4, "group_size": 32, "format": "gptq_v2"}
    write_folder(tmp_path, llama(), {DOWN: {**tensors, "bias": torch.zeros(64, dtype=torch.float16)}}, config)
    assert lowbit.load(tmp_path).get_submodule(DOWN).bias is None
    bias = torch.randn(64)
    write_folder(tmp_path, llama(), {DOWN: {**tensors, "bias": bias}}, config)
    model = lowbit.load(tmp_path)
    assert torch.equal(model.get_submodule(DOWN).bias, bias)
    lowbit.save(model, tmp_path / "native")
    assert torch.equal(lowbit.load(tmp_path / "native").get_submodule(DOWN).bias, bias)


def test_planar_3_bit(tmp_path):
    codes, zeros, scales, tensors = one_module(3)

    def planar(values):
        words = []
        for start in range(0, len(values), 32):
            run = values[start : start + 32]
            words += words_of([v & 3 for v in run], 2) + words_of([v >> 2 for v in run], 1)
        return words

    tensors["qweight"] = torch.tensor([planar(row) for row in codes.tolist()], dtype=torch.int32).t()
    tensors["qzeros"] = torch.tensor([planar(row) for row in zeros.t().tolist()], dtype=torch.int32)
    write_folder(tmp_path, llama(), {DOWN: tensors}, {"bits": 3, "group_size": 32, "format": "gptq_p"})
    check_down(tmp_path, dequantized(codes, zeros, scales, torch.arange(128) // 32))


def test_symmetric_3_bit_zeros_of_older_gptqmodel(tmp_path):
    codes, _, scales, tensors = one_module(3)
    old = [0x00000000, 0xB6DB6DB7 - (1 << 32), 0x49249249]
    tensors["qzeros"] = torch.tensor([old * 2] * 4, dtype=torch.int32)
    write_folder(tmp_path, llama(), {DOWN: tensors}, {"bits": 3, "group_size": 32})
    module = check_down(tmp_path, dequantized(codes, torch.full((64, 4), 4), scales, torch.arange(128) // 32))
    assert module.packed.zeros is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ambiguous_v1_zeros_are_refused(tmp_path, bits):
    zeros = torch.ones(64, 4, dtype=torch.uint8)
    zeros[5, 2] = 0
    tensors = one_module(bits, zeros=zeros, version=1)[3]
    write_folder(tmp_path, llama(), {DOWN: tensors}, {"bits": bits, "group_size": 32})
    with pytest.raises(ValueError, match=rf"{re.escape(DOWN)}: qzeros\[2\], row 5: .* ambiguous"):
        lowbit.load(tmp_path)


def test_a_quantized_embedding_is_read_as_the_table_it_stands_for(tmp_path):
    """Its groups run along the vocabulary: K = 256 ids, N = 64 columns."""
    generator = torch.Generator().manual_seed(0)
    matrix = lowbit.PackedMatrix.from_float(torch.randn(64, 256, generator=generator), "int4", 32, symmetric=False)
    config = {"bits": 4, "group_size": 32, "format": "gptq_v2"}
    write_folder(tmp_path, llama(), {"model.embed_tokens": matrix.to_gptq(2)}, config)
    model = lowbit.load(tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, matrix.unpack(torch.float16).t().float())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dynamic_rules_choose_by_the_first_match():
    described = {
        "bits": 4,
        "group_size": 128,
        "dynamic": {"-:lm_head": {}, "+:.*\\.0\\..*down": {"bits": 8, "q_group_size": 32}, ".*down": {"bits": 2}},
    }
    settings = Settings(described, "here")
    assert settings.of("model.layers.0.mlp.down_proj") == (8, 32)
    assert settings.of("model.layers.1.mlp.down_proj") == (2, 128)
    assert settings.of("model.layers.1.mlp.up_proj") == (4, 128)
    with pytest.raises(ValueError, match=r"here: dynamic: \+:\(: expected a regular expression"):
        Settings({"bits": 4, "dynamic": {"+:(": {}}}, "here")
    with pytest.raises(ValueError, match="here: dynamic: a: expected an object, got 3"):
        Settings({"bits": 4, "dynamic": {"a": 3}}, "here")


def test_dynamic_rules_of_a_file_apply(tmp_path):
    codes, zeros, scales, tensors = one_module(8)
    config = {
        "bits": 4,
        "group_size": 128,
        "format": "gptq_v2",
        "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 32}},
    }
    write_folder(tmp_path, llama(), {DOWN: tensors}, config)
    check_down(tmp_path, dequantized(codes, zeros, scales, torch.arange(128) // 32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": None}, ValueError, "bits: expected an integer from 1 to 8, got None"),
        ({"bits": True}, ValueError, "bits: expected an integer"),
        ({"bits": 5}, NotImplementedError, "bits: expected one of 2, 3, 4, 8, got 5"),
        ({"group_size": 0}, ValueError, "group_size: expected -1 or a positive integer, got 0"),
        ({"group_size": "32"}, ValueError, "group_size: expected -1 or a positive integer, got '32'"),
        ({"group_size": 64}, ValueError, r"scales: expected shape \[2, 64\], got \[4, 64\]"),
        ({"group_size": 24}, ValueError, "group_size: expected -1, a multiple of 16"),
        ({"bits": 8}, ValueError, "mlp.down_proj: "),
        ({"format": "marlin"}, NotImplementedError, "checkpoint_format: expected gptq, gptq_v2, gptq_p, got 'marlin'"),
        ({"pack_dtype": "int64"}, NotImplementedError, "pack_dtype"),
        ({"dynamic": [1]}, ValueError, "dynamic: expected an object, got list"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, change, error, message):
    config = {"bits": 4, "group_size": 32, "format": "gptq_v2", **change}
    write_folder(tmp_path, llama(), {DOWN: one_module()[3]}, config)
    with pytest.raises(error, match=message):
        lowbit.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("qweight", None, "expected qweight, qzeros and scales, but qweight is not in the files"),
        ("scales", None, "but scales is not in the files"),
        ("weight", torch.zeros(64, 128), "expected either qweight or weight, found both"),
        ("qweight", torch.zeros(16, 64), "qweight: expected torch.int32"),
        ("qweight", torch.zeros(16, 64, 1, dtype=torch.int32), "qweight: expected torch.int32 with 2 dimensions"),
        ("qzeros", torch.zeros(4, 9, dtype=torch.int32), r"qzeros: expected shape \[4, 8\], got \[4, 9\]"),
        ("scales", torch.full((4, 64), float("nan")), "scales"),
        ("scales", torch.full((4, 64), float("inf"), dtype=torch.float16), "scales"),
        ("scales", torch.zeros(4, 64, dtype=torch.int32), "scales"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "g_idx: expected groups in"),
        ("g_idx", torch.zeros(127, dtype=torch.int32), "g_idx: expected int32"),
        ("g_idx", torch.zeros(128), "g_idx: expected int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, part, replacement, message):
    tensors = one_module()[3]
    if replacement is None:
        del tensors[part]
    else:
        tensors[part] = replacement
    write_folder(tmp_path, llama(), {DOWN: tensors}, {"bits": 4, "group_size": 32, "format": "gptq_v2"})
    with pytest.raises(ValueError, match=re.escape(DOWN) + ".*" + message):
        lowbit.load(tmp_path)


def test_a_module_that_the_model_lacks_or_of_another_shape_is_refused(tmp_path):
    config = {"bits": 4, "group_size": 32, "format": "gptq_v2"}
    write_folder(tmp_path, llama(), {"model.layers.7.mlp.down_proj": one_module()[3]}, config)
    with pytest.raises(ValueError, match=r"model.layers.7.mlp.down_proj: expected a module of LlamaForCausalLM"):
        lowbit.load(tmp_path)
    write_folder(tmp_path, llama(), {"model.layers.0.mlp.up_proj": one_module()[3]}, config)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: expected a packed matrix of shape \(128, 64\)"):
        lowbit.load(tmp_path)


def test_what_the_format_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        lowbit.save(llama(), tmp_path, format="gptq")
    with pytest.raises(ValueError, match=r"model.embed_tokens: GPTQ checkpoints hold linear layers"):
        lowbit.save(pack(llama(), table="int8"), tmp_path, format="gptq")
    model = llama(tie=False, vocab_size=257)
    models.patch(model, {"lm_head": lowbit.PackedMatrix.from_float(model.lm_head.weight, "int4")})
    with pytest.raises(
        ValueError, match="lm_head: out_features: expected a multiple of 32 in a GPTQ checkpoint, got 257"
    ):
        lowbit.save(model, tmp_path, format="gptq_v2")
    model = random_model(4, 32, symmetric=False, permuted=False)
    with pytest.raises(ValueError, match=r"self_attn.q_proj: zeros\[.*write gptq_v2"):
        lowbit.save(model, tmp_path, format="gptq")
    assert not list(tmp_path.iterdir())
