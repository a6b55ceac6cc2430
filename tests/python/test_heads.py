"""Heads that come and go: at run time, from files, in a folder; modules opened on demand."""

import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_models import llama, logits, pack

import lowbit
from lowbit import models
from lowbit.cli.main import main


@pytest.fixture
def model():
    return pack(llama(vocab_size=257), table="int8")


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


# -- at run time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"])
def test_any_module_is_unloaded_and_loaded(model, name):
    expected, module = logits(model), model.get_submodule(name)
    held = module.unload()
    with pytest.raises(RuntimeError, match=rf"{name}: weight: expected one to be loaded, got none"):
        logits(model)
    module.load(held)
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match=rf"{name}: weight: expected none while another is loaded, got a second one"):
        module.load(held)
    with pytest.raises(ValueError, match=rf"{name}: weight: expected shape \[\d+, \d+\], got \[3, 64\]"):
        module.load(torch.zeros(3, 64), replace=True)
    assert torch.equal(logits(model), expected)
    module.load(torch.zeros(held.shape), replace=True)
    assert not torch.equal(logits(model), expected) and module.packed is None
    module.load(held, replace=True)
    assert torch.equal(logits(model), expected)


def test_a_hundred_swaps_keep_no_memory(tmp_path):
    """A table of 16 MB, floats, packed and from a file in turn. How long they take: bench/footprint.py."""
    model = pack(llama(vocab_size=65536), table="int8")
    float_head, packed = torch.randn(65536, 64), model.lm_head.packed
    lowbit.save_weight(float_head.bfloat16(), tmp_path / "head.safetensors")
    weights = [float_head, packed, tmp_path / "head.safetensors", packed]
    model.lm_head.unload()
    for weight in weights:
        model.lm_head.load(weight)
        model.lm_head(torch.zeros(1, 64))
        model.lm_head.unload()
    before = resident_bytes()
    for swap in range(100):
        model.lm_head.load(weights[swap % len(weights)])
        model.lm_head(torch.zeros(1, 64))
        model.lm_head.unload()
    assert resident_bytes() - before < 8 << 20  # one table kept would be 8 or 16 MB


def test_a_swapped_head_leaves_the_embedding_and_comes_back(model, tmp_path):
    expected, table = logits(model), model.model.embed_tokens.packed
    models.set_weights(model, {"lm_head": torch.randn(257, 64)})
    assert model.model.embed_tokens.packed.equal(table) and not model.config.tie_word_embeddings
    lowbit.save(model, tmp_path)
    assert torch.equal(logits(lowbit.load(tmp_path)), logits(model))
    models.set_weights(model, {"lm_head": model.model.embed_tokens.packed})
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(model), expected)


def test_heads_in_16_bits_are_swapped_too(tmp_path):
    for tie in (True, False):
        model = llama(tie)
        expected = logits(model)
        lowbit.quantize(model, recipe=lowbit.Recipe(bits=8, group_size=32, method="rtn", head_bits=16))
        for loaded in (model, saved_and_loaded(model, tmp_path)):
            held = loaded.lm_head.unload()
            loaded.lm_head.load(lowbit.PackedMatrix.from_float(held, "int8", 32))
            assert (logits(loaded) - expected).abs().max() < 0.05
            assert loaded.model.embed_tokens.weight.is_floating_point()


def saved_and_loaded(model, folder):
    lowbit.save(model, folder)
    return lowbit.load(folder)


def test_set_weights_changes_nothing_when_one_does_not_fit(model):
    expected = logits(model)
    with pytest.raises(ValueError, match=r"lm_head: weight: expected shape \[257, 64\], got \[256, 64\]"):
        models.set_weights(model, {"model.embed_tokens": torch.zeros(257, 64), "lm_head": torch.zeros(256, 64)})
    with pytest.raises(ValueError, match="expected a linear layer or an embedding, got LlamaRMSNorm"):
        models.set_weights(model, {"model.norm": torch.zeros(257, 64)})
    with pytest.raises(AttributeError):
        models.set_weights(model, {"model.nothing": torch.zeros(257, 64)})
    assert torch.equal(logits(model), expected)


# -- from files ------------------------------------------------------------------------------------------------------


def test_a_weight_to_a_file_and_back(tmp_path):
    path = tmp_path / "head.safetensors"
    dense = torch.randn(40, 64, dtype=torch.bfloat16)
    lowbit.save_weight(dense, path)
    assert torch.equal(lowbit.load_weight(path, "lm_head"), dense)
    assert torch.equal(lowbit.load_weight(path, "another.name"), dense)  # the only one there
    assert list(safetensors.torch.load_file(path)) == ["lm_head.weight"]
    for packed in (
        lowbit.PackedMatrix.from_float(dense, "int3", 32, symmetric=False),
        lowbit.PackedMatrix.from_float(dense, "trit", per_tensor=True),
    ):
        lowbit.save_weight(packed, path, "model.embed_tokens")
        assert lowbit.load_weight(path).equal(packed)
    with pytest.raises(
        TypeError, match=r"weight: expected a PackedMatrix or a float tensor \[rows, cols\], got torch.int8"
    ):
        lowbit.save_weight(torch.zeros(3, 3, dtype=torch.int8), path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a model folder or a \.safetensors file"):
        lowbit.load_weight(tmp_path / "nowhere")
    safetensors.torch.save_file({"a.weight": dense, "b.weight": dense.clone()}, path)
    with pytest.raises(ValueError, match=r"lm_head: expected a weight of that name, found a, b"):
        lowbit.load_weight(path, "lm_head")
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(3, 1, 64, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected floats \[rows, cols\], or an entry in the lowbit"):
        lowbit.load_weight(path, "lm_head")


def test_a_weight_out_of_a_folder(tmp_path, model):
    plain = llama(vocab_size=257)
    plain.save_pretrained(tmp_path / "plain")
    lowbit.save(model, tmp_path / "packed")
    table = plain.model.embed_tokens.weight
    for name in ("lm_head", "model.embed_tokens"):  # tied: one table in both kinds of folder
        assert torch.equal(lowbit.load_weight(tmp_path / "plain", name), table)
        assert lowbit.load_weight(tmp_path / "packed", name).equal(model.lm_head.packed)
    other = lowbit.load(tmp_path / "packed")
    other.lm_head.load(tmp_path / "plain", replace=True)
    assert torch.equal(other.lm_head.weight, table)
    other.model.layers[0].mlp.up_proj.load(tmp_path / "plain", replace=True)
    assert torch.equal(other.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    other.model.layers[0].mlp.up_proj.load(tmp_path / "plain", name="model.layers.1.mlp.up_proj", replace=True)
    assert torch.equal(other.model.layers[0].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(ValueError, match=r"model.none: expected a weight of that name"):
        lowbit.load_weight(tmp_path / "plain", "model.none")
    (tmp_path / "packed" / "lowbit-commit.json").write_text("{}")
    with pytest.raises(ValueError, match="a save was cut off here"):
        lowbit.load_weight(tmp_path / "packed", "lm_head")


def test_a_weight_out_of_a_gptq_folder(tmp_path):
    model = pack(llama())
    lowbit.save(model, tmp_path, format="gptq_v2")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(lowbit.load_weight(tmp_path, name).unpack(), model.get_submodule(name).packed.unpack())
    assert torch.equal(lowbit.load_weight(tmp_path, "lm_head"), model.lm_head.weight)


# -- in a folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, model):
    original = llama(vocab_size=257, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "original")
    lowbit.save(model, tmp_path / "out")
    return tmp_path / "out", tmp_path / "original", original


def run(*arguments):
    return main(list(map(str, arguments)))


def test_head_rewrites_a_folder(capsys, folders):
    out, original, float_model = folders
    before = lowbit.load(out)
    assert run("head", out, "--bits", 16, "--from", original, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modules"] == {"lm_head": {"before": "int8", "after": "bfloat16"}}
    after = lowbit.load(out)
    assert torch.equal(after.lm_head.weight, float_model.lm_head.weight.float())  # the dtype of the model
    assert after.model.embed_tokens.packed.equal(before.model.embed_tokens.packed)
    assert not after.config.tie_word_embeddings
    assert lowbit.checkpoint.verify(out)
    for name, module, packed in lowbit.checkpoint.native.packed_modules(after):
        assert packed.equal(before.get_submodule(name).packed), name
        assert type(module) is type(before.get_submodule(name))
    # and back: both in one table again, since the original has one
    assert run("head", out, "--bits", 4, "--part", "both", "--from", original, "--group-size", 32) == 0
    again = lowbit.load(out)
    assert again.lm_head.packed.format == "int4" and again.config.tie_word_embeddings
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert run("head", out, "--part", "embedding", "--from", original) == 0
    assert lowbit.load(out).lm_head.packed.equal(again.lm_head.packed)
    assert run("head", out, "--bits", 8, "--part", "embedding") == 0  # from the float table that lies there
    assert lowbit.load(out).model.embed_tokens.packed.format == "int8"


def test_head_refuses(capsys, folders, tmp_path):
    out, original, _ = folders
    before = (out / "model.safetensors").read_bytes()
    other = llama(vocab_size=300)
    other.save_pretrained(tmp_path / "other")
    for arguments, message in (
        ((out, "--bits", 5, "--from", original), "bits: expected 16, 8, 4, 3, 2 or trit, got '5'"),
        ((out, "--part", "tail", "--from", original), "part: expected one of head, embedding, both, got 'tail'"),
        ((out,), "lm_head: expected a float weight, got int8: name the original model with --from"),
        ((out, "--from", tmp_path / "other"), "lm_head: weight: expected shape [257, 64], got [300, 64]"),
        ((original, "--from", original), "quant_method: expected lowbit, got None"),
        ((tmp_path / "none", "--from", original), "no such model folder"),
        ((out, "--from", tmp_path / "none"), "none: no such model folder"),
    ):
        assert run("head", *arguments) == 2
        assert message in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


def test_costs_of_the_head_and_the_embedding(capsys, folders, tmp_path):
    out, original, _ = folders
    tokenizer = lowbit_tokenizer(257)
    for folder in (out, original):
        tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("some text of few letters " * 40)
    arguments = ("--text", tmp_path / "text.txt", "--costs", "--json")
    assert run("inspect", out, "--against", original, *arguments) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    choices = costs["choices"]
    assert [(c["part"], c["format"], c["now"]) for c in choices] == [
        ("embedding and head", "float32", False),
        ("embedding and head", "int8", True),
        ("embedding and head", "int4", False),
    ]
    table = lowbit.load(out).lm_head.packed
    assert [c["bytes"] for c in choices] == [257 * 64 * 4, table.nbytes, 257 * (64 + 2)]
    assert all(c["microseconds"] > 0 for c in choices)
    assert 0 < choices[0]["kl_divergence"] < choices[2]["kl_divergence"]
    assert run("head", out, "--from", original) == 0
    capsys.readouterr()
    assert run("inspect", out, *arguments) == 0
    choices = json.loads(capsys.readouterr().out)["costs"]["choices"]
    assert [(c["part"], c["modules"]) for c in choices[::3]] == [
        ("embedding", ["model.embed_tokens"]),
        ("head", ["lm_head"]),
    ]
    assert [c["kl_divergence"] for c in choices if c["now"]] == [0, 0]
    assert run("inspect", out, "--costs", "--text", tmp_path / "text.txt") == 0
    assert "µs a token" in capsys.readouterr().out
    assert run("inspect", out / "model.safetensors", "--costs") == 2


def lowbit_tokenizer(size):
    import tokenizers

    words = {f"{chr(97 + i % 26)}{i // 26 or ''}": i for i in range(size - 1)} | {"[UNK]": size - 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


# -- on demand -------------------------------------------------------------------------------------------------------


def test_on_demand_checks_a_module_when_it_is_first_used(folders):
    out, _, _ = folders
    expected = logits(lowbit.load(out))
    opened = lowbit.load(out, on_demand=True)
    assert opened.lm_head.check_on_use and torch.equal(logits(opened), expected)
    assert not opened.lm_head.check_on_use
    path, name = out / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = safetensors.torch.load_file(path)
    tensors[f"{name}.weight_scale"][3, 1] = float("nan")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"scales\[3, 1\]"):
        lowbit.load(out)
    opened = lowbit.load(out, on_demand=True)
    opened.model.layers[0].mlp(torch.zeros(1, 64))
    for _ in range(2):  # and it stays an error
        with pytest.raises(ValueError, match=rf"{name}: scales\[3, 1\]: expected a finite"):
            opened.model.layers[1].mlp(torch.zeros(1, 64))
    with pytest.raises(ValueError, match="on_demand: expected without in_memory=True"):
        lowbit.load(out, on_demand=True, in_memory=True)


def test_on_demand_takes_files_of_other_writers_where_they_lie(folders):
    """Their codes begin anywhere; they are copied to whole cache lines only where everything is read anyway."""
    out, _, _ = folders
    path = out / "model.safetensors"
    expected, tensors = logits(lowbit.load(out)), safetensors.torch.load_file(path)
    safetensors.torch.save_file({f"a{'a' * i}": torch.zeros(1) for i in range(3)} | tensors, path)
    opened = lowbit.load(out, on_demand=True, strict=False)
    assert any(module.packed.codes.data_ptr() % 64 for _, module, _ in lowbit.checkpoint.native.packed_modules(opened))
    assert torch.equal(logits(opened), expected)
    assert torch.equal(
        opened.model.embed_tokens(torch.tensor([5])),
        lowbit.load(out, strict=False).model.embed_tokens(torch.tensor([5])),
    )


def test_opening_on_demand_touches_headers_only(tmp_path):
    """A folder of 1.6 GB, holes on the disk, opens within a few MB; a layer that is used brings its own pages."""
    big_folder(tmp_path, layers=12)
    before = resident_bytes()
    model = lowbit.load(tmp_path, on_demand=True)
    opened = resident_bytes()
    assert opened - before < 32 << 20
    layer = model.model.layers[5].mlp
    layer.down_proj(torch.zeros(1, 8192))
    used = resident_bytes() - opened
    own = layer.down_proj.packed.nbytes
    assert own <= used + (1 << 20) and used < own + (24 << 20)


def big_folder(folder, layers):
    """The model that somebody saved, with every code and scale 0: files with holes take no room."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from folders import write_packed

    write_packed(folder, config, holes=True)


def test_half_present_modules_are_named(folders):
    out, _, _ = folders
    path = out / "model.safetensors"
    for change, message in (
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "model.layers.0.mlp.up_proj: expected either"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj: expected either"),
        (lambda t: t.update({"lm_head.weight_scale": torch.ones(257, 1)}), "lm_head: expected no tensors"),
        (lambda t: t.update({"model.more.weight": torch.ones(2, 2)}), "got 1 others: model.more.weight"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: expected by the model"),
    ):
        copied = shutil.copytree(out, out.parent / "copied")
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, copied / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            lowbit.load(copied)
        shutil.rmtree(copied)
