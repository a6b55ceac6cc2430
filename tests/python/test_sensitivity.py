"""Sensitivity: figures against formulas written out here, models left as they were, recipes that do what was chosen."""

import copy
import json
import math

import pytest
import torch
from tiny_models import build, token_ids

import lowbit
from lowbit import _C
from lowbit.models import replaced, weight_matrix
from lowbit.quantize import Recipe, make_plan
from lowbit.quantize.allocate import Budget, BudgetError
from lowbit.quantize.sensitivity import Sensitivity, choose, format_rules, hold_out, measure

IDS = token_ids(12)
# A row takes whole lines of 64 bytes: only rows of 256 columns or more take fewer bytes in fewer bits.
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices as small as these gain nothing from threads, and lose much on a machine that is busy."""
    before, kernels_before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before)
    _C.set_threads(kernels_before)


@pytest.fixture(scope="module")
def tied():
    return build("qwen3", **WIDE)


@pytest.fixture(scope="module")
def by_kinds(tied):
    return measure(tied, IDS[:10], ("2", "8", "16"), Recipe(group_size=32), by="kinds", evaluation=IDS[10:])


def rows(sensitivity, name):
    return {row["format"]: row for row in sensitivity.modules if row["name"] == name}


def test_the_loss_of_a_layer_is_the_error_of_its_outputs():
    model = build("llama")
    seen = []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).double()))
    found = rows(measure(model, IDS, ("3", "2:g64:rtn"), Recipe(group_size=32)), name)
    x = torch.cat(seen)[-IDS.numel() :]  # the last pass over the windows
    weight = weight_matrix(model.get_submodule(name)).double()
    packed = lowbit.PackedMatrix.from_float(weight.float(), "int2", 64, clip=True).unpack().double()
    lost = (x @ (packed - weight).T).square().sum(1).mean()
    row = found["2:g64:rtn"]
    assert row["loss"] == pytest.approx(float(lost), rel=1e-4)
    assert row["relative_error"] == pytest.approx(math.sqrt(lost / (x @ weight.T).square().sum(1).mean()), rel=1e-4)
    assert row["error_of"] == "output" and row["tokens"] == IDS.numel() and row["fallback"] is None
    assert 0 < found["3"]["relative_error"] < row["relative_error"]


def test_layers_are_solved_as_a_run_solves_the_first_of_them():
    """Nothing stands before the first block, so its queries are quantized on the inputs they are measured on."""
    model = build("llama")
    measured = rows(measure(model, IDS, ("4",), Recipe(group_size=32)), "model.layers.0.self_attn.q_proj")["4"]
    report = lowbit.quantize(model, IDS, Recipe(group_size=32, correction="none"))
    row = report.modules[0]
    assert row["name"] == measured["name"]
    assert measured["relative_error"] == pytest.approx(row["relative_error"], rel=1e-5)
    assert measured["bits_per_weight"] == row["bits_per_weight"]


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "albert", "t5", "bert"])
def test_every_architecture_and_every_matrix_of_its_plan(architecture):
    model = build(architecture)
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe(bits=8, head_bits=8, embed_bits=8)
    planned = {m.name: m for m in make_plan(model, recipe).quantized}
    measured = measure(model, IDS[:4], ("trit", "8"), Recipe(group_size=32))
    assert {row["name"] for row in measured.modules} == set(planned)
    assert len(measured.modules) == 2 * len(planned)
    for row in measured.modules:
        assert row["relative_error"] is not None and row["bytes"] > 0
        assert row["names"] == list(planned[row["name"]].names)
    kinds = {row["kind"] for row in measured.modules}
    assert {"attention", "embedding"} <= kinds <= {"attention", "mlp", "head", "embedding", "other"}
    assert "mlp" in kinds or architecture == "mixtral"  # its experts are parameters of three dimensions
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    json.dumps(measured.to_dict(), allow_nan=False)


def test_a_tied_table_is_one_row_that_counts_both_uses(tied, by_kinds):
    names = {row["name"]: row["names"] for row in by_kinds.modules}
    assert names["model.embed_tokens"] == ["model.embed_tokens", "lm_head"] and "lm_head" not in names
    table = weight_matrix(tied.model.embed_tokens).double()
    packed = lowbit.PackedMatrix.from_float(table.float(), "int2", 32, clip=True).unpack().double()
    ids = IDS[:10].flatten()
    with torch.no_grad():
        x = tied.model(IDS[:10]).last_hidden_state.flatten(0, 1).double()
    looked_up = (packed - table)[ids].square().sum() / table[ids].square().sum()
    logits = (x @ (packed - table).T).square().sum() / (x @ table.T).square().sum()
    assert rows(by_kinds, "model.embed_tokens")["2"]["relative_error"] ** 2 == pytest.approx(
        float(looked_up + logits), rel=1e-3
    )


def test_groups_are_measured_end_to_end_with_everything_else_as_it_is(tied, by_kinds):
    figures = {(row["group"], row["format"]): row for row in by_kinds.groups}
    assert set(figures) == {(g, f) for g in ("attention", "mlp", "embedding") for f in ("2", "8")}
    assert all(figures[g, "8"]["kl_divergence"] < figures[g, "2"]["kl_divergence"] for g, _ in figures)
    # The same by hand: the table alone in 8 bits.
    packed = lowbit.PackedMatrix.from_float(tied.model.embed_tokens.weight.detach(), "int8", 32)
    changed = copy.deepcopy(tied)
    lowbit.models.patch(changed, {"model.embed_tokens": packed, "lm_head": packed})
    with torch.no_grad():
        logits, reference = (m(IDS[10:]).logits.float().log_softmax(-1) for m in (changed, tied))
    expected = float((reference.exp() * (reference - logits)).sum(-1).mean())
    row = figures["embedding", "8"]
    assert row["kl_divergence"] == pytest.approx(expected, rel=1e-3)
    assert row["modules"] == 1 and row["bytes"] == packed.nbytes
    assert by_kinds.perplexity == pytest.approx(row["perplexity"], rel=0.05)
    assert by_kinds.evaluation == {"windows": 2, "context": 32, "tokens": 64}
    assert isinstance(tied.lm_head, torch.nn.Linear)  # put back


def test_items_share_the_kl_divergence_of_their_group(by_kinds):
    items = {item.name: {option.format: option.loss for option in item.options} for item in by_kinds.items()}
    assert list(items) == list(dict.fromkeys(row["name"] for row in by_kinds.modules))
    for row in by_kinds.groups:
        inside = [r for r in by_kinds.modules if (r["kind"], r["format"]) == (row["group"], row["format"])]
        losses = [items[r["name"]][r["format"]] for r in inside]
        assert sum(losses) == pytest.approx(row["kl_divergence"])
        assert losses[0] / losses[-1] == pytest.approx(
            (inside[0]["relative_error"] / inside[-1]["relative_error"]) ** 2
        )
    assert all(losses["16"] == 0 for losses in items.values())


def test_items_without_groups_have_the_loss_of_their_output():
    measured = measure(build("llama"), IDS[:4], ("2", "8"), Recipe(group_size=32))
    found = [(item.name, o.format, o.loss, o.bytes) for item in measured.items() for o in item.options]
    assert found == [(row["name"], row["format"], row["loss"], row["bytes"]) for row in measured.modules]


@pytest.mark.parametrize("by", ["modules", "projections"])
@pytest.mark.parametrize("budget", [Budget(bits=4.4), Budget(bytes=1_000_000)])
def test_what_is_chosen_is_what_the_recipe_gives(by, budget):
    model = build("llama", **WIDE)
    own = Recipe(group_size=32, rules={r".*\.0\.mlp\.up_proj$": 8, "lm_head": "skip"})
    measured = measure(model, IDS[:10], ("trit", "2", "4:g64", "16"), own, by=by, evaluation=IDS[10:])
    assert not {"lm_head", "model.layers.0.mlp.up_proj"} & {row["name"] for row in measured.modules}
    choice = choose(measured, budget, own)
    again = Recipe.from_dict(json.loads(json.dumps(choice.recipe.to_dict())))
    assert again == choice.recipe
    by_rules = Recipe(
        bits=16, group_size=32, rules=[*own.rules.items(), *map(lowbit.quantize.parse_rule, choice.rules)]
    )
    plan = make_plan(model, again)
    assert [m.spec and m.spec.bits for m in make_plan(model, by_rules).modules] == [
        m.spec and m.spec.bits for m in plan.modules
    ]
    for planned in plan.modules:
        if wanted := choice.formats.get(planned.name):
            found = "16" if planned.spec is None else f"{planned.spec.bits}"
            assert found == {"trit": "1.6", "4:g64": "4"}.get(wanted, wanted)
    report = lowbit.quantize(model, IDS[:10], again)
    assert report.packed_parameter_bytes == choice.total_bytes
    if budget.bytes:
        assert choice.total_bytes <= budget.bytes
    else:
        assert choice.bits_per_weight <= budget.bits


def test_more_bits_lose_less(tied, by_kinds):
    losses = [choose(by_kinds, Budget(bits=bits)).loss for bits in (3.5, 5, 9, 32)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    with pytest.raises(BudgetError, match="budget: expected at least"):
        choose(by_kinds, Budget(bits=1.5))


def test_weights_that_are_ternary_already_lose_nothing_as_trits():
    model = build("llama")
    name = "model.layers.0.mlp.gate_proj"
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(0.05 * weight.sign())
    found = rows(measure(model, IDS[:4], ("trit", "4"), Recipe(group_size=32)), name)
    assert found["trit"]["loss"] == 0 and found["4"]["bytes"] > found["trit"]["bytes"]


def test_what_is_trained_ternary_is_packed_as_trained_and_loses_nothing():
    model = build("llama", **WIDE)
    ternary = set(lowbit.quantize.prepare_ternary_training(model))
    measured = measure(model, IDS[:4], ("2", "16"), Recipe(group_size=32), by="kinds", evaluation=IDS[4:6])
    found = [row for row in measured.modules if row["name"] in ternary]
    assert len(found) == 2 * len(ternary) > 0
    assert all(row["relative_error"] < 1e-6 for row in found)
    divergences = {row["group"]: row["kl_divergence"] for row in measured.groups}
    assert divergences["mlp"] < 1e-4 < divergences["head"]


def test_numbers_that_are_none_are_no_options():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    measured = measure(model, IDS[:4], ("4",), Recipe(group_size=32))
    found = rows(measured, "model.layers.0.mlp.down_proj")["4"]
    assert "1 weights are not finite" in found["fallback"]
    json.dumps(measured.to_dict(), allow_nan=False)
    broken = Sensitivity(["4"], "modules", [{**found, "loss": None}])
    with pytest.raises(ValueError, match="expected at least one format"):
        broken.items()


def test_the_same_figures_every_time():
    model = build("llama")
    first, second = (measure(model, IDS, ("3",), Recipe(group_size=32)).modules for _ in range(2))
    assert [{**row, "seconds": 0} for row in first] == [{**row, "seconds": 0} for row in second]


def test_modules_are_put_back_after_an_error():
    model = build("llama")
    before = model.lm_head
    with pytest.raises(RuntimeError, match="stop"), replaced(model, {"lm_head": torch.nn.Identity()}):
        assert model.lm_head is not before
        raise RuntimeError("stop")
    assert model.lm_head is before


def test_rules_join_the_layers_of_a_place():
    formats = {
        "model.layers.0.mlp.up": "4",
        "model.layers.1.mlp.up": "2:g64",
        "model.layers.10.mlp.up": "4",
        "model.layers.2.mlp.experts.3.w": "trit",
        "model.layers.3.mlp.up": "16",
        "lm_head": "8",
    }
    assert format_rules(formats) == [
        "lm_head$=8",
        r"model\.layers\.(0|10)\.mlp\.up$=4",
        r"model\.layers\.1\.mlp\.up$=2:g64",
        r"model\.layers\.2\.mlp\.experts\.3\.w$=trit",
    ]
    recipe = Recipe(bits=16, rules=format_rules(formats))
    found = {name: recipe.for_module(name) for name in formats}
    assert [spec and spec.bits for spec in found.values()] == [4, 2, 4, 1.6, None, 8]
    assert recipe.for_module("model.layers.0.mlp.up.more") is None


@pytest.mark.parametrize(("count", "out"), [(2, [1]), (7, [6]), (8, [7]), (17, [7, 15])])
def test_held_out_windows(count, out):
    windows = torch.arange(count)[:, None].expand(count, 4)
    calibrated, held_out = hold_out(windows)
    assert held_out[:, 0].tolist() == out
    assert sorted([*calibrated[:, 0].tolist(), *out]) == list(range(count))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: measure(m, IDS, ()), "formats: expected at least one"),
        (lambda m: measure(m, IDS, ("skip",)), "formats: expected a width such as 4, trit or 2:g64, got 'skip'"),
        (lambda m: measure(m, IDS, ("g64",)), "formats: expected a width"),
        (lambda m: measure(m, IDS, ("16:g64",)), "formats: expected 16 alone for what stays as it is, got '16:g64'"),
        (lambda m: measure(m, IDS, ("trit:exact",)), "model: expected a matrix to measure"),
        (lambda m: measure(m, IDS, ("4", "4")), "formats: 4 given twice"),
        (lambda m: measure(m, IDS, ("5",)), "bits: expected one of trit, 2, 3, 4, 8, 16, got 5"),
        (lambda m: measure(m, IDS, by="layers"), "groups: expected one of modules, projections, kinds, got 'layers'"),
        (lambda m: measure(m, IDS, by="kinds"), r"evaluation: expected windows \[n, context\]"),
        (lambda m: measure(m, IDS, recipe=Recipe(rules={".*": 4})), "model: expected a matrix to measure"),
        (lambda m: measure(m, IDS, recipe=Recipe(rules={"nowhere": 4})), "matches no matrix"),
        (lambda m: hold_out(IDS[:1]), "at least 2 windows, one to be held out, got 1"),
    ],
)
def test_wrong_arguments_are_named(tied, call, message):
    with pytest.raises(ValueError, match=message):
        call(tied)
