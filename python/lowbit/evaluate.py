"""How good a causal language model is on a text, and how far it is from a reference.

The text is tokenized (`encode`) and cut into consecutive windows of `context` tokens that do not overlap; a
last, shorter window counts if it has at least two tokens. A window is one forward pass from an empty cache.
With p(. | prefix) the softmax of a window's logits in float32:

    perplexity      exp of the mean of -ln p(token i | tokens 0..i-1 of its window), i >= 1. The first token
                    of a window has no prefix and is not scored.
    KL divergence   mean over every position of every window (the last one included, though what it predicts
                    lies outside the window) of sum_v r(v) * (ln r(v) - ln p(v)), r the reference; in nats.
    top-1 agreement the share of the same positions at which both models find the same token likeliest.
    tokens/s        tokens of all windows divided by the seconds that the forward passes took: the speed of
                    reading a prompt, not of generating.

This is the procedure of the GPTQ paper's evaluation (Frantar et al. 2022) with a text and a context of one's
choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

MAX_DEFAULT_CONTEXT = 2048
_CHUNK_ELEMENTS = 1 << 24  # logits turned into float32 log-probabilities at a time: 64 MB a tensor


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model, and with a reference (else None) of both and of the distance between them."""

    perplexity: float
    tokens: int  # scored
    positions: int  # compared by KL divergence and agreement
    windows: int
    context: int
    bytes: int
    tokens_per_second: float
    reference_perplexity: float | None = None
    reference_bytes: int | None = None
    reference_tokens_per_second: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_context(model: torch.nn.Module) -> int:
    """The longest context of the model's configuration, at most MAX_DEFAULT_CONTEXT."""
    longest = getattr(_text_config(model), "max_position_embeddings", None)
    return min(longest, MAX_DEFAULT_CONTEXT) if longest else MAX_DEFAULT_CONTEXT


def _text_config(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters and saved buffers; a storage shared by several counts once."""
    storages = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor):
            storages[tensor.device, tensor.data_ptr()] = max(
                tensor.nbytes, storages.get((tensor.device, tensor.data_ptr()), 0)
            )
    return sum(storages.values())


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """The contents of UTF-8 text files, in order. FileNotFoundError; ValueError: not UTF-8."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
            ) from None
    return texts


def encode(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids int64 [T] of the texts one after another, each with the special tokens its tokenizer adds."""
    ids: list[int] = []
    for text in texts:
        # verbose=False: a text longer than the model's context is what we cut into windows, not a mistake.
        ids += tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(token_ids: torch.Tensor, context: int) -> list[torch.Tensor]:
    """Consecutive windows of `context` tokens, the last of at least 2. ValueError: fewer than 2 tokens."""
    if context < 2:
        raise ValueError(f"context: expected at least 2 tokens, got {context}")
    if token_ids.ndim != 1 or token_ids.numel() < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {token_ids.numel()}")
    return [window for window in token_ids.split(context) if window.numel() >= 2]


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    *,
    reference: torch.nn.Module | None = None,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` on token_ids int64 [T] and, with a reference, the distance between the two (see
    above).

    model(ids [1, n]).logits is [1, n, vocabulary]. context: tokens a window, None: default_context(model).
    progress(done, windows) is called after every window. ValueError: fewer than two tokens, a token outside
    the vocabulary, or a reference with another vocabulary.
    """
    context = default_context(model) if context is None else context
    pieces = windows(token_ids, context)
    # The embedding would say "index out of range in self".
    vocabulary = getattr(_text_config(model), "vocab_size", None)
    if vocabulary is not None and token_ids.max() >= vocabulary:
        raise ValueError(f"token: expected an id below the vocabulary's {vocabulary}, got {int(token_ids.max())}")
    was_training = [(m, m.training) for m in (model, reference) if m is not None]
    for module, _ in was_training:
        module.eval()
    try:
        total = Totals()
        for done, ids in enumerate(pieces, 1):
            logits, seconds = forward(model, ids)
            reference_logits, reference_seconds = forward(reference, ids) if reference is not None else (None, 0.0)
            total.add(ids.to(logits.device), logits, reference_logits)
            total.seconds += seconds
            total.reference_seconds += reference_seconds
            if progress:
                progress(done, len(pieces))
    finally:
        for module, mode in was_training:
            module.train(mode)

    figures: dict[str, Any] = {}
    if reference is not None:
        figures = {
            "reference_perplexity": total.reference_perplexity,
            "reference_bytes": model_bytes(reference),
            "reference_tokens_per_second": total.positions / total.reference_seconds,
            "kl_divergence": total.kl_divergence,
            "top1_agreement": total.top1_agreement,
        }
    return Evaluation(
        perplexity=total.perplexity,
        tokens=total.tokens,
        positions=total.positions,
        windows=len(pieces),
        context=context,
        bytes=model_bytes(model),
        tokens_per_second=total.positions / total.seconds,
        **figures,
    )


class Totals:
    """Sums over windows, in Python floats (float64)."""

    def __init__(self) -> None:
        self.tokens = self.positions = self.agreed = 0
        self.nll = self.reference_nll = self.kl = self.seconds = self.reference_seconds = 0.0

    def add(self, ids: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor | None) -> None:
        """ids [n], logits and reference [n, vocabulary] in any float dtype."""
        vocabulary = logits.shape[1]
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(f"reference: expected a vocabulary of {vocabulary}, got {reference.shape[1]}")
        self.tokens += ids.numel() - 1
        self.positions += ids.numel()
        rows = max(1, _CHUNK_ELEMENTS // vocabulary)
        for begin in range(0, ids.numel(), rows):
            part = slice(begin, begin + rows)
            targets = ids[begin + 1 : begin + rows + 1]
            log_p = logits[part].float().log_softmax(-1)
            self.nll += _nll(log_p, targets)
            if reference is not None:
                log_r = reference[part].to(logits.device).float().log_softmax(-1)
                self.reference_nll += _nll(log_r, targets)
                r = log_r.exp()
                # A token that the reference excludes (probability 0) adds nothing, whatever the model says of
                # it.
                terms = torch.where(r > 0, r * (log_r - log_p), torch.zeros((), device=r.device))
                terms = torch.where(r.isnan(), r, terms)
                self.kl += terms.sum(-1).double().sum().item()
                self.agreed += int((log_p.argmax(-1) == log_r.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / self.tokens)

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_nll / self.tokens)

    @property
    def kl_divergence(self) -> float:
        return self.kl / self.positions

    @property
    def top1_agreement(self) -> float:
        return self.agreed / self.positions


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    scored = log_probabilities[: targets.numel()]
    return -scored.gather(1, targets[:, None]).double().sum().item()


def forward(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits [n, vocabulary] of one window and the seconds it took."""
    device = next(chain(model.parameters(), model.buffers())).device
    batch = ids[None].to(device)
    start = time.perf_counter()
    logits = model(batch, use_cache=False).logits[0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return logits, time.perf_counter() - start


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
