"""Ternarizing a model: what is ternary already is packed exactly by every method, the rest as asked, or reported."""

import copy
import json

import pytest
import torch
from tiny_models import build, token_ids

import lowbit
from lowbit import PackedMatrix
from lowbit.cli.main import main
from lowbit.quantize.ternary import is_ternary, ternary_state


@pytest.fixture(scope="module")
def dense():
    return build("llama")


def ternary_weights(model):
    """The same model with the weights of its blocks rounded to -s, 0, s, a scale a matrix."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            packed = PackedMatrix.from_float(parameter, "trit", per_tensor=True, scale_dtype=torch.float32)
            parameter.data = packed.unpack().to(parameter.dtype)
    return model


def test_the_state_of_a_matrix():
    trits = torch.tensor([[0.5, 0.0, -0.5, 0.5]])
    for dtype in (torch.float32, torch.bfloat16):
        state = ternary_state(trits.to(dtype))
        assert (state.is_ternary, state.values, state.zeros, state.relative_error) == (True, 3, 0.25, 0)
    assert ternary_state(torch.zeros(2, 3)).is_ternary
    assert ternary_state(torch.tensor([[0.0, -0.0, 1.0]]).bfloat16()).values == 2
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    state = ternary_state(w)
    assert not state.is_ternary and state.values == 4096 and 0.25 < state.zeros < 0.35
    assert 0.45 < state.relative_error < 0.55
    assert "4,096 values" in str(state) and "ternary, 25% zeros" in str(ternary_state(trits))
    late = torch.ones(3, 4)
    late[2, 3] = 2  # only the last row tells
    assert not is_ternary(late) and not is_ternary(torch.full((1, 2), torch.inf))


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "exact"},
        {"method": "rtn"},
        {"method": "rtn", "group_size": 64, "clip": True},
        {"method": "rtn", "group_size": -1, "per_tensor": True},
        {"method": "gptq"},
    ],
)
def test_ternary_weights_are_packed_exactly_whatever_is_asked(dense, recipe):
    model = ternary_weights(dense)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = lowbit.quantize(model, token_ids(2), {"bits": "trit", **recipe})
    assert report.modules and {row["method"] for row in report.modules} == {"exact"}
    for row in report.modules:
        packed = model.get_submodule(row["name"]).packed
        assert (packed.format, tuple(packed.scales.shape), row["relative_error"]) == ("trit", (1, 1), 0)
        assert torch.equal(packed.unpack(), weights[row["name"] + ".weight"].float())
    again = lowbit.quantize(ternary_weights(ternary_weights(dense)), None, {"bits": "trit", "method": "exact"})
    assert [row["name"] for row in again.modules] == [row["name"] for row in report.modules]


def test_exact_leaves_and_reports_what_is_not_ternary(dense):
    model = ternary_weights(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.01
    report = lowbit.quantize(model, None, {"bits": "trit", "method": "exact"})
    reasons = {row["name"]: row["reason"] for row in report.kept}
    assert "not ternary: 4 values" in reasons["model.layers.1.mlp.up_proj"]
    assert "model.layers.0.mlp.up_proj" not in reasons


def test_the_solver_beats_rounding(dense):
    ids = token_ids()
    with torch.no_grad():
        expected = dense(ids).logits
    errors = {}
    for method in ("rtn", "gptq"):
        model = copy.deepcopy(dense)
        lowbit.quantize(model, ids, {"bits": "trit", "group_size": 64, "method": method, "correction": "none"})
        assert {m.packed.format for m in model.modules() if isinstance(m, lowbit.nn.Linear) and m.packed} == {"trit"}
        with torch.no_grad():
            errors[method] = (model(ids).logits - expected).norm().item()
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_the_command(dense, tmp_path, capsys):
    ternary_weights(dense).save_pretrained(tmp_path / "ternary")
    dense.save_pretrained(tmp_path / "dense")
    run = lambda *words: main(["ternarize", *map(str, words), "--no-report"])  # noqa: E731
    assert run(tmp_path / "ternary", "-o", tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in report["modules"]} == {"exact"}
    model = lowbit.load(tmp_path / "out")
    up_proj = "model.layers.0.mlp.up_proj"
    expected = ternary_weights(dense).get_submodule(up_proj).weight
    assert torch.equal(model.get_submodule(up_proj).packed.unpack(), expected.float())
    assert run(tmp_path / "dense", "-o", tmp_path / "none") == 2
    assert "expected ternary matrices, but the nearest" in capsys.readouterr().err
    assert run(tmp_path / "dense", "-o", tmp_path / "mean", "--method", "absmean", "--modules", "mlp", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    assert rows and all(".mlp." in row["name"] and row["method"] == "rtn" for row in rows)
    for words, message in (
        (("--method", "best"), "method: expected one of exact, absmean, gptq"),
        (("--method", "gptq", "--group-size", "0"), "group_size: expected a multiple of 16 or -1"),
        (("--method", "absmean", "--format", "gptq"), "holds integer codes only, got trit"),
        (("--method", "absmean", "--group-size", "64", "--format", "bitnet"), "holds one scale a matrix"),
    ):
        assert run(tmp_path / "dense", "-o", tmp_path / "no", *words) == 2
        assert message in capsys.readouterr().err
