"""Ternary matrices held as trits or as int2: the choice, loading and saving by it."""

import pytest
import torch

import lowbit
from lowbit import _C
from lowbit.checkpoint.native import packed_modules
from lowbit.checkpoint.ternary_choice import choose_ternary

transformers = pytest.importorskip("transformers")
from tiny_models import build, outputs, token_ids  # noqa: E402


@pytest.fixture(autouse=True)
def without_avx512():
    _C.set_isa("avx2" if not _C.isa_missing("avx2") else "ref")
    yield
    _C.set_isa("auto")


@pytest.mark.parametrize(
    "chosen, cols",
    [
        ("int2", (1, 256, 321, 512, 641, 768, 961, 1024)),
        ("trit", (257, 320, 513, 640, 769, 960, 1025, 1280, 2048, 4096, 11008)),
    ],
)
def test_int2_where_it_takes_no_more_lines(chosen, cols):
    for rows in (1, 7, 4096):
        assert {choose_ternary(rows, k) for k in cols} == {chosen}
        assert {choose_ternary(rows, k, "int8") for k in cols} == {"trit"}


@pytest.mark.skipif(bool(_C.isa_missing("avx512vnni")), reason="no AVX-512 VNNI")
def test_trits_where_their_rows_are_as_fast():
    _C.set_isa("avx512vnni")
    assert {choose_ternary(rows, k) for rows in (1, 4096) for k in (1, 256, 768, 1024, 4096)} == {"trit"}


def saved(folder, architecture="llama", activations="float", **changes):
    model = build(architecture, **changes)
    recipe = lowbit.Recipe(
        bits="trit", method="rtn", group_size=-1, per_tensor=True, activations=activations, rules=["gate_proj=4:g32"]
    )
    lowbit.quantize(model, recipe=recipe)
    lowbit.save(model, folder)
    return model


def formats(model):
    return {name.rpartition(".")[2]: matrix.format for name, _, matrix in packed_modules(model)}


@pytest.mark.parametrize("ternary, expected", [("auto", "int2"), ("int2", "int2"), ("trit", "trit")])
def test_loading_chooses_and_saving_writes_what_was_there(tmp_path, ternary, expected):
    model = saved(tmp_path / "a")
    loaded = lowbit.load(tmp_path / "a", ternary=ternary)
    assert formats(loaded) == {**dict.fromkeys(formats(model), expected), "gate_proj": "int4"}
    for name, _, matrix in packed_modules(model):
        assert torch.equal(loaded.get_submodule(name).packed.unpack(), matrix.unpack())
    ids = token_ids(2)
    assert (outputs(loaded, ids) - outputs(model, ids)).norm() < 2e-4 * outputs(model, ids).norm()
    lowbit.save(loaded, tmp_path / "b")
    lowbit.save(lowbit.load(tmp_path / "b", ternary=ternary), tmp_path / "c")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_rows_that_would_grow_stay_trits(tmp_path):
    saved(tmp_path, intermediate_size=320)
    assert formats(lowbit.load(tmp_path)) == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"), "int2"),
        "gate_proj": "int4",
        "down_proj": "trit",
    }


def test_activations_of_bitnet_keep_trits(tmp_path):
    model, ids = saved(tmp_path, activations="int8"), token_ids(2)
    loaded = lowbit.load(tmp_path)
    assert formats(loaded) == formats(model)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))


def test_mapped_weights_stay_where_they_are(tmp_path):
    model = saved(tmp_path)
    assert formats(lowbit.load(tmp_path, in_memory=False)) == formats(model)
    assert formats(lowbit.load(tmp_path, in_memory=False, ternary="int2"))["q_proj"] == "int2"


def test_a_shared_table_stays_shared(tmp_path):
    model = build("qwen3")
    recipe = lowbit.Recipe(bits=16, method="rtn", group_size=-1, per_tensor=True, head_bits="trit", embed_bits="trit")
    lowbit.quantize(model, recipe=recipe)
    lowbit.save(model, tmp_path / "a")
    loaded = lowbit.load(tmp_path / "a")
    assert loaded.lm_head.packed.format == "int2"
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    lowbit.save(loaded, tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_another_weight_is_saved_as_it_is(tmp_path):
    """What was stored is forgotten with the weight."""
    saved(tmp_path)
    module = lowbit.load(tmp_path).model.layers[0].mlp.up_proj
    assert (module.packed.format, module.stored_format) == ("int2", "trit")
    module.load(module.packed, replace=True)
    assert module.stored_format is None


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="ternary: expected one of auto, trit, int2, got 'int4'"):
        lowbit.load(tmp_path, ternary="int4")
