"""A model trained ternary, packed by `lowbit ternarize`: its matrices are those of the forward pass, exactly."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import _C
from lowbit.checkpoint.native import packed_modules
from lowbit.cli.main import main
from lowbit.evaluate import encode, evaluate
from lowbit.ternary import weight_quant

transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[1] / "data" / "tiny-ternary-code"
WINDOWS, CONTEXT = 4, 256


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before, kernels_before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before)
    _C.set_threads(kernels_before)


def dense(dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)


@pytest.fixture(scope="module")
def at_run_time():
    """The model as it was trained: weight_quant in every forward pass, in float32."""
    model = dense()
    assert len(lowbit.prepare_ternary_training(model)) == 28
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `lowbit ternarize` makes of it; computed in bfloat16 but for the trits, as the model is stored."""
    output = tmp_path_factory.mktemp("packed")
    assert main(["ternarize", str(MODEL), "-o", str(output), "--method", "absmean"]) == 0
    return output


@pytest.fixture(scope="module")
def tokens():
    """The beginning of the text that the training left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = json.loads((MODEL / "training.json").read_text())["held_out_files"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    return encode(tokenizer, [(library / names[-2]).read_text("utf-8")])[: WINDOWS * CONTEXT]


def packed_model(folder, dtype=torch.float32, activations="float"):
    from lowbit.cli.torch_options import load_model

    model = load_model(folder, str(dtype).removeprefix("torch."))
    for _, module, _ in packed_modules(model):
        module.activations = activations
    return model


@torch.inference_mode()
def logits(model, tokens):
    return model(tokens[None, :CONTEXT]).logits[0]


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_trits_and_scales_are_those_of_the_forward_pass(folder, at_run_time):
    matrices = {name: matrix for name, _, matrix in packed_modules(lowbit.load(folder, ternary="trit"))}
    assert len(matrices) == 28
    for name, matrix in matrices.items():
        latent = at_run_time.get_submodule(name).weight
        trits, scale = weight_quant(latent)
        assert torch.equal(matrix.unpack_codes().float() - 1, trits)
        assert matrix.scales.dtype == torch.float32 and torch.equal(matrix.scales, scale)
        assert matrix.equal(at_run_time.get_submodule(name).pack())
        # And of the definition, written out: the mean may round otherwise in its last place.
        s = 1 / latent.abs().mean().clamp(min=1e-5)
        assert torch.equal(trits, (latent * s).round().clamp(-1, 1))
        assert abs(scale.item() * s.item() - 1) < 2**-22
    stored = sum(2 * matrix.rows * matrix.cols for matrix in matrices.values())
    assert sum(matrix.nbytes for matrix in matrices.values()) <= 0.14 * stored


def test_the_unpacked_weights_give_the_same_logits_to_the_bit(folder, at_run_time, tokens):
    model = dense()
    for name, _, matrix in packed_modules(lowbit.load(folder)):
        model.get_submodule(name).weight.data = matrix.unpack()
    assert torch.equal(logits(model, tokens), logits(at_run_time, tokens))


@pytest.mark.parametrize("ternary", ["trit", "int2"])
def test_the_packed_model_gives_the_same_logits_up_to_rounding(folder, at_run_time, tokens, ternary):
    """Activations in 16-bit fixed point: 4e-5 of a product at most on such activations (docs/numerics.md), and 6e-5 of
    the logits measured after 28 of them."""
    model = packed_model(folder)
    for name, module, matrix in list(packed_modules(model)):
        model.get_submodule(name).load(matrix.repack(ternary), replace=True)
        assert module.packed.format == ternary
    assert distance(logits(model, tokens), logits(at_run_time, tokens)) < 2e-4


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_perplexity_stays(folder, at_run_time, tokens, activations):
    """In int8 the inputs of every product are rounded, which training did not do: the limit is on few tokens."""
    result = evaluate(packed_model(folder, activations=activations), tokens, reference=at_run_time, context=CONTEXT)
    limit = 1e-3 if activations == "float" else 5e-3
    assert abs(result.perplexity / result.reference_perplexity - 1) < limit
    assert result.kl_divergence < (1e-6 if activations == "float" else 2e-3)


def test_ternarizing_twice_changes_nothing(folder, tmp_path, capsys):
    """Unpacked in bfloat16 and float32, what was ternarized is ternary, and keeps its scale by every method."""
    first = {name: matrix for name, _, matrix in packed_modules(lowbit.load(folder, ternary="trit"))}
    model = dense()
    for name, matrix in first.items():
        model.get_submodule(name).weight.data = matrix.unpack()
    model.save_pretrained(tmp_path / "unpacked")
    for method in ("exact", "absmean"):
        words = ["ternarize", str(tmp_path / "unpacked"), "-o", str(tmp_path / method), "--method", method]
        assert main(words) == 0
        again = {n: matrix for n, _, matrix in packed_modules(lowbit.load(tmp_path / method, ternary="trit"))}
        assert again.keys() == first.keys() and all(again[name].equal(first[name]) for name in first)
    capsys.readouterr()


def test_without_a_method_latent_weights_are_reported_and_not_packed(tmp_path, capsys):
    assert main(["ternarize", str(MODEL), "-o", str(tmp_path / "out"), "--json"]) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    *table, error = captured.err.splitlines()
    assert len(report["matrices"]) == len([line for line in table if "_proj" in line]) == 28
    for row in report["matrices"]:
        assert not row["is_ternary"] and row["values"] > 3 and 0.2 < row["zeros"] < 0.5
        assert 0.3 < row["relative_error"] < 0.7
    assert error.startswith("error: ") and "expected ternary matrices, but the nearest, model.layers." in error
    assert not list((tmp_path / "out").glob("*"))
