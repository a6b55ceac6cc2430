"""Perplexity, KL divergence and agreement against their definitions, computed by NumPy in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowbit import evaluate as ev
from lowbit import sample_text


class TableModel(torch.nn.Module):
    """Logits that depend on a token and its place in the window alone: table[token] + place * slope."""

    def __init__(self, vocabulary=11, seed=0, dtype=torch.float32, max_position_embeddings=16):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(3 * torch.randn(vocabulary, vocabulary, generator=generator, dtype=dtype))
        self.register_buffer("slope", torch.randn(vocabulary, generator=generator, dtype=dtype) / 5)
        self.config = SimpleNamespace(max_position_embeddings=max_position_embeddings, vocab_size=vocabulary)
        self.seen = []

    def forward(self, ids, use_cache):
        assert ids.ndim == 2 and ids.shape[0] == 1 and not use_cache
        self.seen.append(ids[0].tolist())
        place = torch.arange(ids.shape[1], dtype=self.table.dtype)[:, None]
        return SimpleNamespace(logits=(self.table[ids[0]] + place * self.slope)[None])


def expected(model, ids, context):
    """(nll of scored tokens, log-probabilities at every position) straight from the definition."""
    table, slope = (t.detach().double().numpy() for t in (model.table, model.slope))
    nll, log_probabilities = [], []
    for begin in range(0, len(ids), context):
        window = ids[begin : begin + context]
        if len(window) < 2:
            continue
        for place, token in enumerate(window):
            logits = table[token] + place * slope
            log_p = logits - np.log(np.exp(logits).sum())
            log_probabilities.append(log_p)
            if place + 1 < len(window):
                nll.append(-log_p[window[place + 1]])
    return np.array(nll), np.array(log_probabilities)


@pytest.mark.parametrize("tokens, context", [(2, 2), (7, 7), (7, 16), (20, 5), (21, 5), (22, 5), (33, 16)])
def test_figures_are_their_definition(tokens, context):
    model, reference = TableModel(seed=1), TableModel(seed=2)
    ids = torch.randint(11, (tokens,), generator=torch.Generator().manual_seed(tokens))
    got = ev.evaluate(model, ids, reference=reference, context=context)
    nll, log_p = expected(model, ids.tolist(), context)
    reference_nll, log_r = expected(reference, ids.tolist(), context)
    assert got.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert got.reference_perplexity == pytest.approx(np.exp(reference_nll.mean()), rel=1e-5)
    assert got.kl_divergence == pytest.approx((np.exp(log_r) * (log_r - log_p)).sum(1).mean(), rel=1e-5)
    assert got.top1_agreement == (log_p.argmax(1) == log_r.argmax(1)).mean()
    assert (got.tokens, got.positions, got.context) == (len(nll), len(log_p), context)
    assert got.tokens_per_second > 0 and got.reference_tokens_per_second > 0


def test_pieces_of_a_window_add_up(monkeypatch):
    model, reference = TableModel(seed=1), TableModel(seed=2)
    ids = torch.randint(11, (23,), generator=torch.Generator().manual_seed(0))
    whole = ev.evaluate(model, ids, reference=reference, context=10)
    monkeypatch.setattr(ev, "_CHUNK_ELEMENTS", 33)  # three positions at a time
    pieces = ev.evaluate(model, ids, reference=reference, context=10)
    assert pieces.tokens == whole.tokens
    for name in ("perplexity", "reference_perplexity", "kl_divergence", "top1_agreement"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_a_model_against_itself():
    model = TableModel()
    got = ev.evaluate(model, torch.arange(11), reference=model)
    assert got.kl_divergence == 0
    assert got.top1_agreement == 1
    assert got.perplexity == got.reference_perplexity


def test_without_a_reference_there_are_no_distances():
    got = ev.evaluate(TableModel(), torch.arange(11))
    assert got.reference_perplexity is got.kl_divergence is got.top1_agreement is None
    assert set(got.to_dict()) >= {"perplexity", "reference_perplexity", "kl_divergence", "bytes", "context"}


def test_windows_do_not_overlap_and_a_single_last_token_is_left_out():
    model = TableModel()
    ev.evaluate(model, torch.tensor([0, 1, 2, 3, 4, 5, 6]), context=3)
    assert model.seen == [[0, 1, 2], [3, 4, 5]]


def test_half_precision_logits_are_compared_in_float32():
    model = TableModel(dtype=torch.bfloat16)
    got = ev.evaluate(model, torch.arange(11))
    nll, _ = expected(model, list(range(11)), 16)
    assert got.perplexity == pytest.approx(np.exp(nll.mean()), rel=2e-2)


def test_a_token_that_the_reference_excludes_adds_nothing():
    model, reference = TableModel(), TableModel()
    with torch.no_grad():
        reference.table[:, 3] = -torch.inf
        model.table[:, 3] = -torch.inf
    got = ev.evaluate(model, torch.tensor([0, 1, 2, 4]), reference=reference)
    assert got.kl_divergence == 0


def test_broken_logits_are_not_hidden():
    model, reference = TableModel(), TableModel()
    with torch.no_grad():
        model.table[2, 0] = torch.nan
    got = ev.evaluate(model, torch.arange(5), reference=reference)
    assert np.isnan(got.perplexity) and np.isnan(got.kl_divergence) and np.isfinite(got.reference_perplexity)


def test_training_mode_comes_back():
    model = TableModel().train()
    ev.evaluate(model, torch.arange(4))
    assert model.training
    with pytest.raises(ValueError, match="reference"):
        ev.evaluate(model, torch.arange(4), reference=TableModel(vocabulary=12))
    assert model.training


def test_progress_reports_every_window():
    seen = []
    ev.evaluate(TableModel(), torch.zeros(10, dtype=torch.int64), context=4, progress=lambda *p: seen.append(p))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "ids, context, message",
    [
        ([1], 4, "text: expected at least 2 tokens, got 1"),
        ([], 4, "text: expected at least 2 tokens, got 0"),
        ([1, 2], 1, "context: expected at least 2 tokens, got 1"),
        ([1, 11], 4, "token: expected an id below the vocabulary's 11, got 11"),
    ],
)
def test_bad_input_is_named(ids, context, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(TableModel(), torch.tensor(ids, dtype=torch.int64), context=context)


def test_a_reference_with_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="reference: expected a vocabulary of 11, got 12"):
        ev.evaluate(TableModel(), torch.arange(4), reference=TableModel(vocabulary=12))


def test_default_context():
    assert ev.default_context(TableModel(max_position_embeddings=64)) == 64
    assert ev.default_context(TableModel(max_position_embeddings=131072)) == 2048
    assert ev.default_context(torch.nn.Linear(1, 1)) == 2048


def test_model_bytes_counts_a_shared_table_once():
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(10, 4), "head": torch.nn.Linear(4, 10, bias=False)})
    assert ev.model_bytes(tied) == 2 * 10 * 4 * 4
    tied["head"].weight = tied["embed"].weight
    assert ev.model_bytes(tied) == 10 * 4 * 4


def test_texts_are_read_as_utf8(tmp_path):
    (tmp_path / "a").write_text("é", "utf-8")
    (tmp_path / "b").write_bytes(b"ab\xff")
    assert ev.read_texts([tmp_path / "a"]) == ["é"]
    with pytest.raises(ValueError, match="expected UTF-8 text, got byte 0xff at 2"):
        ev.read_texts([tmp_path / "b"])
    with pytest.raises(FileNotFoundError):
        ev.read_texts([tmp_path / "missing"])


def test_encode_joins_the_texts():
    def tokenizer(text, verbose):
        return {"input_ids": [0, *map(ord, text)]}

    assert ev.encode(tokenizer, ["ab", "c"]).tolist() == [0, 97, 98, 0, 99]


@pytest.mark.parametrize("texts", [sample_text.calibration_text, sample_text.evaluation_text])
def test_sample_texts_have_the_length_asked_for(texts):
    assert sum(map(len, texts(70_000))) == 70_000
    assert sum(map(len, texts(10))) == 10
    assert texts(5000) == texts(5000)


def test_calibration_and_evaluation_samples_are_different_modules():
    assert not set(sample_text.CALIBRATION_MODULES) & set(sample_text.EVALUATION_MODULES)
