"""Decoder layers in few calls: the same numbers as Transformers' modules, only where nobody can tell, and over caches
that stay theirs."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch

import lowbit
from lowbit.integrations import decoder, decoder_stack
from lowbit.models import fuse

pytest.importorskip("transformers")
import transformers
from tiny_models import VOCABULARY, build, relative_error

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
CHANGES = {"mistral": {"sliding_window": None}}


def packed(architecture="llama", dtype=torch.float32, **changes):
    model = build(architecture, dtype, **CHANGES.get(architecture, {}), **changes)
    lowbit.quantize(model, recipe=lowbit.Recipe(bits=4, group_size=32, method="rtn"))
    return model


@pytest.fixture
def decoded(monkeypatch):
    """An entry for each layer that was computed in few calls, "layer" or "stack", trials aside."""
    calls, decode, agrees, together = [], decoder._decode, decoder._agrees, decoder_stack._Stack.decode

    def trial(*arguments):
        before = len(calls)
        result = agrees(*arguments)
        del calls[before:]
        return result

    def stack(self, *arguments):
        calls.extend(["stack"] * len(self.parts))
        return together(self, *arguments)

    monkeypatch.setattr(decoder, "_decode", lambda *arguments: calls.append("layer") or decode(*arguments))
    monkeypatch.setattr(decoder_stack._Stack, "decode", stack)
    monkeypatch.setattr(decoder, "_agrees", trial)
    return calls


@pytest.fixture
def around(monkeypatch):
    """An entry for each layer whose attention its own module computed, and lowbit what is around it, trials aside."""
    calls, compute, agrees = [], decoder._around_attention, decoder._agrees

    def trial(*arguments):
        before = len(calls)
        result = agrees(*arguments)
        del calls[before:]
        return result

    monkeypatch.setattr(decoder, "_around_attention", lambda *arguments: calls.append(1) or compute(*arguments))
    monkeypatch.setattr(decoder, "_agrees", trial)
    return calls


def ids(count=5, batch=1):
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of_steps(model, prompt, steps=6, cache=None, **options):
    """Logits of `steps` tokens, one at a time, after a prompt; the tokens are the same whatever comes out."""
    result = model(prompt, past_key_values=cache, use_cache=True, **options)
    out = []
    for i in range(steps):
        token = torch.full((len(prompt), 1), 3 + 7 * i % 150)
        result = model(token, past_key_values=result.past_key_values, use_cache=True, **options)
        out.append(result.logits)
    return torch.cat(out, 1), result.past_key_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_decoding_gives_what_the_modules_give(architecture, dtype, decoded):
    model = packed(architecture, dtype)
    bound = 2e-4 if dtype == torch.float32 else 2e-2
    for batch in (1, 3):
        decoded.clear()
        fused, cache = logits_of_steps(model, ids(batch=batch))
        assert len(decoded) == 2 * 6
        assert fuse(model, enabled=False) == 2
        plain, plain_cache = logits_of_steps(model, ids(batch=batch))
        assert len(decoded) == 2 * 6
        assert fuse(model) == 2
        assert relative_error(fused, plain) < bound
        for ours, theirs in zip(cache.layers, plain_cache.layers, strict=True):
            assert ours.keys.shape == theirs.keys.shape
            assert relative_error(ours.keys, theirs.keys) < bound and relative_error(ours.values, theirs.values) < bound


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_family_passes_its_trial(architecture, recwarn):
    model = packed(architecture)
    logits_of_steps(model, ids(), 1)
    assert model.model.layers[0].forward.family.agrees is True
    assert not [w for w in recwarn if "fused" in str(w.message)]


def test_int8_activations_biases_and_permutations(decoded):
    model = build("qwen2", torch.bfloat16)  # q, k and v with a bias
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    batches = [{"input_ids": ids(20, 2)}]
    lowbit.quantize(model, batches, lowbit.Recipe(bits=4, group_size=32, activations="int8"))
    fused, _ = logits_of_steps(model, ids())
    assert len(decoded) == 2 * 6
    fuse(model, enabled=False)
    assert relative_error(fused, logits_of_steps(model, ids())[0]) < 5e-2


def test_generate_and_beams(decoded):
    model = packed()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    greedy, beams = model.generate(ids(), **options), model.generate(ids(), num_beams=3, **options)
    assert len(decoded) >= 2 * 11
    fuse(model, enabled=False)
    assert torch.equal(greedy, model.generate(ids(), **options))
    assert torch.equal(beams, model.generate(ids(), num_beams=3, **options))


def test_decoding_past_the_room_of_a_cache(decoded):
    model = packed(max_position_embeddings=512)
    fused, cache = logits_of_steps(model, ids(), 150)
    rooms = cache.layers[0].__dict__["_lowbit_room"]
    assert rooms.filled == cache.get_seq_length() == 155 <= rooms.keys.shape[2] < 300
    fuse(model, enabled=False)
    assert relative_error(fused, logits_of_steps(model, ids(), 150)[0]) < 2e-4


CHANGES_OF_A_LAYER = {
    "a mode": lambda layer: setattr(layer.self_attn.o_proj, "activations", "int8"),
    "a weight": lambda layer: layer.mlp.down_proj.load(other_matrix(64, 96), replace=True),
    "a linear": lambda layer: setattr(
        layer.mlp, "up_proj", lowbit.nn.Linear.from_packed(other_matrix(96, 64), None, "float").eval()
    ),
    "a float weight": lambda layer: layer.mlp.down_proj.load(torch.ones(64, 96) / 9, replace=True),
    "a norm": lambda layer: setattr(layer, "input_layernorm", copy.deepcopy(layer.input_layernorm)),
    "a norm's weight": lambda layer: setattr(
        layer.input_layernorm, "weight", torch.nn.Parameter(torch.full((64,), 0.7))
    ),
    "a norm's storage": lambda layer: setattr(layer.input_layernorm.weight, "data", torch.full((64,), 0.5)),
    "a norm in place": lambda layer: layer.post_attention_layernorm.weight.detach().fill_(0.3),
    "a bias's storage": lambda layer: setattr(layer.self_attn.q_proj.bias, "data", torch.ones(64)),
    "a forward": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "a hook": lambda layer: layer.mlp.gate_proj.register_forward_hook(lambda m, x, y: 2 * y),
}


class TestManyTokens:
    """A prompt: what the modules give, with their own attention."""

    @staticmethod
    def both_ways(model, around, run):
        """run() with the layers computed in few calls, and by their modules."""
        around.clear()
        fused = run()
        count = len(around)
        fuse(model, enabled=False)
        plain = run()
        assert len(around) == count
        fuse(model)
        return fused, plain, count

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("architecture", FAMILIES)
    @torch.no_grad()
    def test_prompts(self, architecture, dtype, around):
        model = packed(architecture, dtype)
        for tokens, batch in ((1, 1), (2, 1), (17, 3), (70, 1)):
            fused, plain, count = self.both_ways(model, around, lambda t=tokens, b=batch: model(ids(t, b)).logits)
            bound = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
            assert count == 2 and relative_error(fused, plain) < bound

    @torch.no_grad()
    def test_masks_and_caches(self, around):
        model, mask = packed(), torch.ones(2, 9, dtype=torch.long)
        mask[0, :4] = 0

        def padded():
            return model(ids(9, 2), attention_mask=mask).logits

        def behind_others():
            cache = model(ids(), use_cache=True).past_key_values
            result = model(ids(3), past_key_values=cache)
            assert result.past_key_values.get_seq_length() == 8
            return result.logits

        def static():
            cache = transformers.StaticCache(config=model.config, max_cache_len=16)
            return logits_of_steps(model, ids(), 2, cache=cache)[0]

        for run, calls in ((padded, 2), (behind_others, 4), (static, 6)):
            fused, plain, count = self.both_ways(model, around, run)
            assert count == calls and relative_error(fused, plain) < 2e-4

    @torch.no_grad()
    def test_biases_and_int8(self, around):
        model = packed("qwen2", torch.bfloat16)
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
            layer.mlp.down_proj.bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
            for part in ("gate_proj", "up_proj", "down_proj"):
                layer.mlp.get_submodule(part).activations = "int8"
        fused, plain, count = self.both_ways(model, around, lambda: model(ids(20)).logits)
        assert count == 2 and relative_error(fused, plain) < 5e-2

    @pytest.mark.parametrize("change", CHANGES_OF_A_LAYER)
    @torch.no_grad()
    def test_changes(self, change, around):
        model = packed("qwen2")
        model(ids())
        CHANGES_OF_A_LAYER[change](model.model.layers[0])
        fused, plain, count = self.both_ways(model, around, lambda: model(ids()).logits)
        assert relative_error(fused, plain) < 2e-4
        left_alone = ("a float weight", "a forward", "a hook")  # and modes that q, k and v do not share
        assert count == (1 if change in left_alone else 2)

    @torch.no_grad()
    def test_calibration_goes_by_modules(self, around):
        model = build("llama")
        lowbit.quantize(model, [{"input_ids": ids(20, 2)}], lowbit.Recipe(bits=4, group_size=32))
        assert not around
        model(ids())
        assert len(around) == 2

    def test_whatever_somebody_could_tell(self, around):
        model = packed()
        model(ids())  # gradients are asked for
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                model(ids())
            model.train()(ids())
            model.eval().set_attn_implementation("eager")
            model(ids())
            model.set_attn_implementation("sdpa")
            compiled = torch.compile(model.forward, backend="eager")
            compiled(ids())
        assert not around


class TestFallback:
    """What somebody could tell goes through the modules."""

    def assert_unfused(self, model, decoded, prompt=None, **options):
        decoded.clear()
        out, _ = logits_of_steps(model, ids() if prompt is None else prompt, 3, **options)
        assert not decoded
        return out

    def test_hooks(self, decoded):
        model, seen = packed(), []
        for part in ("self_attn", "self_attn.q_proj", "mlp", "mlp.act_fn", "input_layernorm"):
            handle = model.model.layers[1].get_submodule(part).register_forward_hook(lambda *a: seen.append(1))
            decoded.clear()
            logits_of_steps(model, ids(), 3)
            assert len(decoded) == 3 and len(seen) == 4  # the other layer goes on
            handle.remove(), seen.clear()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            self.assert_unfused(model, decoded)
        finally:
            handle.remove()
        decoded.clear()
        logits_of_steps(model, ids(), 3)
        assert len(decoded) == 6

    def test_other_linears_and_forwards(self, decoded):
        model = packed()
        first, second = model.model.layers
        first.mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
        second.self_attn.o_proj.forward = second.self_attn.o_proj.forward
        self.assert_unfused(model, decoded)

    def test_adapters(self, decoded):
        peft = pytest.importorskip("peft")
        from lowbit.integrations import peft as _  # noqa: F401

        model = peft.get_peft_model(packed(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        self.assert_unfused(model.eval(), decoded)

    def test_modes(self, decoded):
        model = packed()
        model.model.layers[0].self_attn.k_proj.activations = "int8"
        model.model.layers[1].mlp.gate_proj.activations = "int8"
        self.assert_unfused(model, decoded)
        with torch.autocast("cpu", torch.bfloat16):
            self.assert_unfused(packed(), decoded)
        self.assert_unfused(packed().train(), decoded)

    def test_gradients(self, decoded):
        model = packed()
        with torch.no_grad():
            cache = model(ids(), use_cache=True).past_key_values
        assert model(ids(1), past_key_values=cache).logits.requires_grad
        assert not decoded

    def test_other_attention_and_caches(self, decoded):
        model = packed()
        model.set_attn_implementation("eager")
        self.assert_unfused(model, decoded)
        model.set_attn_implementation("sdpa")
        config = model.config
        self.assert_unfused(model, decoded, cache=transformers.StaticCache(config=config, max_cache_len=16))
        windowed = build("mistral", sliding_window=8)
        lowbit.quantize(windowed, recipe=lowbit.Recipe(bits=4, group_size=32, method="rtn"))
        self.assert_unfused(windowed, decoded)

    def test_padding(self, decoded):
        model, prompt = packed(), ids(batch=2)
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[0, :2] = 0
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
        fused = model.generate(prompt, attention_mask=mask, **options)
        assert not decoded
        fuse(model, enabled=False)
        assert torch.equal(fused, model.generate(prompt, attention_mask=mask, **options))

    def test_several_tokens_no_cache_and_asked_for_attentions(self, decoded):
        model = packed()
        with torch.no_grad():
            cache = model(ids(), use_cache=True).past_key_values
            model(ids(2), past_key_values=cache)
            model(ids(1), use_cache=False)
            model(ids(1), past_key_values=None, use_cache=True)  # nothing behind it: the cache is made by the modules
            assert not decoded
            hidden = model(ids(1), past_key_values=cache, output_hidden_states=True).hidden_states
            assert len(hidden) == 3 and not decoded

    def test_compiled(self, decoded):
        model = packed()
        with torch.no_grad():
            cache = model(ids(), use_cache=True).past_key_values
            wanted = model(ids(1), past_key_values=copy.deepcopy(cache)).logits
            decoded.clear()
            compiled = torch.compile(model.forward, backend="eager")
            assert relative_error(compiled(ids(1), past_key_values=cache).logits, wanted) < 2e-4
        assert not decoded


class TestChanges:
    """What a layer is made of may change between two tokens: the next one follows."""

    @pytest.mark.parametrize("change", CHANGES_OF_A_LAYER)
    @torch.no_grad()
    def test_the_next_token_follows(self, change, decoded):
        model = packed("qwen2")  # with biases
        cache = model(ids(), use_cache=True).past_key_values
        before = model(ids(1), past_key_values=copy.deepcopy(cache)).logits
        assert len(decoded) == 2
        CHANGES_OF_A_LAYER[change](model.model.layers[0])
        fused = model(ids(1), past_key_values=copy.deepcopy(cache)).logits
        fuse(model, enabled=False)
        assert relative_error(fused, model(ids(1), past_key_values=cache).logits) < 2e-4
        assert change == "a norm" or relative_error(fused, before) > 1e-3


def other_matrix(rows, cols):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)) / 5
    return lowbit.PackedMatrix.from_float(weight, "int4", 32)


class TestCaches:
    """A cache's layers hold the tensors that they would hold, and no two caches ever share a place."""

    @torch.no_grad()
    def start(self, model):
        cache = model(ids(), use_cache=True).past_key_values
        model(ids(1), past_key_values=cache)
        return cache

    @torch.no_grad()
    def go_on(self, model, cache, token):
        return model(torch.tensor([[token]]), past_key_values=cache).logits

    @pytest.mark.parametrize("part", [copy.copy, copy.deepcopy])
    def test_copies_part_ways(self, part, decoded):
        model = packed()
        cache = self.start(model)
        other = part(cache)
        other.layers = [part(layer) for layer in cache.layers]
        wanted = [self.go_on(model, copy.deepcopy(cache), token) for token in (10, 20)]
        assert torch.equal(self.go_on(model, cache, 10), wanted[0])
        assert torch.equal(self.go_on(model, other, 20), wanted[1])
        first, second = cache.layers[0].keys, other.layers[0].keys
        assert torch.equal(first[:, :, :-1], second[:, :, :-1]) and not torch.equal(first, second)
        assert len(decoded) == 2 * 5

    def test_a_crop_leaves_what_was_taken_before(self):
        model = packed()
        cache = self.start(model)
        before = cache.layers[0].keys
        content = before.clone()
        cache.crop(-1)
        self.go_on(model, cache, 33)
        assert cache.get_seq_length() == 6 and torch.equal(before, content)
        assert not torch.equal(cache.layers[0].keys, before)

    def test_threads_with_caches_of_their_own(self):
        model = packed()
        prompts = [ids(5), ids(9), ids(4, batch=3), ids(17)]
        logits_of_steps(model, ids(), 3)  # the trials, of which one token ends in torch's own norm
        wanted = [logits_of_steps(model, prompt, 20)[0] for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: logits_of_steps(model, prompt, 20)[0], prompts))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_a_cache_that_is_another_models(self, decoded):
        model, other = packed(), packed(num_key_value_heads=4)
        cache = self.start(other)
        decoded.clear()
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):  # as Transformers says it
            self.go_on(model, cache, 4)
        assert not decoded

    def test_the_modules_go_on_where_the_calls_stopped(self):
        model = packed()
        cache = self.start(model)
        twin = copy.deepcopy(cache)
        fused = [self.go_on(model, cache, t) for t in (4, 5)]
        fuse(model, enabled=False)
        plain = [self.go_on(model, twin, t) for t in (4, 5)]
        assert relative_error(torch.cat(fused), torch.cat(plain)) < 2e-4
        fuse(model)
        assert relative_error(self.go_on(model, twin, 6), self.go_on(model, cache, 6)) < 2e-4


def test_a_layer_that_computes_something_else_is_left_alone(monkeypatch):
    from transformers.models.llama import modeling_llama

    model, forward = packed(), modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 1.2 * forward(self, x))
    with pytest.warns(UserWarning, match=r"LlamaDecoderLayer: this release .*they differ by 0\.\d+ of what"):
        out, _ = logits_of_steps(model, ids(), 2)
    fuse(model, enabled=False)
    assert torch.equal(out, logits_of_steps(model, ids(), 2)[0])

    monkeypatch.undo()
    model, attend = packed(), modeling_llama.LlamaAttention.forward
    wanted = model(ids()).logits

    def forward_of_a_bare_tensor(self, x, **kwargs):
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda *a, **k: attend(*a, **k)[0])
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward_of_a_bare_tensor)
    with torch.no_grad(), pytest.warns(UserWarning, match="TypeError: LlamaAttention: expected"):
        assert torch.equal(model(ids()).logits, wanted)

    monkeypatch.undo()
    model = packed()
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, hidden_states, newcomer, **_: hidden_states
    )
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="TypeError: .*newcomer"),
        pytest.raises(TypeError, match="newcomer"),
    ):
        layer = model.model.layers[0]
        cache = transformers.DynamicCache()
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
        angle = torch.zeros(1, 1, 16)
        layer(torch.zeros(1, 1, 64), past_key_values=cache, position_embeddings=(angle, angle))


def test_fuse_is_repeatable_copied_and_saved(tmp_path, decoded):
    model = packed()
    assert fuse(model) == 2 and fuse(model, enabled=False) == 2 and fuse(model, enabled=False) == 0 and fuse(model) == 2
    logits_of_steps(model, ids(), 2)  # the trials
    wanted, _ = logits_of_steps(model, ids(), 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(other.model.layers, model.model.layers, strict=True):
            assert ours.forward.layer is ours and theirs.forward.layer is theirs
        decoded.clear()
        assert torch.equal(logits_of_steps(other, ids(), 2)[0], wanted) and len(decoded) == 4
    lowbit.save(model, tmp_path / "model")
    loaded = lowbit.load(tmp_path / "model")
    decoded.clear()
    assert relative_error(logits_of_steps(loaded, ids(), 2)[0], wanted) < 1e-6 and len(decoded) == 4
    unknown = build("gemma")
    assert fuse(unknown) == 0


class TestStack:
    """All layers and the norm in one call: where no layer goes its own way and nobody looks in between."""

    def ready(self, architecture="llama", **changes):
        model = packed(architecture, **changes)
        logits_of_steps(model, ids(), 2)  # the trials of the layer and of the model
        return model

    def assert_follows(self, model, decoded, stacked, steps=3, **options):
        """What comes out is what the modules give, by the stack or without it."""
        decoded.clear()
        found, cache = logits_of_steps(model, ids(), steps, **options)
        assert ("stack" in decoded) == stacked, decoded
        fuse(model, enabled=False)
        wanted, plain = logits_of_steps(model, ids(), steps, **options)
        assert relative_error(found, wanted) < 2e-4
        assert cache.get_seq_length() == plain.get_seq_length()
        return found

    @pytest.mark.parametrize("architecture", FAMILIES)
    def test_each_family_passes_its_trial(self, architecture, decoded, recwarn):
        model = packed(architecture)
        logits_of_steps(model, ids(), 4)
        assert decoded == ["layer"] * 4 + ["stack"] * 4 and model.model.forward.agrees
        assert not [w for w in recwarn if "fused" in str(w.message)]
        self.assert_follows(model, decoded, True)

    @torch.no_grad()
    def test_what_is_returned(self):
        model = self.ready()
        cache = model(ids(), use_cache=True).past_key_values
        found = model.model(input_ids=ids(1), past_key_values=cache)
        assert type(found) is transformers.modeling_outputs.BaseModelOutputWithPast
        assert found.past_key_values is cache and found.hidden_states is None and found.attentions is None
        assert found.last_hidden_state.shape == (1, 1, 64)

    @torch.no_grad()
    def test_places_and_embeddings_that_are_given(self, decoded):
        model, steps = self.ready(), []
        for enabled in (True, False):
            fuse(model, enabled)
            cache = model(ids(batch=2), use_cache=True).past_key_values
            decoded.clear()
            for place in (5, 6, 300, 7):  # 300 is beyond what is made at once
                given = {"position_ids": torch.tensor([[place], [place]]), "past_key_values": cache}
                embeds = model.model.embed_tokens(ids(1, batch=2))
                steps.append(model(inputs_embeds=embeds, **given).logits)
            apart = {"position_ids": torch.tensor([[9], [4]]), "past_key_values": cache}
            steps.append(model(ids(1, batch=2), **apart).logits)
            assert decoded == (["stack"] * 8 + ["layer"] * 2 if enabled else [])
        half = len(steps) // 2
        assert all(relative_error(a, b) < 2e-4 for a, b in zip(steps[:half], steps[half:], strict=True))
        assert relative_error(steps[2], steps[1]) > 1e-3  # the place is looked at

    def test_what_is_asked_for(self, decoded):
        model = self.ready()
        with torch.no_grad():
            cache = model(ids(), use_cache=True).past_key_values
            usual = {"return_dict": True, "output_attentions": False, "cache_position": torch.tensor([5])}
            decoded.clear()
            model(ids(1), past_key_values=copy.deepcopy(cache), attention_mask=torch.ones(1, 6), **usual)
            assert decoded == ["stack"] * 2
            asked = [
                {"return_dict": False},
                {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
                {"attention_mask": torch.ones(1, 1, 1, 6)},
                {"cache_position": torch.tensor([4])},
                {"use_cache": False},
                {"output_attentions": True},
                {"output_hidden_states": True},
            ]
            for name, value in (("output_hidden_states", True), ("return_dict", False), ("use_cache", False)):
                before = getattr(model.config, name)
                setattr(model.config, name, value)
                decoded.clear()
                model.model(input_ids=ids(1), past_key_values=copy.deepcopy(cache))
                setattr(model.config, name, before)
                assert "stack" not in decoded, name
            for options in asked:
                decoded.clear()
                twin = copy.deepcopy(cache)
                model.model(input_ids=ids(1), past_key_values=twin, **options)
                assert "stack" not in decoded, options

    @pytest.mark.parametrize(
        "part, stacked",
        [("", True), ("embed_tokens", True), ("rotary_emb", True), ("norm", False), ("layers.1", False)],
    )
    def test_hooks(self, part, stacked, decoded):
        model, seen = self.ready(), []
        handle = model.model.get_submodule(part).register_forward_hook(lambda *a: seen.append(1))
        logits_of_steps(model, ids(), 2)  # layers look at what they are made of again
        seen.clear(), decoded.clear()
        logits_of_steps(model, ids(), 3)
        assert len(seen) == 4 and ("stack" in decoded) == stacked
        handle.remove()
        logits_of_steps(model, ids(), 2)
        self.assert_follows(model, decoded, True)

    CHANGES: ClassVar = {
        "the norm": (True, lambda m: setattr(m, "norm", type(m.norm)(64))),
        "the norm's weight": (True, lambda m: setattr(m.norm, "weight", torch.nn.Parameter(torch.full((64,), 0.7)))),
        "the norm's storage": (True, lambda m: setattr(m.norm.weight, "data", torch.full((64,), 0.5))),
        "the norm in place": (True, lambda m: m.norm.weight.detach().fill_(0.3)),
        "the norm's forward": (False, lambda m: setattr(m.norm, "forward", lambda x: x)),
        "the frequencies": (True, lambda m: m.rotary_emb.inv_freq.mul_(0.5)),
        "the rotary embedding": (True, lambda m: setattr(m.rotary_emb, "forward", turn_by_nothing)),
        "a layer's forward": (False, lambda m: setattr(m.layers[0], "forward", lambda x, **_: x)),
        "a layer's matrix": (True, lambda m: m.layers[0].mlp.down_proj.load(other_matrix(64, 96), replace=True)),
        "the number of layers": (False, lambda m: setattr(m.config, "num_hidden_layers", 1)),
        "the layers": (True, lambda m: setattr(m, "layers", torch.nn.ModuleList([m.layers[0], m.layers[1]]))),
    }

    @pytest.mark.parametrize("change", CHANGES)
    @torch.no_grad()
    def test_the_next_token_follows(self, change, decoded):
        model = self.ready()
        cache = model(ids(), use_cache=True).past_key_values
        before = model(ids(1), past_key_values=copy.deepcopy(cache)).logits
        stacked, change_it = self.CHANGES[change]
        change_it(model.model)
        found = model(ids(1), past_key_values=copy.deepcopy(cache)).logits
        for layer in model.model.layers:  # a forward of one's own stays
            if isinstance(layer.__dict__.get("forward"), decoder.FusedLayer):
                del layer.forward
        del model.model.forward
        assert relative_error(found, model(ids(1), past_key_values=copy.deepcopy(cache)).logits) < 2e-4
        assert change in ("the norm", "the layers") or relative_error(found, before) > 1e-3
        fuse(model)
        logits_of_steps(model, ids(), 2)
        decoded.clear()
        logits_of_steps(model, ids(), 1)
        assert ("stack" in decoded) == stacked

    @pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope"])
    def test_rotary_embeddings(self, kind, decoded):
        scaling = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
        if kind == "llama3":
            scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        if kind == "longrope":
            scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 8}
        model = self.ready(rope_parameters=scaling, max_position_embeddings=16)
        self.assert_follows(model, decoded, True, steps=14)

    def test_a_model_that_computes_something_else_is_left_alone(self, monkeypatch, decoded):
        from transformers.models.llama import modeling_llama

        forward = modeling_llama.LlamaModel.forward

        def twice(self, *args, **kwargs):
            result = forward(self, *args, **kwargs)
            result.last_hidden_state = 2 * result.last_hidden_state
            return result

        def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return forward(self, inputs_embeds=3 * x, **kwargs)

        for other, words in ((twice, "something after the norm"), (scaled, "changes the embedding")):
            monkeypatch.setattr(modeling_llama.LlamaModel, "forward", other)
            model = packed()
            with pytest.warns(UserWarning, match=f"LlamaModel: this release .*{words}.*layer by layer"):
                logits_of_steps(model, ids(), 2)
            self.assert_follows(model, decoded, False)
            assert decoded == ["layer"] * 6

    def test_a_class_whose_forward_changes(self, monkeypatch, decoded):
        from transformers.models.llama import modeling_llama

        model, forward = self.ready(), modeling_llama.LlamaModel.forward
        calls = []
        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        logits_of_steps(model, ids(), 2)
        assert len(calls) == 2 and decoded[-2:] == ["stack"] * 2  # for the prompt, and watched for a token

    @torch.no_grad()
    def test_padding_makes_no_room(self, decoded):
        """The modules would leave it, and every token copy the cache into another."""
        model, mask = self.ready(), torch.ones(2, 5, dtype=torch.long)
        mask[0, :2] = 0
        cache = model(ids(batch=2), attention_mask=mask, use_cache=True).past_key_values
        decoded.clear()
        for _ in range(2):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
            model(ids(1, batch=2), attention_mask=mask, past_key_values=cache)
        assert not decoded and "_lowbit_room" not in cache.layers[0].__dict__

    @torch.no_grad()
    def test_an_uneven_cache(self, decoded):
        model = self.ready()
        cache = model(ids(), use_cache=True).past_key_values
        cache.layers[1].keys, cache.layers[1].values = (
            tensor[:, :, 1:] for tensor in (cache.layers[1].keys, cache.layers[1].values)
        )
        decoded.clear()
        model(ids(1), past_key_values=cache)
        assert "stack" not in decoded

    def test_signature_for_those_who_look(self):
        import inspect

        model = self.ready()
        names = list(inspect.signature(model.model.forward).parameters)
        assert names == list(inspect.signature(type(model.model).forward).parameters)[1:]


def turn_by_nothing(x, position_ids):
    angle = torch.zeros(*position_ids.shape, 16, dtype=x.dtype)
    return angle.cos(), angle.sin()
