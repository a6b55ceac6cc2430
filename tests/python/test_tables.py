"""The embedding and the head: one table, how it is quantized by default, and the head's table as the embedding."""

import copy

import pytest
import torch
import transformers
from checkpoint_models import llama, logits
from test_quantize import TINY_LLAMA, text_of

import lowbit
from lowbit import Recipe
from lowbit.evaluate import encode, evaluate
from lowbit.quantize.plan import make_plan


def ids(count=512, vocabulary=256):
    return torch.randint(0, vocabulary, (count // 32, 32), generator=torch.Generator().manual_seed(3))


def one_table(model):
    head, embedding = model.lm_head, model.model.embed_tokens
    own = [(getattr(head, name), getattr(embedding, name)) for name in ("weight", "weight_scale", "weight_zero")]
    return all((a is None and b is None) or a.data_ptr() == b.data_ptr() for a, b in own)


@pytest.mark.parametrize(
    ("change", "tie", "expected"),
    [
        ({}, True, {"embedding": "int8"}),
        ({}, False, {}),
        ({"bits": 16}, True, {}),
        ({"bits": 3, "embed_bits": 4}, True, {"embedding": "int4"}),
        ({"bits": 3, "head_bits": 2}, True, {"embedding": "int2"}),
        ({"head_bits": 16}, True, {}),
        ({"embed_bits": 4}, False, {"embedding": "int4"}),
        ({"head_bits": 8, "embed_bits": 3}, False, {"embedding": "int3", "head": "int8"}),
        ({"bits": "trit", "method": "exact"}, True, {}),
        ({"bits": "trit"}, True, {"embedding": "int8"}),
    ],
)
def test_widths_that_are_left_open(change, tie, expected):
    plan = make_plan(llama(tie), Recipe(**{"group_size": 32, **change}))
    assert {m.kind: m.spec.format for m in plan.quantized if m.kind != "linear"} == expected


def test_a_tied_table_is_solved_for_its_head_and_held_near_its_rows():
    model = llama()
    specs = {m.kind: m.spec for m in make_plan(model, Recipe(group_size=32)).quantized}
    assert (specs["embedding"].method, specs["embedding"].damp, specs["embedding"].correction) == ("gptq", 0.3, "none")
    assert specs["linear"].damp == 0.01
    rule = make_plan(model, Recipe(rules={"model.embed_tokens": {"damp": 0.05}})).quantized[0].spec
    assert (rule.bits, rule.damp) == (8, 0.05)
    assert make_plan(llama(tie=False), Recipe(embed_bits=4)).quantized[0].spec.method == "rtn"
    report = lowbit.quantize(model, ids(), Recipe(bits=4, group_size=32, embed_bits=3))
    row = next(row for row in report.modules if row["kind"] == "embedding")
    assert (row["method"], row["damp"], row["tokens"], row["error_of"]) == ("gptq", 0.3, 512, "output")
    assert row["kl_divergence"] > 0 and one_table(model)
    assert all(row["kl_divergence"] is None for row in report.modules if row["kind"] == "linear")


def test_the_divergence_shown_is_that_of_the_table_alone():
    model, reference = llama(), llama()
    report = lowbit.quantize(model, ids(), Recipe(bits=2, group_size=32, embed_bits=4))
    row = next(row for row in report.modules if row["kind"] == "embedding")
    lowbit.models.patch(reference, dict.fromkeys(row["names"], model.lm_head.packed))
    alone = evaluate(reference, ids().flatten(), reference=llama(), context=32)
    assert row["kl_divergence"] == pytest.approx(alone.kl_divergence, rel=1e-4)


@pytest.mark.parametrize(("bits", "bound"), [(8, 1.001), (4, 1.01)])
def test_the_table_of_a_trained_model(bits, bound):
    """8 bits cost it 0.1% of perplexity at most, 4 bits 1% (with everything else in 16 bits)."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    text = encode(tokenizer, text_of("heapq.py", "sched.py"))[:8192]
    found = {}
    for method in ("gptq", "rtn"):
        model = copy.deepcopy(reference)
        recipe = Recipe(bits=16, embed_bits=bits, method=method)
        report = lowbit.quantize(model, text_of("argparse.py"), recipe, tokenizer=tokenizer, context=256)
        assert [row["names"] for row in report.modules] == [["model.embed_tokens", "lm_head"]] and one_table(model)
        found[method] = evaluate(model, text, reference=reference, context=256)
    assert found["gptq"].perplexity <= bound * found["gptq"].reference_perplexity
    assert found["gptq"].kl_divergence < found["rtn"].kl_divergence  # why it is the default


def test_one_table_through_everything(tmp_path):
    model = llama()
    lowbit.quantize(model, ids(), Recipe(bits=4, group_size=32, embed_bits=4, symmetric=False))
    expected = logits(model)
    for same in (model, copy.deepcopy(model), model.to(torch.float32), copy.deepcopy(model).bfloat16()):
        assert one_table(same)
        same.tie_weights()  # of Transformers
        assert one_table(same) and same.model.embed_tokens.packed.equal(model.lm_head.packed)
    lowbit.save(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        for loaded in (lowbit.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)):
            assert one_table(loaded) and torch.equal(logits(loaded), expected)
            assert loaded.config.tie_word_embeddings
            loaded.tie_weights()
            assert one_table(loaded) and torch.equal(logits(loaded), expected)


def test_embedding_from_the_head():
    model = llama(tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a random model's predictions hardly differ without
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"embed_tokens: KL divergence with the table of lm_head: expected at most 0\.1"
    ):
        lowbit.quantize(model, ids(), Recipe(embed_from_head=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.config.tie_word_embeddings

    forced = copy.deepcopy(model)
    report = lowbit.quantize(forced, ids(), Recipe(group_size=32, embed_from_head=True, embed_bound=float("inf")))
    assert report.embed_from_head > 0.1 and one_table(forced) and forced.config.tie_word_embeddings
    assert [row["names"] for row in report.modules if row["kind"] == "embedding"] == [["model.embed_tokens", "lm_head"]]

    with torch.no_grad():  # a tied model that somebody saved with both tables
        model.model.embed_tokens.weight.copy_(model.lm_head.weight)
    expected = logits(model)
    report = lowbit.quantize(model, ids(), Recipe(bits=16, embed_from_head=True))
    assert report.embed_from_head == 0 and report.modules == []
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(logits(model), expected)
    assert lowbit.quantize(llama(), ids(), Recipe(group_size=32, embed_from_head=True)).embed_from_head == 0
    with pytest.raises(ValueError, match="calibration: expected data, got None"):
        lowbit.quantize(llama(tie=False), recipe=Recipe(method="rtn", embed_from_head=True))


def test_bad_recipes():
    with pytest.raises(ValueError, match="embed_bound: expected a KL divergence of at least 0, got -1"):
        Recipe(embed_bound=-1)
    with pytest.raises(TypeError, match="embed_from_head: expected True or False, got 'yes'"):
        Recipe(embed_from_head="yes")
    with pytest.raises(ValueError, match=r"tied_damp: expected a share in \(0, 1\], got 0"):
        Recipe(tied_damp=0)


@pytest.mark.parametrize("folder", ["plain", "packed"])
def test_two_tables_that_should_be_one(tmp_path, folder):
    """A tied configuration whose files hold two tables that differ: one of them would be lost in silence."""
    model = llama()
    if folder == "plain":
        model.save_pretrained(tmp_path)
    else:
        lowbit.quantize(model, ids(), Recipe(group_size=32, head_bits=16))
        lowbit.save(model, tmp_path)
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert torch.equal(logits(lowbit.load(tmp_path)), logits(model))  # twice the same is no contradiction
    tensors["lm_head.weight"][3, 4] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight: expected one table"):
        lowbit.load(tmp_path)
