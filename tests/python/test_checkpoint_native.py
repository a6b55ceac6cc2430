"""lowbit's own container: bit-exact, deterministic, mapped in place, and known to Transformers."""

import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_models import act_order, build, digests, gemma3, llama, logits, pack

import lowbit
from lowbit import checkpoint, models
from lowbit.checkpoint import native
from lowbit.checkpoint.safetensors_map import SafetensorsFile, Weights, serialize


def gpt2():
    return build(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, n_positions=64))


def qwen2():
    return build(
        transformers.Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=257,
            max_position_embeddings=128,
        )
    )


MODELS = {
    "llama, int4": lambda: pack(llama()),
    "llama, int3, asymmetric, bf16": lambda: pack(llama(dtype=torch.bfloat16), "int3", 16, symmetric=False),
    "llama, one shared int8 table": lambda: pack(llama(), "int2", 64, table="int8"),
    "llama, untied, int4 embedding": lambda: pack(llama(tie=False), "int4", table="int4"),
    "llama, 257 rows, int8 activations": lambda: pack(llama(vocab_size=257), table="int3", activations="int8"),
    "gpt2, Conv1D and biases": lambda: pack(gpt2(), table="int4"),
    "gemma3, scaled embedding": lambda: pack(gemma3(), table="int8"),
    "qwen2, biases, nothing shared": lambda: pack(qwen2(), scale_dtype=torch.float32),
    "no packed module": llama,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_and_loaded_is_the_same_model_and_the_same_bytes(make, tmp_path):
    model = make()
    expected = logits(model)
    lowbit.save(model, tmp_path / "a")
    loaded = lowbit.load(tmp_path / "a")
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded), expected)
    lowbit.save(loaded, tmp_path / "b")
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    checkpoint.verify(tmp_path / "b")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_transformers_loads_and_saves_it(make, tmp_path):
    import lowbit.integrations.transformers

    model = make()
    expected = logits(model)
    lowbit.save(model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(lowbit.load(tmp_path / "b")), expected)


def test_every_form_of_matrix_survives(tmp_path):
    model = llama(tie=False)
    model.lm_head = lowbit.nn.Linear.from_packed(act_order(256, 64, "int3", 32, symmetric=False))
    matrices = {
        "model.layers.0.mlp.down_proj": act_order(64, 128, "int4", 32, symmetric=True),
        "model.layers.1.mlp.down_proj": act_order(64, 128, "int8", 128, symmetric=False),
        "model.layers.1.mlp.up_proj": lowbit.PackedMatrix(
            torch.randint(0, 256, (128, 1, 64), dtype=torch.uint8), torch.tensor([[0.5]]), format="int8", cols=64
        ),
    }
    models.patch(model, matrices)
    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path)
    for name, module, matrix in native.packed_modules(model):
        assert loaded.get_submodule(name).packed.equal(matrix)
        assert type(loaded.get_submodule(name)) is type(module)
    assert torch.equal(logits(loaded), logits(model))


def test_a_shared_table_is_one_allocation_on_disk_and_in_memory(tmp_path):
    lowbit.save(pack(llama(), table="int8"), tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in names and not any(name.startswith("lm_head") for name in names)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]["lm_head"]
    assert entry["shared_with"] == "model.embed_tokens" and entry["kind"] == "linear"
    for model in (lowbit.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        head, embedding = model.lm_head.packed, model.model.embed_tokens.packed
        for part in head.tensors:
            assert head.tensors[part].data_ptr() == embedding.tensors[part].data_ptr()


def test_a_packed_embedding_beside_a_float_head(tmp_path):
    model = llama()
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    models.patch(model, {"model.embed_tokens": lowbit.PackedMatrix.from_float(model.model.embed_tokens.weight, "int4")})
    model.lm_head.weight = head
    lowbit.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = lowbit.load(tmp_path)
    assert torch.equal(loaded.lm_head.weight, head) and torch.equal(logits(loaded), logits(model))
    loaded.tie_weights()
    assert torch.equal(loaded.lm_head.weight, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_head_put_into_the_file_loads_unquantized(tmp_path, dtype):
    model = pack(llama(), table="int8")
    lowbit.save(model, tmp_path)
    with SafetensorsReplaced(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = torch.randn(256, 64).to(dtype)
    loaded = lowbit.load(tmp_path)
    assert loaded.lm_head.packed is None and loaded.model.embed_tokens.packed is not None
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"].float())
    model.lm_head.load(tensors["lm_head.weight"].float(), replace=True)
    assert torch.equal(logits(loaded), logits(model))


def test_a_float_weight_put_in_place_of_a_packed_one_loads_unquantized(tmp_path):
    name = "model.layers.1.mlp.up_proj"
    lowbit.save(pack(llama()), tmp_path)
    with SafetensorsReplaced(tmp_path / "model.safetensors") as tensors:
        del tensors[f"{name}.weight_scale"]
        tensors[f"{name}.weight"] = torch.randn(128, 64)
    loaded = lowbit.load(tmp_path)
    assert torch.equal(loaded.get_submodule(name).weight, tensors[f"{name}.weight"])
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").packed is not None


class SafetensorsReplaced:
    """Rewrites a file with the safetensors library, as another tool would: other order, no metadata, no alignment."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.tensors = safetensors.torch.load_file(self.path)
        return self.tensors

    def __exit__(self, *_):
        safetensors.torch.save_file(self.tensors, self.path)


def test_shards_hold_the_same_model(tmp_path):
    model = pack(llama(), table="int8")
    lowbit.save(model, tmp_path / "one")
    lowbit.save(model, tmp_path / "many", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(Weights(tmp_path / "one")) and set(index["weight_map"].values()) == set(
        shards
    )
    homes = {name.rpartition(".")[0]: set() for name in index["weight_map"]}
    for name, shard in index["weight_map"].items():
        homes[name.rpartition(".")[0]].add(shard)
    assert all(len(home) == 1 for home in homes.values()), "the tensors of a module stay together"
    loaded = lowbit.load(tmp_path / "many")
    assert torch.equal(logits(loaded), logits(model))
    lowbit.save(loaded, tmp_path / "again", max_shard_size=20_000)
    assert digests(tmp_path / "again") == digests(tmp_path / "many")
    lowbit.save(loaded, tmp_path / "many")  # the shards that the loaded model maps give way to one file
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(model))


def test_other_tools_read_the_file_and_codes_are_aligned(tmp_path):
    model = pack(llama(vocab_size=257), "int3", 16, symmetric=False, table="int8")
    lowbit.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 64 == 0
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt" and json.loads(metadata["lowbit"])["quant_method"] == "lowbit"
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        whole_lines = (end - begin) % 64 == 0
        assert not whole_lines or begin % 64 == 0, name
        assert begin % {"U8": 1, "F16": 2, "F32": 4, "I32": 4}[entry["dtype"]] == 0, name
    theirs, ours = safetensors.torch.load_file(path), Weights(tmp_path)
    assert theirs.keys() == set(ours)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_codes_lie_in_the_mapped_file_unless_asked_otherwise(tmp_path):
    lowbit.save(pack(llama(), table="int8"), tmp_path)
    for in_memory, expected in ((False, True), (None, True), (True, False)):
        model = lowbit.load(tmp_path, in_memory=in_memory)
        ranges = mapped_ranges(tmp_path / "model.safetensors")
        for name, _, matrix in native.packed_modules(model):
            address = matrix.codes.data_ptr()
            assert address % 64 == 0
            assert any(begin <= address < end for begin, end in ranges) is expected, (name, in_memory)
        del model


def mapped_ranges(path):
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1] == str(path)]


def test_writing_to_a_loaded_model_does_not_reach_the_file(tmp_path):
    lowbit.save(pack(llama()), tmp_path)
    before = digests(tmp_path)
    model = lowbit.load(tmp_path, in_memory=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
        model.model.layers[0].mlp.up_proj.weight.fill_(255)
    del model
    assert digests(tmp_path) == before


def test_buffers_that_no_file_holds_are_recomputed(tmp_path):
    model = pack(llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}))
    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path)
    assert "model.rotary_emb.inv_freq" not in Weights(tmp_path)
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_tokenizer_and_generation_settings_travel(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = pack(llama())
    model.generation_config.max_new_tokens = 5
    plain = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    lowbit.save(model, tmp_path / "a", tokenizer=tokenizer)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    loaded = lowbit.load(tmp_path / "a")
    assert loaded.generation_config.max_new_tokens == 5
    lowbit.save(loaded, tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").unk_token == "?"


def test_a_plain_folder_loads_and_saves(tmp_path):
    model = llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    loaded = lowbit.load(tmp_path / "plain")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    lowbit.save(pack(loaded), tmp_path / "packed")
    assert torch.equal(logits(lowbit.load(tmp_path / "packed")), logits(loaded))


def test_a_save_killed_anywhere_leaves_a_model_that_loads(tmp_path):
    old, new = pack(llama(), "int4"), pack(llama(tie=False), "int2", table="int8")
    expected = [logits(old), logits(new)]
    seen = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        lowbit.save(old, folder, max_shard_size="40KB")
        killed = saved_by_a_child_killed_at(new, folder, step)
        found = logits(lowbit.load(folder))
        seen.append(next(i for i, those in enumerate(expected) if torch.equal(found, those)))
        checkpoint.verify(folder)
        if not killed:
            break
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and len(seen) > 10


def test_transformers_does_not_load_a_folder_between_two_models(tmp_path):
    import lowbit.integrations.transformers

    lowbit.save(pack(llama()), tmp_path)
    (tmp_path / "lowbit-commit.json").write_text('{"id": "0123456789abcdef", "rename": ["config.json"], "delete": []}')
    with pytest.raises(ValueError, match=r"lowbit-commit.json: a save was cut off here"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    lowbit.load(tmp_path)
    assert not (tmp_path / "lowbit-commit.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def saved_by_a_child_killed_at(model, folder, step):
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def counted(real):
                def call(*arguments, **keywords):
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **keywords)

                return call

            for name in ("replace", "unlink", "fsync"):
                setattr(os, name, counted(getattr(os, name)))
            lowbit.save(model, folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


PEAK = """
import sys, torch, lowbit

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

lowbit.load(sys.argv[1])                       # imports and caches of the libraries
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")                            # resets VmHWM
before = status("VmRSS")
model = lowbit.load(sys.argv[2], in_memory=sys.argv[3] == "True")
after_load = status("VmHWM")
used = max(int(module.weight.max()) for module in model.modules() if isinstance(module, lowbit.nn.Linear))
print(after_load - before, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big_model(tmp_path_factory):
    """200 MB of random codes in 24 matrices, which no float model stood behind."""
    folder = tmp_path_factory.mktemp("big")
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=6144,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, cols = module.weight.shape
            codes = torch.randint(0, 256, (rows, cols // 64, 64), dtype=torch.uint8)
            matrices[name] = lowbit.PackedMatrix(codes, torch.rand(rows, 1), format="int8", cols=cols)
    models.patch(model, matrices)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[key] = torch.nn.Parameter(torch.zeros(parameter.shape, dtype=torch.bfloat16))
    model.lm_head.weight = model.model.embed_tokens.weight
    lowbit.save(model, folder)
    return folder


@pytest.mark.parametrize("in_memory", [False, True])
def test_peak_memory_of_loading_is_the_packed_model(big_model, tmp_path, in_memory):
    lowbit.save(pack(llama()), tmp_path)
    size = (big_model / "model.safetensors").stat().st_size
    assert size > 160e6
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(big_model), str(in_memory)],
        capture_output=True,
        text=True,
        check=True,
    )
    while_loading, once_used = map(int, result.stdout.split())
    assert once_used < 1.1 * size
    if in_memory:
        assert while_loading > 0.9 * size
    else:
        assert while_loading < 0.1 * size, "mapping must not read the codes"


def test_copying_is_the_default_only_where_it_gains(monkeypatch):
    monkeypatch.setattr(native, "_huge_pages_offered", lambda: True)
    monkeypatch.setattr(native, "_available_memory", lambda: 1 << 30)
    assert native._copying_pays(64 << 20)
    assert not native._copying_pays(63 << 20), "small"
    assert not native._copying_pays(513 << 20), "memory is short"
    monkeypatch.setattr(native, "_huge_pages_offered", lambda: False)
    assert not native._copying_pays(64 << 20), "no huge pages"


def test_serializing_is_a_function_of_the_tensors_alone(tmp_path):
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.zeros(0, 5),
        "codes": torch.arange(64, dtype=torch.uint8).view(1, 1, 64),
        "é": torch.tensor(1.5, dtype=torch.bfloat16),
        "transposed": torch.arange(6).view(2, 3).t(),
    }
    (tmp_path / "1.safetensors").write_bytes(b"".join(serialize(tensors, {"x": "1", "y": "2"})()))
    shuffled = dict(reversed(tensors.items()))
    assert b"".join(serialize(shuffled, {"y": "2", "x": "1"})()) == (tmp_path / "1.safetensors").read_bytes()
    opened = SafetensorsFile(tmp_path / "1.safetensors")
    assert opened.metadata == {"x": "1", "y": "2"}
    for name, tensor in tensors.items():
        assert torch.equal(opened.tensor(name), tensor) and opened.entries[name].dtype == tensor.dtype
    theirs = safetensors.torch.load_file(tmp_path / "1.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(TypeError, match="x: dtype"):
        serialize({"x": torch.zeros(1, dtype=torch.complex128)}, {})


@pytest.mark.parametrize("size", [0, -1, "x", "5 XB", True, 1.5, "0GB"])
def test_shard_sizes_that_mean_nothing_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        lowbit.save(llama(), tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_or_format_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="format: expected one of lowbit, gptq, gptq_v2, bitnet, bitnet_auto, got 'gguf'"
    ):
        lowbit.save(llama(), tmp_path, format="gguf")
    with pytest.raises(TypeError, match="expected a Transformers model, got Linear"):
        lowbit.save(torch.nn.Linear(2, 2), tmp_path)
