"""Adapters of PEFT over packed weights: what PEFT does with the float model of the same values is what they do here."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_models import act_order, build, digests, gemma3, llama, logits, pack
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import models
from lowbit import nn as lowbit_nn

peft = pytest.importorskip("peft")

from lowbit.integrations.peft import LoraEmbedding, LoraLinear, ReplacedModule, requantizing  # noqa: E402

# What PEFT says about every adapter of a tied embedding, and that it adds the embedding to the file.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie.*:UserWarning",
    "ignore:.*save_embedding_layers.*:UserWarning",
    "ignore:.*lora_bias.*:UserWarning",
    "ignore:.*invalid shape.*:UserWarning",
    "ignore::FutureWarning",
)

TINY = Path(__file__).parents[1] / "data" / "tiny-llama-code"


def packed_llama(**options):
    return pack(llama(**options), table="int8")


def qwen2(tie=True):
    return build(
        transformers.Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=257,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
        )
    )


def gpt2():
    return build(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, n_positions=64))


def unpacked(model):
    """The plain float model of the same values."""
    plain = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point() and "weight_scale" not in k}
    for name, module in model.named_modules():
        if isinstance(module, lowbit_nn.PackedModule) and module.layout is not None:
            weight = module.packed.unpack(model.dtype)
            state[f"{name}.weight"] = weight.t() if models.is_conv1d(plain.get_submodule(name)) else weight
    plain.load_state_dict(state, strict=False)
    return plain


def lora(targets="all-linear", **options):
    return peft.LoraConfig(r=options.pop("r", 4), target_modules=targets, **options)


def adapted(model, config=None, seed=1, **options):
    """The model with an adapter whose every tensor is away from its beginning."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config or lora(), **options)
    return disturbed(model, seed=seed)


def disturbed(model, adapter="default", seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def tables(model):
    """Every byte of every packed tensor, by name."""
    return {
        f"{name}.{part}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, lowbit_nn.PackedModule) and module.layout is not None
        for part, tensor in module.packed.tensors.items()
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_close(first, second, factor=1.0):
    assert (first - second).abs().max() < factor * 2e-3 * second.abs().max()


# ---- LoRA ----

EVERYTHING = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
ADAPTERS = {
    "all linear layers": (packed_llama, lambda: lora()),
    "names, rank-stabilised": (packed_llama, lambda: lora(["q_proj", "v_proj"], use_rslora=True, r=8)),
    "ranks by name": (packed_llama, lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})),
    "embedding and head": (packed_llama, lambda: lora(EVERYTHING)),
    "tied adapters": (packed_llama, lambda: lora(EVERYTHING, ensure_weight_tying=True)),
    "activated by tokens": (packed_llama, lambda: lora(alora_invocation_tokens=[14, 21], task_type="CAUSAL_LM")),
    "a bias of its own": (lambda: pack(qwen2(), table="int4"), lambda: lora(["q_proj"], lora_bias=True)),
    "biases of the model": (lambda: pack(qwen2(), table="int4"), lambda: lora(bias="all")),
    "Conv1D": (lambda: pack(gpt2()), lambda: lora(["c_attn", "wte"], fan_in_fan_out=True)),
    "asymmetric int3": (lambda: pack(llama(), "int3", 16, symmetric=False), lambda: lora()),
    "replaced layers": (
        packed_llama,
        lambda: lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head", "layers.0.mlp.down_proj"]),
    ),
    "replaced layers, tied": (
        packed_llama,
        lambda: lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    ),
}


def carried_tables(keys):
    return {key for key in keys if key.endswith("base_layer.weight")}


@pytest.mark.parametrize("name", ADAPTERS)
def test_files_go_both_ways_between_packed_and_float_models(name, tmp_path):
    base, config = ADAPTERS[name]
    ours = adapted(base(), config())
    assert isinstance(next(m for m in ours.modules() if isinstance(m, LoraLinear | LoraEmbedding)), torch.nn.Module)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(unpacked(base()), tmp_path / "ours")
    assert not any(type(m).__module__.startswith("lowbit") for m in theirs.modules())
    assert_close(logits(theirs), logits(ours))
    assert (logits(ours) - logits(base())).abs().max() > 0.004

    trained = adapted(unpacked(base()), config(), seed=2)
    trained.save_pretrained(tmp_path / "theirs")
    mine, stock = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert mine.keys() == stock.keys() - carried_tables(stock)
    assert all(mine[key].dtype == stock[key].dtype and mine[key].shape == stock[key].shape for key in mine)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert_close(logits(again), logits(trained))
    lazily = peft.PeftModel.from_pretrained(base(), tmp_path / "theirs", low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(lazily), logits(again))  # a tied adapter has other strides


def test_scaled_embedding_scales_its_adapter_too():
    model = pack(gemma3(), table="int8")
    ours = adapted(model, lora(["embed_tokens", "q_proj"]))
    layer = ours.get_input_embeddings()
    assert isinstance(layer, LoraEmbedding) and layer.base_layer.embed_scale == 8
    ids = torch.tensor([[3, 200, 7]])
    scale = torch.tensor(8.0, dtype=torch.bfloat16)
    rows = layer.base_layer.packed.gather(ids, torch.bfloat16) * scale
    added = layer.get_delta_weight("default")[ids] * scale
    expected = (rows + added).to(torch.bfloat16)
    result = layer(ids)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_float_model(dtype):
    config = lora([*EVERYTHING, "gate_proj"])
    ours = adapted(packed_llama(dtype=dtype), copy.deepcopy(config))
    theirs = adapted(unpacked(packed_llama(dtype=dtype)), config)
    ids = torch.arange(24).view(2, 12) * 5 % 256
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32  # as PEFT casts its own
            gradient = expected[name].grad
            tolerance = 0.002 if dtype == torch.float32 else 0.1
            assert (parameter.grad - gradient).norm() <= tolerance * gradient.norm(), name
            compared += 1
    assert compared == 2 * (2 + 2 * 3)


def test_training_with_checkpointing_and_kbit_preparation():
    model = packed_llama(dtype=torch.bfloat16)
    before, dtypes = tables(model), {k: v.dtype for k, v in tables(model).items()}
    model = peft.prepare_model_for_kbit_training(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, lora(["q_proj", "up_proj"], lora_dropout=0.1)).train()
    ids = torch.arange(24).view(2, 12)
    model(ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}
    assert len(gradients) == 4 and all(g.abs().max() > 0 for g in gradients.values())
    after = tables(model.unload())
    assert_same(before, after)
    assert {k: v.dtype for k, v in after.items()} == dtypes


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = adapted(packed_llama(), lora(["q_proj", "embed_tokens"])).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(24).view(2, 12)
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_same(*gradients)


def test_all_linear_finds_what_it_finds_in_the_float_model():
    ours, theirs = (peft.get_peft_model(m, lora()) for m in (packed_llama(), unpacked(packed_llama())))
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    assert sum(isinstance(m, LoraLinear) for m in ours.modules()) == 14
    ours.add_adapter("second", lora())
    assert ours.peft_config["second"].target_modules == theirs.peft_config["default"].target_modules


def test_float_weights_in_our_modules(tmp_path):
    """lowbit.load makes head and embedding modules of lowbit.nn, which may hold floats."""
    source = pack(llama(tie=False))
    lowbit.save(source, tmp_path / "base")
    model = lowbit.load(tmp_path / "base")
    assert isinstance(model.lm_head, lowbit_nn.Linear) and model.lm_head.layout is None
    model = adapted(model, lora(["lm_head", "embed_tokens", "q_proj"]))
    assert isinstance(model.lm_head, LoraLinear)
    before = logits(model)
    head = model.lm_head
    head.merge(safe_merge=True)
    assert_close(logits(model), before)
    head.unmerge()
    assert_close(logits(model), before)
    dora = adapted(lowbit.load(tmp_path / "base"), lora(["lm_head"], use_dora=True))
    assert_close(logits(dora), logits(adapted(unpacked(source), lora(["lm_head"], use_dora=True))))


def test_parameters_are_counted_with_the_packed_ones(capsys):
    model = peft.get_peft_model(packed_llama(), lora())
    plain = peft.get_peft_model(unpacked(packed_llama()), lora())
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    model.print_trainable_parameters()
    assert f"{plain.get_nb_trainable_parameters()[0]:,d}" in capsys.readouterr().out


def test_importing_twice_puts_nothing_in_front_twice():
    code = """
import importlib, peft, lowbit.integrations.peft as ours
stock = peft.PeftModel.load_adapter.lowbit_stock
importlib.reload(ours)
assert peft.PeftModel.load_adapter.lowbit_stock is stock
assert not hasattr(stock, "lowbit_stock") and stock.__module__ == "peft.peft_model"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
    ],
)
def test_what_needs_a_float_weight_is_refused_before_anything_changes(options):
    model = packed_llama()
    before, expected = logits(model), [type(m) for m in model.modules()]
    option = next(iter(options))
    with pytest.raises(NotImplementedError, match=rf"model\.(embed_tokens|layers\.0\S+): {option}: expected"):
        peft.get_peft_model(model, lora(["norm_free", "q_proj"], **options))
    assert [type(m) for m in model.modules()] == expected
    assert torch.equal(logits(model), before)

    adapter = adapted(model)
    with pytest.raises(NotImplementedError, match=option):
        adapter.add_adapter("second", lora(["q_proj"], **options))
    assert list(adapter.peft_config) == ["default"]


def test_other_methods_than_lora_are_refused():
    with pytest.raises(NotImplementedError, match=r"model.layers.0.self_attn.k_proj: expected LoRA .* got LOHA"):
        peft.get_peft_model(packed_llama(), peft.LoHaConfig(r=4, target_modules=["k_proj"]))


def test_an_empty_module_takes_no_adapter():
    model = packed_llama()
    model.lm_head.unload()
    with pytest.raises(ValueError, match="lm_head: weight: expected one to be loaded"):
        peft.get_peft_model(model, lora(["lm_head"]))


# ---- the base below ----


def test_the_base_below_an_adapter_can_be_swapped():
    model = adapted(packed_llama(), lora(["lm_head", "q_proj"], modules_to_save=["embed_tokens"]))
    before = logits(model)
    held = model.lm_head.unload()
    assert isinstance(held, lowbit.PackedMatrix) and not model.lm_head.is_loaded
    with pytest.raises(RuntimeError, match="lm_head: weight: expected one to be loaded"):
        logits(model)
    model.lm_head.load(held.unpack())
    assert model.lm_head.packed is None
    assert_close(logits(model), before)
    with pytest.raises(RuntimeError, match="lm_head: weight: expected none while another is loaded"):
        model.lm_head.load(held)
    model.lm_head.load(held, replace=True)
    assert torch.equal(logits(model), before)
    wrapper = model.get_input_embeddings()
    assert wrapper.unload().equal(held) and wrapper.original_module.weight is None
    assert torch.equal(logits(model), before)  # the copy of the adapter is what is used
    wrapper.load(held)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed_llama()))


def test_unload_gives_the_base_back(tmp_path):
    base = packed_llama()
    lowbit.save(base, tmp_path / "base")
    model = lowbit.load(tmp_path / "base")
    model = adapted(model, lora(EVERYTHING[2:], modules_to_save=["lm_head", "embed_tokens"]))
    with pytest.raises(ValueError, match="expected a model without adapters, got PeftModel"):
        lowbit.save(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert model.get_base_model() is model.base_model.model
    model = model.unload()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    lowbit.save(model, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "base")


# ---- whole replaced layers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_modules_are_float_and_leave_the_packed_ones(dtype):
    model = packed_llama(dtype=dtype)
    before, expected = tables(model), logits(model)
    table = model.lm_head.packed
    model = peft.get_peft_model(model, lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens", "0.mlp.down_proj"]))
    assert isinstance(model.lm_head, ReplacedModule)
    for wrapper in (m for m in model.modules() if isinstance(m, ReplacedModule)):
        weight = wrapper.modules_to_save["default"].weight
        assert weight.dtype == dtype and weight.requires_grad and weight.is_leaf
        assert torch.equal(weight, wrapper.original_module.packed.unpack(dtype))
    assert_close(logits(model).float(), expected.float(), 1 if dtype == torch.float32 else 30)
    ids = torch.arange(24).view(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, table.unpack(dtype))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert model.lm_head.original_module.weight.data_ptr() == table.codes.data_ptr()
    base = model.unload()
    assert base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr() == table.codes.data_ptr()
    assert_same(tables(base), before)
    assert torch.equal(logits(base), expected)


def test_merging_puts_the_replaced_layer_in(tmp_path):
    model = adapted(packed_llama(), lora("lm_head", modules_to_save=["embed_tokens", "0.mlp.down_proj"]))
    table = model.lm_head.packed
    trained = model.get_input_embeddings().modules_to_save["default"].weight.detach().clone()
    with requantizing(untie=True):
        merged = model.merge_and_unload()
    assert merged.model.embed_tokens.layout is None and torch.equal(merged.model.embed_tokens.weight, trained)
    assert merged.model.layers[0].mlp.down_proj.layout is None
    assert merged.lm_head.layout == table.layout and not merged.lm_head.packed.equal(table)
    assert merged.config.tie_word_embeddings is False
    lowbit.save(merged, tmp_path / "merged")
    assert torch.equal(logits(lowbit.load(tmp_path / "merged")), logits(merged))


def test_several_adapters_with_heads_of_their_own(tmp_path):
    model = packed_llama()
    base = logits(model)
    config = lora(["q_proj"], modules_to_save=["lm_head"])
    model = adapted(model, config)
    model.add_adapter("second", lora(["v_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    model.add_adapter("third", lora(["v_proj"]))
    for seed, name in enumerate(("second", "third"), 5):
        disturbed(model, name, seed)
    results = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        results[name] = logits(model)
        assert [p.requires_grad for n, p in model.named_parameters() if f".{name}" in n] != []
        assert all(p.requires_grad == (f".{name}" in n) for n, p in model.named_parameters())
    for name in results:
        model.set_adapter(name)
        assert torch.equal(logits(model), results[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert all((results[a] - results[b]).abs().max() > 0.01 for a, b in (("default", "second"), ("second", "third")))

    model.set_adapter("default")
    ids = (torch.arange(11)[None] * 7 % 256).expand(4, -1)
    names = ["second", "__base__", "default", "third"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        torch.testing.assert_close(row, (base if name == "__base__" else results[name])[0], rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed_llama(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    for name in ("second", "default"):
        again.set_adapter(name)
        assert torch.equal(logits(again), results[name])
    again.delete_adapter("second")
    assert list(again.peft_config) == ["default"] and list(again.lm_head.modules_to_save) == ["default"]
    assert torch.equal(logits(again), results["default"])
    assert torch.equal(logits(again.unload()), base)


# ---- merging ----


def test_merging_is_refused_until_asked_for():
    model = adapted(packed_llama())
    before, packed = logits(model), tables(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        message = r"model\.layers\.0\.self_attn\.q_proj: merging: expected a float weight, got int4: .*requantizing"
        with pytest.raises(ValueError, match=message):
            merge()
    assert_same(tables(model), packed)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_requantizing_keeps_everything_but_values(format, symmetric):
    options = {"symmetric": symmetric, "scale_dtype": torch.bfloat16}
    model = adapted(pack(qwen2(), format, 16, **options), lora(["q_proj", "up_proj"], lora_bias=False))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    before, packed = logits(model), layer.packed
    everything = tables(model)
    target = packed.unpack() + layer.get_delta_weight("default").detach()
    with requantizing():
        model.merge_adapter()
    merged = layer.packed
    assert merged.layout == packed.layout and merged.scales.dtype == torch.bfloat16
    assert (merged.zeros is None) == symmetric
    expected = lowbit.PackedMatrix.from_float(target, format, 16, **options)
    assert merged.equal(expected)
    assert not merged.equal(packed)
    assert_close(logits(model), before, 400 if format == "int4" else 30)
    with pytest.raises(RuntimeError, match="up_proj: weight: expected one without adapters, got one with default"):
        layer.unload()
    model.unmerge_adapter()
    assert layer.packed is not None and layer.packed.codes is packed.codes
    assert_same(tables(model), everything)
    assert torch.equal(logits(model), before)


def test_requantizing_honours_a_permutation():
    model = pack(llama())
    packed = act_order(64, 64, "int4", 16, symmetric=False)
    model.model.layers[0].self_attn.q_proj.load(packed, replace=True)
    model = adapted(model, lora(["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    target = packed.unpack() + layer.get_delta_weight("default").detach()
    with requantizing(clip=True):
        merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.packed
    assert torch.equal(merged.perm, packed.perm) and merged.layout == packed.layout
    expected = lowbit.PackedMatrix.from_float(target[:, packed.perm.long()], "int4", 16, symmetric=False, clip=True)
    assert torch.equal(merged.codes, expected.codes) and torch.equal(merged.scales, expected.scales)
    steps = merged.scales.float().repeat_interleave(16, 1)
    original_order = torch.empty_like(steps)
    original_order[:, packed.perm.long()] = steps
    assert (merged.unpack() - target).abs().sub(2 * original_order).max() <= 0


def test_adapters_are_merged_one_after_another_without_rounding_twice():
    model = adapted(packed_llama(), lora(["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True))
    model.add_adapter("second", lora(["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True))
    disturbed(model, "second", 7)
    table = model.get_input_embeddings()
    with torch.no_grad():  # PEFT 0.21 ties the first adapter only
        model.lm_head.lora_A["second"].weight.copy_(table.lora_embedding_B["second"].t())
        model.lm_head.lora_B["second"].weight.copy_(table.lora_embedding_A["second"].t())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    packed, before, base = layer.packed, logits(model), tables(model)
    both = packed.unpack() + layer.delta(["default", "second"]).detach()
    with requantizing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"])
        model.merge_adapter(["second"])
    assert layer.packed.equal(lowbit.PackedMatrix.from_float(both, "int4", 32))
    both = table.unmerged().unpack() + table.delta(["default", "second"]).detach()
    assert table.packed.equal(lowbit.PackedMatrix.from_float(both, "int8"))
    assert model.lm_head.packed.codes.data_ptr() == table.packed.codes.data_ptr()
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert_same(tables(model), base)
    assert model.lm_head.packed.codes.data_ptr() == table.packed.codes.data_ptr()
    assert torch.equal(logits(model), before)


def test_disabling_takes_a_merged_adapter_out():
    base = logits(packed_llama())
    model = adapted(packed_llama())
    with requantizing():
        model.merge_adapter()
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_merging_a_shared_table(tmp_path):
    for targets in (["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]):
        model = adapted(packed_llama(), lora(targets))
        before, packed = logits(model), tables(model)
        with requantizing(), pytest.raises(ValueError, match=r"model\.embed_tokens and lm_head: merging: .*untie=True"):
            model.merge_and_unload()
        assert_same(tables(model), packed)
        with requantizing(untie=True):
            merged = model.merge_and_unload()
        assert merged.lm_head.weight.data_ptr() != merged.model.embed_tokens.weight.data_ptr()
        assert_close(logits(merged), before, 20)
        lowbit.save(merged, tmp_path / "untied")
        assert torch.equal(logits(lowbit.load(tmp_path / "untied")), logits(merged))

    model = adapted(packed_llama(), lora(["embed_tokens", "lm_head"], ensure_weight_tying=True))
    before = logits(model)
    with requantizing():
        merged = model.merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert merged.config.tie_word_embeddings
    assert_close(logits(merged), before, 20)
    lowbit.save(merged, tmp_path / "tied")
    assert torch.equal(logits(lowbit.load(tmp_path / "tied")), logits(merged))


def test_merging_a_bias():
    model = adapted(pack(qwen2()), lora(["q_proj"], lora_bias=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    bias, before = layer.base_layer.bias.clone(), logits(model)
    with requantizing():
        model.merge_adapter()
    added = layer.lora_B["default"].bias * layer.scaling["default"]
    torch.testing.assert_close(layer.base_layer.bias, bias + added)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias) and torch.equal(logits(model), before)

    model = adapted(packed_llama(), lora(["q_proj"], lora_bias=True))
    with requantizing(), pytest.raises(ValueError, match="q_proj: merging: expected a bias for lora_bias=True"):
        model.merge_adapter()


@pytest.mark.parametrize("held", ["trit", "int2"])
def test_ternary_weights_take_no_adapter_up(held):
    model = pack(llama(), "trit", -1)
    for module in model.modules():
        if isinstance(module, lowbit_nn.Linear) and module.layout is not None and held == "int2":
            module.load(module.packed.repack("int2"), replace=True)
            module.stored_format = "trit"
    model = adapted(model)
    before = logits(model)
    with requantizing(), pytest.raises(ValueError, match=r"q_proj: merging: .*got a ternary one: load\(packed.unpack"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
    for module in model.modules():
        if isinstance(module, LoraLinear):  # as the message says
            module.load(module.packed.unpack(), replace=True)
    merged = model.merge_and_unload()
    assert_close(logits(merged), before)


def test_broken_adapters_are_not_merged():
    model = adapted(packed_llama(), lora(["up_proj"]))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 2] = torch.nan
    with requantizing(), pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: merging: weight\[3, 0\]: .*finite"):
        model.merge_adapter()


# ---- files that do not fit ----


def narrower(**changes):
    config = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, **changes}
    return build(
        transformers.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **config
        )
    )


UNFIT = {
    "other width": (
        lambda: adapted(narrower(intermediate_size=96)),
        r"model\.layers\.0\.mlp\.down_proj: lora_A\.weight: expected shape \[4, 128\], got \[4, 96\]",
    ),
    "other vocabulary, replaced": (
        lambda: adapted(narrower(vocab_size=300), lora(["q_proj"], modules_to_save=["lm_head"])),
        r"lm_head: weight: expected shape \[256, 64\], got \[300, 64\]",
    ),
    "other vocabulary, adapted": (
        lambda: adapted(narrower(vocab_size=300), lora(["embed_tokens"])),
        r"embed_tokens: (base_layer\.weight|lora_embedding_A): expected shape \[(4, 256|256, 64)\], got \[(4, )?300",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_do_not_fit_change_nothing(name, tmp_path):
    make, message = UNFIT[name]
    make().save_pretrained(tmp_path)
    model = packed_llama()
    base, expected = logits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert [type(m) for m in model.modules()] == expected and torch.equal(logits(model), base)
    model = adapted(model, lora(["k_proj"], modules_to_save=["embed_tokens"]))
    before, expected = logits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert [type(m) for m in model.modules()] == expected and torch.equal(logits(model), before)


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_files_with_too_little_or_too_much(tmp_path):
    model = adapted(packed_llama(), lora(["k_proj"], modules_to_save=["lm_head"]))
    before = logits(model)
    model.save_pretrained(tmp_path)
    name = "base_model.model.lm_head.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="lm_head: weight: expected one, as modules_to_save says, found none"):
        model.load_adapter(tmp_path, "second")
    table = torch.zeros(256, 64)
    rewrite(tmp_path, lambda t: t.update({name: table, "base_model.model.model.embed_tokens.weight": table.clone()}))
    with pytest.raises(ValueError, match=r"embed_tokens: weight: expected adapters of a packed module, got a weight"):
        peft.PeftModel.from_pretrained(packed_llama(), tmp_path)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


def test_another_rank_than_the_configuration_says(tmp_path):
    model = adapted(packed_llama(), lora(["k_proj"], rank_pattern={"layers.1.self_attn.k_proj": 2}))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros(32, 3)}))
    with pytest.raises(
        ValueError, match=r"1\.self_attn\.k_proj: lora_B\.weight: expected shape \[32, 2\], got \[32, 3\]"
    ):
        again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.skipif(peft.__version__ < "0.20", reason="Transformers 5.23 loses a head's adapter with it, float or not")
def test_adapters_of_transformers_itself(tmp_path):
    """model.load_adapter of Transformers, which makes no PeftModel."""
    model = adapted(packed_llama(), lora(EVERYTHING))
    model.save_pretrained(tmp_path)
    plain = packed_llama()
    base = logits(plain)
    plain.load_adapter(str(tmp_path))
    assert isinstance(plain.lm_head, LoraLinear)
    assert torch.equal(logits(plain), logits(model))
    plain.disable_adapters()
    assert torch.equal(logits(plain), base)


# ---- a fine-tune ----


def licence_text():
    """Prose, unlike the source text that the model was trained on."""
    return (Path(__file__).parents[2] / "LICENSE").read_text("utf-8")


def windows(ids, length=96):
    return ids[: len(ids) // length * length].view(-1, length)


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(batch, labels=batch).loss)


def test_a_short_fine_tune_of_a_quantized_model(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    lowbit.quantize(model, recipe=lowbit.Recipe(bits=4, method="rtn", head_bits=8, embed_bits=8))
    lowbit.save(model, tmp_path / "base")
    model = lowbit.load(tmp_path / "base")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    base = tables(model)

    ids = windows(tokenizer(licence_text(), return_tensors="pt").input_ids[0])
    held_out = ids[::5]  # every fifth piece is not trained on
    training = torch.cat([ids[i::5] for i in range(1, 5)])
    before = loss_of(model, held_out)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora(r=8, lora_alpha=16, modules_to_save=["lm_head"])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(18):
        batch = training[step * 4 % len(training) :][:4]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    after = loss_of(model, held_out)
    assert after < 0.9 * before, (before, after)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(lowbit.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert_same(tables(model.unload()), base)


def test_nothing_of_lowbit_imports_peft():
    """Registering is the user's word, and costs those nothing who have no adapters."""
    code = "import lowbit.models, lowbit.checkpoint, sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
