"""Finding and exchanging the matrices of models, by type and structure alone."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import lowbit
from lowbit.checkpoint.native import describe
from lowbit.models import find_blocks, find_targets, has_matrix, patch, replace_module, weight_matrix
from lowbit.vocabulary import resize_vocabulary

pytest.importorskip("transformers")
from tiny_models import ARCHITECTURES, build, outputs, relative_error, token_ids

BLOCKS = {
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "falcon": ["transformer.h.0", "transformer.h.1"],
    "opt": ["model.decoder.layers.0", "model.decoder.layers.1"],
    "gpt_neox": ["gpt_neox.layers.0", "gpt_neox.layers.1"],
    "bert": ["encoder.layer.0", "encoder.layer.1"],
    "bert_mlm": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "albert": ["encoder.albert_layer_groups.0"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
}
LINEARS_IN_A_BLOCK = {
    "phi": 6,
    "opt": 6,
    "gpt2": 4,
    "gpt_neox": 4,
    "falcon": 4,
    "bert": 6,
    "bert_mlm": 6,
    "albert": 6,
    "mixtral": 4,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_their_linear_layers(architecture):
    model = build(architecture)
    blocks = find_blocks(model)
    assert list(blocks) == BLOCKS.get(architecture, ["model.layers.0", "model.layers.1"])
    first = next(iter(blocks))
    inside = [t for t in find_targets(model) if t.kind == "linear" and t.name.startswith(f"{first}.")]
    assert len(inside) == LINEARS_IN_A_BLOCK.get(architecture, 6 if architecture == "t5" else 7)
    for target in find_targets(model):
        expected = [m for m in model.modules() if has_matrix(m) and m.weight is target.module.weight]
        assert len(target.names) >= len(expected) >= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kinds_of_the_tables_and_of_the_head(architecture):
    model = build(architecture)
    kinds = {name: kind for t in find_targets(model) for name, kind in zip(t.names, t.kinds, strict=True)}
    modules = dict(model.named_modules(remove_duplicate=False))
    assert all(kinds[n] == "embedding" for n, m in modules.items() if m is model.get_input_embeddings())
    head = model.get_output_embeddings()
    assert [n for n, k in kinds.items() if k == "head"] == [n for n, m in modules.items() if m is head]


def test_a_tied_table_is_one_target():
    tied = next(t for t in find_targets(build("qwen3")) if t.is_table)
    assert (tied.names, tied.kinds) == (("model.embed_tokens", "lm_head"), ("embedding", "head"))
    untied = [t.names for t in find_targets(build("llama")) if t.kind in ("embedding", "head")]
    assert untied == [("model.embed_tokens",), ("lm_head",)]


def test_every_matrix_patched_keeps_the_model():
    """8 bits change little: what a module did beside its product (scale, bias, transposition) is kept."""
    ids = token_ids(2)
    for architecture in ("gemma", "gpt2", "falcon", "bert_mlm", "opt"):
        model = build(architecture)
        reference = outputs(model, ids)
        for target in find_targets(model):
            if target.obstacle is None:
                packed = lowbit.PackedMatrix.from_float(weight_matrix(target.module).contiguous(), "int8", 32)
                patch(model, dict.fromkeys(target.names, packed))
        assert not any(has_matrix(m) for m in model.modules() if not type(m).__name__.startswith("OPT"))
        assert relative_error(outputs(model, ids), reference) < 0.05, architecture


def test_a_patched_tied_table_stays_one():
    model = build("qwen3")
    packed = lowbit.PackedMatrix.from_float(model.lm_head.weight.detach(), "int4", 32)
    patch(model, {"model.embed_tokens": packed, "lm_head": packed})
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() == packed.codes.data_ptr()
    assert torch.equal(model.model.embed_tokens(torch.tensor([3]))[0], packed.unpack(rows=slice(3, 4))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gemma", "gemma2"])
def test_a_scaled_embedding_keeps_its_scale(architecture, dtype):
    model = build(architecture, dtype)
    old, ids = model.get_input_embeddings(), torch.arange(8)
    packed = lowbit.PackedMatrix.from_float(old.weight.detach(), "int8", 16)
    patch(model, {"model.embed_tokens": packed})
    with torch.no_grad():
        old.weight.copy_(packed.unpack(dtype))
        assert torch.equal(model.get_input_embeddings()(ids), old(ids))


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


class DoubledBags(nn.EmbeddingBag):
    def forward(self, input, offsets=None, per_sample_weights=None):
        return 2 * super().forward(input, offsets, per_sample_weights)


class Wants(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


def test_only_what_behaves_like_its_base_class_is_replaced():
    model = nn.ModuleDict(
        {
            "shifted": Shifted(32, 32),
            "renamed": Renamed(32, 32),
            "wants": Wants(32, 32),
            "attention": nn.MultiheadAttention(32, 2),
            "bounded": nn.Embedding(32, 32, max_norm=1.0),
            "bounded_bags": nn.EmbeddingBag(32, 32, max_norm=1.0),
            "largest": nn.EmbeddingBag(32, 32, mode="max"),
            "doubled": DoubledBags(32, 32),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
            "meta": nn.Linear(32, 32, device="meta"),
        }
    )
    obstacles = {t.name: t.obstacle for t in find_targets(model)}
    assert obstacles.pop("renamed") is None
    assert "forward of its own" in obstacles["shifted"] and "forward of its own" in obstacles["wants"]
    assert "MultiheadAttention" in obstacles["attention.out_proj"]
    assert "max_norm" in obstacles["bounded"] and "max_norm" in obstacles["bounded_bags"]
    assert 'mode "max"' in obstacles["largest"] and "forward of its own" in obstacles["doubled"]
    assert "parametrized" in obstacles["parametrized"]
    assert "meta" in obstacles["meta"]


def test_what_a_model_keeps_in_float32_stays():
    obstacles = {t.name: t.obstacle for t in find_targets(build("t5"))}
    assert obstacles["encoder.block.0.layer.1.DenseReluDense.wo"] == "the model keeps it in float32"
    assert obstacles["encoder.block.0.layer.1.DenseReluDense.wi"] is None


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class TowerBlock(Block):
    pass


def test_the_list_with_most_weights_is_the_one_of_blocks():
    model = nn.Module()
    model.tower = nn.ModuleList([TowerBlock(16) for _ in range(3)])
    model.heads = nn.ModuleList([nn.Linear(64, 64) for _ in range(9)])
    model.inner = nn.Module()
    model.inner.layers = nn.Sequential(*[Block(64) for _ in range(2)])
    assert list(find_blocks(model)) == ["inner.layers.0", "inner.layers.1"]
    kinds = {t.name: t.kind for t in find_targets(model)}
    assert kinds["inner.layers.0.up"] == "linear"
    assert kinds["tower.0.up"] == kinds["heads.0"] == "other"


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 50))
    assert find_blocks(model) == {}
    assert [t.kind for t in find_targets(model)] == ["embedding", "linear", "linear", "head"]


def test_bags_are_tables():
    bags = nn.EmbeddingBag(50, 32, mode="sum", padding_idx=-2, include_last_offset=True, dtype=torch.bfloat16).eval()
    model = nn.Sequential(bags, nn.Linear(32, 64), nn.Linear(64, 3))
    table, *_ = find_targets(model)
    assert table.kind == "embedding" and table.is_table and table.shape == (50, 32) and table.obstacle is None
    patch(model, {"0": lowbit.PackedMatrix.from_float(bags.weight.detach(), "int8", 32)})
    [(name, entry)] = describe(model)[0]["modules"].items()
    assert (name, entry["kind"]) == ("0", "embedding")
    ids, edges = torch.arange(44, 50), torch.tensor([0, 1, 6])
    with torch.no_grad():
        bags.weight.copy_(model[0].packed.unpack(torch.bfloat16))
        assert torch.allclose(model[0](ids, edges), bags(ids, edges), atol=0.02, rtol=0.02)
    assert not model[0].training and model[0].dtype == torch.bfloat16


def test_one_module_under_two_names_stays_one():
    model = nn.Module()
    model.a = model.b = nn.Linear(32, 32)
    [target] = find_targets(model)
    assert target.names == ("a", "b")
    packed = lowbit.PackedMatrix.from_float(model.a.weight.detach(), "int4", 32)
    patch(model, dict.fromkeys(target.names, packed))
    assert model.a is model.b and model.a.packed.equal(packed)


def test_patch_keeps_bias_and_mode_and_refuses_what_does_not_fit():
    model = nn.ModuleDict({"a": nn.Linear(32, 48), "norm": nn.LayerNorm(32)}).eval()
    bias = model["a"].bias
    packed = lowbit.PackedMatrix.from_float(model["a"].weight.detach(), "int4", 32)
    with pytest.raises(ValueError, match=r"norm: expected a linear layer"):
        patch(model, {"a": packed, "norm": packed})
    assert isinstance(model["a"], nn.Linear)  # nothing is replaced unless everything can be
    with pytest.raises(ValueError, match=r"a: expected a packed matrix of shape \(48, 32\)"):
        patch(model, {"a": lowbit.PackedMatrix.from_float(torch.ones(32, 32), "int4")})
    with pytest.raises(AttributeError):
        patch(model, {"b": packed})
    patch(model, {"a": packed}, activations="int8")
    assert model["a"].bias is bias and not model["a"].training and model["a"].activations == "int8"
    with pytest.raises(AttributeError):
        replace_module(model, "b", nn.Identity())


def packed_model(architecture, format="int4"):
    model = build(architecture)
    for target in find_targets(model):
        if target.obstacle is None:
            packed = lowbit.PackedMatrix.from_float(weight_matrix(target.module).contiguous(), format, -1)
            patch(model, dict.fromkeys(target.names, packed))
    return model


def assert_vocabulary(model, size):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.num_embeddings == embedding.weight.shape[0] == head.weight.shape[0] == head.out_features == size
    assert model.config.vocab_size == model.config.get_text_config().vocab_size == size
    assert head.bias is None or len(head.bias) == size


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "t5", "bert_mlm", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_resized_vocabulary_keeps_the_outputs_of_what_stays(architecture, packed):
    model = packed_model(architecture) if packed else build(architecture)
    ids = token_ids(2) % 120
    before, rows = outputs(model, ids), model.get_input_embeddings().weight.shape[0]
    shared = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    for size in (rows + 11, rows, 120):
        resize_vocabulary(model, size)
        assert_vocabulary(model, size)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (table.data_ptr() == head.data_ptr()) == shared
        after, kept = outputs(model, ids), min(size, rows)
        # A dense product of another width may be summed in another order.
        assert torch.allclose(after[..., :kept], before[..., :kept], atol=0 if packed else 1e-5)
    assert model.get_input_embeddings().padding_idx in (None, 0, 1, 2)


def test_rows_and_biases_of_a_resized_vocabulary():
    model = packed_model("phi", "int8")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        head.bias.copy_(torch.arange(160))
    old, generator = embedding.packed, torch.Generator().manual_seed(1)
    rows, head_rows = (torch.randn(2, 64, generator=generator) for _ in range(2))
    with pytest.raises(ValueError, match=r"new_head_rows: expected floats \[2, 64\], got torch.float32 \[1, 64\]"):
        resize_vocabulary(model, 162, rows, new_head_rows=head_rows[:1])
    assert embedding.packed is old and model.config.vocab_size == 160  # nothing is changed unless everything can be
    resize_vocabulary(model, 162, rows, new_head_rows=head_rows)
    assert relative_error(embedding(torch.tensor([160, 161])), rows) < 0.01
    assert relative_error(head.packed.unpack(rows=slice(160, 162)), head_rows) < 0.01
    assert torch.equal(embedding.packed.codes[:160], old.codes) and head.bias[159:].tolist() == [159, 79.5, 79.5]
    resize_vocabulary(model, 163)
    expected = embedding.packed.resized(162).unpack().mean(0)
    assert relative_error(embedding(torch.tensor([162]))[0], expected) < 0.01


def test_a_vocabulary_half_packed_and_one_of_trits():
    model = build("llama")
    head = lowbit.PackedMatrix.from_float(model.lm_head.weight.detach(), "trit", 32)
    patch(model, {"lm_head": head.repack("int2")})
    model.lm_head.stored_format = "trit"
    resize_vocabulary(model, 165)
    assert isinstance(model.model.embed_tokens, nn.Embedding) and len(model.model.embed_tokens.weight) == 165
    assert model.lm_head.stored_format == "trit" and model.lm_head.packed.format == "int2"
    assert model.lm_head.packed.repack("trit").resized(160).equal(head)
    assert_vocabulary(model, 165)


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = packed_model("qwen3")
    resize_vocabulary(model, 171)
    lowbit.save(model, tmp_path)
    again = lowbit.load(tmp_path)
    assert_vocabulary(again, 171)
    assert torch.equal(outputs(again, token_ids(2)), outputs(model, token_ids(2)))
    assert again.model.embed_tokens.weight.data_ptr() == again.lm_head.weight.data_ptr()
    again.resize_token_embeddings(180)  # a loaded model resizes itself the same way
    assert_vocabulary(again, 180)


def test_transformers_resizes_packed_models_through_ours():
    model = packed_model("llama")
    clone, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each, arguments, size in (
        (clone, {"new_num_tokens": 170}, 170),
        (pickled, {"new_num_tokens": 161, "pad_to_multiple_of": 64}, 192),
        (model, {"pad_to_multiple_of": 3}, 162),
    ):
        assert each.resize_token_embeddings(**arguments) is each.get_input_embeddings()
        assert_vocabulary(each, size)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(NotImplementedError, match="resize_vocabulary"):
        model.resize_token_embeddings(180, mean_resizing=False)
    assert_vocabulary(model, 162)
    plain = build("llama")
    patch(plain, {"model.layers.0.mlp.up_proj": lowbit.PackedMatrix.from_float(torch.ones(96, 64), "int4")})
    plain.resize_token_embeddings(170, mean_resizing=False)  # Transformers' own
    assert_vocabulary(plain, 170)
    gone = weakref.ref(plain)
    del plain, each
    assert gone() is None  # as any model: nothing but its caller holds it


def test_a_vocabulary_of_modules_without_accessors():
    packed = lowbit.PackedMatrix.from_float(torch.randn(50, 32), "int4", 32)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50))
    patch(model, {"0": packed, "2": packed})
    resize_vocabulary(model, 60)
    assert model[0].weight is model[2].weight and model(torch.tensor([59])).shape == (1, 60)
    with pytest.raises(ValueError, match="new_head_rows: expected None, since the head is tied"):
        resize_vocabulary(model, 61, new_head_rows=torch.ones(1, 32))
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        resize_vocabulary(model, 0)
    with pytest.raises(ValueError, match=r"new_rows: expected floats \[0, 32\]"):
        resize_vocabulary(model, 40, torch.ones(1, 32))
    with pytest.raises(ValueError, match="Linear: expected a model with a token embedding, found none"):
        resize_vocabulary(nn.Linear(3, 3), 4)
    model[0].unload()
    with pytest.raises(RuntimeError, match="token embedding: expected a weight"):
        resize_vocabulary(model, 40)
