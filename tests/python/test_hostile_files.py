"""Damaged and malicious checkpoints: a typed error that names the file and the thing, never a crash or a wild read."""

import json
import shutil
import struct

import pytest
import torch
from checkpoint_models import act_order, llama, logits, pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.checkpoint.safetensors_map import HEADER_LIMIT, SafetensorsFile, serialize

PACKED = "model.layers.0.mlp.up_proj"  # 128 x 64, int4, group size 32, zeros, perm
TYPED = (ValueError, FileNotFoundError, NotImplementedError)


def file_of(header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="U8", shape=(64,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = file_of({"a": tensor()})

BROKEN_FILES = {
    "empty": (b"", "expected at least 8 bytes, got 0"),
    "seven bytes": (b"\0" * 7, "expected at least 8 bytes, got 7"),
    "header length beyond the file": (file_of({"a": tensor()}, length=1 << 20), "header length: expected at most"),
    "huge header length": (
        file_of({"a": tensor()}, length=(1 << 64) - 1),
        f"at most {HEADER_LIMIT}, got {(1 << 64) - 1}",
    ),
    "header cut off": (GOOD[:20], "header length: expected at most 12"),
    "data cut off": (GOOD[:-1], "a: data_offsets: expected .* within the 63 bytes"),
    "data too long": (GOOD + b"\0", r"size: expected \d+ bytes by its header, got \d+"),
    "no header": (file_of(b"", b""), "header: not valid JSON"),
    "garbage": (file_of(b"\xff\xfe{}"), "header: not valid JSON"),
    "a list": (file_of(b"[]", b""), "header: expected a JSON object, got list"),
    "nested too deeply": (file_of(b'{"a":' * 200_000), "nested too deeply|not valid JSON"),
    "a long integer": (file_of(b'{"a":' + b"9" * 100_000 + b"}"), "header: not valid JSON"),
    "duplicate keys": (file_of(b'{"a":{},"a":{}}'), "key 'a' appears twice"),
    "duplicate fields": (file_of(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "key 'dtype' appears twice"),
    "NaN": (file_of(b'{"a":NaN}'), "NaN is not JSON"),
    "metadata of numbers": (file_of({"__metadata__": {"x": 1}}, b""), "__metadata__: expected an object of texts"),
    "an entry that is a number": (file_of({"a": 1}), "a: expected an object of dtype, shape and data_offsets"),
    "a field missing": (file_of({"a": {"dtype": "U8", "shape": [64]}}), "a: expected an object of dtype, shape and"),
    "a field too many": (file_of({"a": {**tensor(), "x": 1}}), "a: expected an object of dtype, shape and"),
    "unknown dtype": (file_of({"a": tensor("U7")}), "a: dtype: expected one of .*, got 'U7'"),
    "dtype of a list": (file_of({"a": tensor(["U8"])}), "a: dtype: expected one of"),
    "negative size": (file_of({"a": tensor(shape=(-1, -64))}), "a: shape: expected a list of sizes"),
    "fractional size": (file_of({"a": tensor(shape=(64.0,))}), "a: shape: expected a list of sizes"),
    "boolean size": (file_of({"a": tensor(shape=(True, 64))}), "a: shape: expected a list of sizes"),
    "sizes whose product wraps": (
        file_of({"a": tensor(shape=(1 << 32, 1 << 32))}),
        "a: data_offsets: expected 18446744073709551616",
    ),
    "too many dimensions": (file_of({"a": tensor(shape=[1] * 65 + [64])}), "a: shape: expected a list of sizes"),
    "shape too small": (file_of({"a": tensor(shape=(63,))}), "a: data_offsets: expected 63 bytes for U8"),
    "dtype too wide": (file_of({"a": tensor("F32")}), "a: data_offsets: expected 256 bytes for F32"),
    "offsets reversed": (file_of({"a": tensor(shape=(0,), offsets=(64, 0))}), "a: data_offsets: expected"),
    "offsets beyond the file": (file_of({"a": tensor(shape=(65,), offsets=(0, 65))}), "within the 64 bytes of data"),
    "offsets far beyond the file": (file_of({"a": tensor(offsets=(1 << 62, (1 << 62) + 64))}), "within the 64 bytes"),
    "negative offset": (file_of({"a": tensor(offsets=(-64, 0))}), "a: data_offsets: expected"),
    "three offsets": (file_of({"a": tensor(offsets=(0, 64, 64))}), "a: data_offsets: expected"),
    "overlap": (file_of({"a": tensor(), "b": tensor(shape=(32,), offsets=(32, 64))}), "b: data_offsets: .* overlaps"),
    "the same bytes twice": (file_of({"a": tensor(), "b": tensor()}), "b: data_offsets: .* overlaps"),
    "a hole": (
        file_of({"a": tensor(shape=(8,), offsets=(0, 8)), "b": tensor(shape=(8,), offsets=(56, 64))}),
        "b: data_offsets: .* leaves a hole",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_safetensors_are_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    with pytest.raises(ValueError, match=f"header length: expected at most {HEADER_LIMIT}, got {HEADER_LIMIT + 1}"):
        SafetensorsFile(path)


def test_misaligned_and_empty_tensors_are_read(tmp_path):
    """Other writers align nothing: legal, so copied instead of mapped."""
    header = {
        "a": tensor(shape=(3,), offsets=(0, 3)),
        "b": tensor("F32", (1,), (3, 7)),
        "c": tensor("F32", (0, 9), (7, 7)),
    }
    (tmp_path / "x").write_bytes(file_of(header, b"\1\2\3" + struct.pack("<f", 1.5)))
    opened = SafetensorsFile(tmp_path / "x")
    assert opened.tensor("a").tolist() == [1, 2, 3] and opened.tensor("b").tolist() == [1.5]
    assert opened.tensor("c").shape == (0, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    model = pack(llama(), table="int8")
    model.get_submodule(PACKED).load(act_order(128, 64, "int4", 32, symmetric=False), replace=True)
    lowbit.save(model, path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(folder, change):
    """Applies change(tensors) to the tensors of a folder, in a well-formed file without lowbit's metadata."""
    opened = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: opened.tensor(name).clone() for name in opened.entries}
    change(tensors)
    (folder / "model.safetensors").write_bytes(b"".join(serialize(tensors, {"format": "pt"})()))


def reconfigure(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def entry_with(**changes):
    def change(described):
        described["modules"][PACKED].update(changes)

    return change


BROKEN_CONFIGS = {
    "no version": (lambda c: c.pop("format_version"), "format_version: expected 1, got None"),
    "a later version": (lambda c: c.update(format_version=2), "format_version: expected 1, got 2"),
    "version true": (lambda c: c.update(format_version=True), "format_version: expected 1, got True"),
    "no modules": (lambda c: c.pop("modules"), "modules: expected an object, got NoneType"),
    "modules of a list": (lambda c: c.update(modules=[]), "modules: expected an object, got list"),
    "an entry of a list": (lambda c: c["modules"].update({PACKED: []}), "up_proj: expected an object, got list"),
    "an unknown field": (entry_with(rotation="hadamard"), r"up_proj: expected fields among .*, got \['rotation'\]"),
    "an unknown format": (
        entry_with(format="int5"),
        "up_proj: format: expected one of int2, int3, int4, int8, trit, got 'int5'",
    ),
    "a format of a list": (entry_with(format=["int4"]), "up_proj: format: expected one of"),
    "no columns": (entry_with(cols=0), "up_proj: cols: expected a positive integer, got 0"),
    "columns of text": (entry_with(cols="64"), "up_proj: cols: expected a positive integer, got '64'"),
    "many columns": (entry_with(cols=1 << 40), "up_proj: cols: expected a positive integer"),
    "group too large": (entry_with(group_size=65), "up_proj: group_size: expected -1 or 1 to 64, got 65"),
    "group of 24": (entry_with(group_size=24), "up_proj: group_size: expected -1, a multiple of 16"),
    "group true": (entry_with(group_size=True), "up_proj: group_size: expected"),
    "unknown activations": (entry_with(activations="int4"), "up_proj: activations: expected float or int8, got 'int4'"),
    "unknown kind": (entry_with(kind="conv"), "up_proj: kind: expected linear or embedding, got 'conv'"),
    "wrong kind": (entry_with(kind="embedding"), r"up_proj: kind: expected linear \(a Linear\), got embedding"),
    "shared with nothing": (entry_with(shared_with="gone"), "up_proj: shared_with: expected a module that owns"),
    "shared with a list": (entry_with(shared_with=["lm_head"]), "up_proj: shared_with: expected"),
    "shared with itself": (entry_with(shared_with=PACKED), "up_proj: shared_with: expected a module that owns"),
    "shared, but has its own": (entry_with(shared_with="model.embed_tokens"), "up_proj: expected no tensors"),
    "the wrong width": (entry_with(format="int3"), "up_proj: "),
    "the wrong columns": (entry_with(cols=63), "up_proj: "),
    "another group size": (entry_with(group_size=16), "up_proj: "),
    "an entry left out": (lambda c: c["modules"].pop(PACKED), "up_proj"),
    "a module that is not there": (
        lambda c: c["modules"].update({"model.layers.9.x": {"format": "int4", "cols": 64, "group_size": 32}}),
        "model.layers.9.x: expected either weight .* found neither",
    ),
}


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize(("change", "message"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_configurations_that_lie_are_refused(copied, change, message, with_metadata):
    if not with_metadata:
        rewrite(copied, lambda tensors: None)
    reconfigure(copied, change)
    with pytest.raises(ValueError, match=r"up_proj|metadata" if with_metadata and "up_proj" in message else message):
        lowbit.load(copied)


def put(part, make):
    def change(tensors):
        name = f"{PACKED}.{part}"
        tensors[name] = make(tensors[name])

    return change


def poke(index, value):
    def change(values):
        values[index] = value
        return values

    return change


BROKEN_TENSORS = {
    "codes gone": (lambda t: t.pop(f"{PACKED}.weight"), "found weight_scale, weight_zero, weight_perm"),
    "scales gone": (
        lambda t: t.pop(f"{PACKED}.weight_scale"),
        r"found weight \(torch.uint8 \[128, 1, 64\]\), weight_zero",
    ),
    "float weight beside scales": (
        put("weight", lambda w: torch.zeros(128, 64)),
        r"found weight \(torch.float32 \[128, 64\]\), weight_scale",
    ),
    "codes of int8": (put("weight", lambda w: w.view(torch.int8)), r"found weight \(torch.int8"),
    "codes of two dimensions": (put("weight", lambda w: w.view(128, 64)), r"codes: expected shape \[rows, 1, 64\]"),
    "a line short": (put("weight", lambda w: w[:, :, :32].contiguous()), r"codes: expected shape \[rows, 1, 64\]"),
    "a row short": (put("weight", lambda w: w[:127].contiguous()), "scales: expected|scales"),
    "no rows": (put("weight", lambda w: w[:0].contiguous()), "shape: expected at least 1x1, got 0x64"),
    "scales of integers": (put("weight_scale", lambda s: s.to(torch.int32)), "scales dtype: expected"),
    "scales of float64": (put("weight_scale", lambda s: s.double()), "scales dtype: expected"),
    "scales of one dimension": (put("weight_scale", lambda s: s.flatten()), "scales: expected 2 dimensions, got 1"),
    "scales too few": (put("weight_scale", lambda s: s[:, :1].contiguous()), "zeros: expected|scales"),
    "a scale NaN": (put("weight_scale", poke((127, 1), float("nan"))), r"scales\[127, ?1\]|scales"),
    "a scale infinite": (put("weight_scale", poke((0, 0), float("inf"))), "scales"),
    "a zero too large": (put("weight_zero", poke((5, 1), 16)), r"zeros\[5, ?1\]|zeros"),
    "zeros of int32": (put("weight_zero", lambda z: z.int()), "zeros: expected torch.uint8"),
    "zeros of another shape": (
        put("weight_zero", lambda z: z.t().contiguous()),
        "zeros: expected torch.uint8 of the scales' shape",
    ),
    "perm repeats": (put("weight_perm", poke(0, 1)), "perm"),
    "perm negative": (put("weight_perm", poke(0, -1)), "perm"),
    "perm beyond": (put("weight_perm", poke(63, 64)), "perm"),
    "perm of int64": (put("weight_perm", lambda p: p.long()), r"perm: expected torch.int32 \[64\]"),
    "perm short": (put("weight_perm", lambda p: p[:63].contiguous()), r"perm: expected torch.int32 \[64\]"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_tensors_that_lie_are_refused(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message) as caught:
        lowbit.load(copied)
    assert PACKED in str(caught.value)
    if "found" not in message:
        assert "model.safetensors" in str(caught.value)


def test_transformers_refuses_them_too(copied):
    import transformers

    import lowbit.integrations.transformers  # noqa: F401

    rewrite(copied, put("weight_perm", poke(0, 1)))
    with pytest.raises(ValueError, match=f"{PACKED}.*perm"):
        transformers.AutoModelForCausalLM.from_pretrained(copied)


def test_tensors_that_the_model_lacks_or_needs(copied):
    rewrite(copied, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(ValueError, match="LlamaForCausalLM only, got 1 others"):
        lowbit.load(copied)
    with pytest.warns(UserWarning, match="got 1 others: model.extra"):
        assert lowbit.load(copied, strict=False).model.layers[0].mlp.up_proj.packed is not None
    rewrite(copied, lambda tensors: (tensors.pop("model.extra"), tensors.pop("model.norm.weight")))
    with pytest.raises(ValueError, match=r"model.norm.weight: expected by the model, not found in the files"):
        lowbit.load(copied)
    rewrite(copied, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(ValueError, match=r"model.norm.weight: shape: expected \[64\], got \[63\]"):
        lowbit.load(copied)


def test_scales_without_an_entry_are_refused(copied):
    rewrite(copied, lambda tensors: tensors.update({"model.norm.weight_scale": torch.ones(1, 1)}))
    with pytest.raises(ValueError, match=r"model.norm.weight_scale: expected an entry for model.norm"):
        lowbit.load(copied)


@pytest.mark.parametrize("field", ["format", "group_size", "cols"])
def test_metadata_that_contradicts_the_configuration_is_refused(copied, field):
    value = {"format": "int8", "group_size": 64, "cols": 60}[field]
    reconfigure(copied, entry_with(**{field: value}))
    with pytest.raises(
        ValueError, match=rf"model.safetensors: metadata: lowbit: {PACKED}: expected .* as in config.json"
    ):
        lowbit.load(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json: not valid JSON"),
        ("[]", "config.json: expected a JSON object, got list"),
        ("{}", "config.json"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "key 'model_type' appears twice"),
        ('{"model_type": 5}', "config.json"),
        ('{"model_type": "no such model"}', "config.json"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "architectures": ["os.system"]}', "architectures"),
        ('{"model_type": "llama", "quantization_config": 3}', "quantization_config: expected an object, got int"),
    ],
)
def test_configurations_of_garbage_are_refused(copied, text, message):
    (copied / "config.json").write_text(text)
    with pytest.raises(TYPED, match=message):
        lowbit.load(copied)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_more_layers_than_tensors_are_refused_before_they_are_built(copied, key):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "text_config": {key: 10**12}}))
    with pytest.raises(
        ValueError, match=rf"config.json: {key}: expected at most the number of tensors, \d+, got {10**12}"
    ):
        lowbit.load(copied)


def test_a_plain_folder_is_checked_too(tmp_path):
    llama().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: .* data_offsets: expected"):
        lowbit.load(tmp_path)


def test_an_unknown_method_is_named(copied):
    reconfigure(copied, lambda described: described.update(quant_method="awq"))
    with pytest.raises(
        NotImplementedError, match=r"config.json: .*quant_method: expected lowbit, gptq or bitnet, got 'awq'"
    ):
        lowbit.load(copied)


def test_files_that_are_not_there(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json"):
        lowbit.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json: not found"):
        lowbit.load(tmp_path / "empty")
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or model.safetensors.index.json"):
        lowbit.load(copied)


@pytest.fixture
def sharded(folder, tmp_path):
    lowbit.save(lowbit.load(folder), tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / sorted(path.name for path in sharded.glob("model-*"))[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-\d+.safetensors: not found, but .* says that it holds"
    ):
        lowbit.load(sharded)


@pytest.mark.parametrize(
    "target",
    ["../model.safetensors", "/etc/passwd", "x/../model.safetensors", "model.bin", 3, None, "..\\m.safetensors"],
)
def test_an_index_that_points_elsewhere_is_refused(sharded, target):
    (sharded.parent / "model.safetensors").write_bytes(GOOD)
    reindex(sharded, lambda index: index["weight_map"].update({"model.norm.weight": target}))
    with pytest.raises(
        ValueError, match=r"index.json: model.norm.weight: expected the name of a .safetensors file beside it"
    ):
        lowbit.load(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": {}}}']
)
def test_an_index_of_garbage_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json"):
        lowbit.load(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    first = sorted(path.name for path in sharded.glob("model-*"))[0]

    def change(index):
        moved = next(name for name, shard in index["weight_map"].items() if shard != first)
        index["weight_map"][moved] = first

    reindex(sharded, change)
    with pytest.raises(ValueError, match=f"{first}: .* not found in the file"):
        lowbit.load(sharded)


@pytest.fixture(scope="module")
def small_file():
    tensors = {
        "codes": torch.arange(128, dtype=torch.uint8).view(2, 1, 64),
        "scale": torch.rand(2, 1),
        "é": torch.zeros(0),
    }
    return b"".join(serialize(tensors, {"format": "pt", "note": "x"})())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 10_000),
)
def test_corrupted_bytes_never_read_outside_the_file(small_file, tmp_path, edits, cut):
    """Random bytes of the header replaced, the end perhaps cut off: a ValueError, or tensors that lie in the file."""
    content = bytearray(small_file)
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position, value in edits:
        content[position % header_end] = value
    if cut < len(content):
        del content[cut:]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        opened = SafetensorsFile(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert sum(entry.end - entry.begin for entry in opened.entries.values()) <= len(content)
    for name in opened.entries:
        read = opened.tensor(name)
        assert read.shape == opened.entries[name].shape and read.clone().numel() == read.numel()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(32, 126)), min_size=1, max_size=3),
    name=st.sampled_from(["config.json", "model.safetensors"]),
)
def test_a_corrupted_checkpoint_loads_or_says_why(folder, tmp_path, edits, name):
    """Through the whole of load(): whatever comes, it is a typed error or a model that runs."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    copied = shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((copied / name).read_bytes())
    begin = content.index(b'"quantization_config"') if name == "config.json" else 8
    end = len(content) if name == "config.json" else 8 + int.from_bytes(content[:8], "little")
    for position, value in edits:
        content[begin + position % (end - begin)] = value
    (copied / name).write_bytes(content)
    try:
        model = lowbit.load(copied)
    except TYPED as error:
        assert str(error)
    else:
        assert logits(model).shape == (1, 11, 256)


def test_the_untouched_folder_loads(folder):
    assert lowbit.load(folder).get_submodule(PACKED).packed.perm is not None
