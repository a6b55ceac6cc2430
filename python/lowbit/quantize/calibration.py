"""Calibration data: whatever the user has, as windows of token ids.

All texts or sequences are joined into one stream of tokens in the order given, with no special tokens added,
and the stream is cut into windows of equal length that do not overlap; the rest is dropped. Equal windows
need no padding and no attention mask. The same data give the same windows on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

TEXT_SUFFIXES = (".md", ".py", ".txt")


def token_windows(
    data: Any,
    tokenizer: Any = None,
    *,
    context: int,
    vocab_size: int | None = None,
    max_windows: int | None = None,
) -> torch.Tensor:
    """Calibration windows int64 [windows, context]; of fewer tokens when the data have fewer than one window.

    data is one of
      - a path (str or Path) to a text file, or to a folder: its .md, .py and .txt files at any depth, sorted
      by path
      - a list of texts
      - token ids: a tensor [T] or [n, T] of integers, a list of ids, or a list of such lists or tensors
      - rows with a column "input_ids" or "text": a Hugging Face dataset, or any mapping or list of mappings
    tokenizer: one of transformers or tokenizers; needed for text. vocab_size: ids must be below it.
    max_windows: stop after so many; the rest of the data is not read.

    ValueError: no tokens, an id outside the vocabulary, text without a tokenizer, a context below 2.
    TypeError: data of another type. FileNotFoundError: no such path.
    """
    for name, value, least in (("context", context, 2), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    wanted = None if max_windows is None else max_windows * context
    pieces, count = [], 0
    for ids in _sequences(data, tokenizer):
        _check_ids(ids, vocab_size)
        pieces.append(ids)
        count += ids.numel()
        if wanted is not None and count >= wanted:
            break
    if count < 2:
        raise ValueError(f"calibration: expected at least 2 tokens, got {count}")
    stream = torch.cat(pieces)[:wanted]
    length = min(context, stream.numel())
    windows = stream.numel() // length
    return stream[: windows * length].view(windows, length)


def _sequences(data: Any, tokenizer: Any) -> Iterator[torch.Tensor]:
    """The data's token sequences, int64 [length] each, one at a time."""
    if isinstance(data, str | Path):
        for path in _text_files(Path(data)):
            yield _encode(path.read_text("utf-8", errors="replace"), tokenizer)
    elif isinstance(data, torch.Tensor):
        if data.ndim not in (1, 2):
            raise ValueError(f"calibration: expected token ids of 1 or 2 dimensions, got {tuple(data.shape)}")
        yield _ids(data).flatten()
    elif isinstance(data, Mapping):
        yield from _sequences([data], tokenizer)
    elif not isinstance(data, Iterable):
        raise TypeError(f"calibration: expected texts, token ids, a path or a dataset, got {type(data).__name__}")
    elif isinstance(data, list | tuple) and data and all(_is_int(item) for item in data):
        yield _ids(data)
    else:
        if (columns := getattr(data, "column_names", None)) is not None:
            _check_columns(columns)
        for item in data:
            if isinstance(item, Mapping):
                _check_columns(item)
                item = item["input_ids"] if "input_ids" in item else item["text"]
            if isinstance(item, str):
                yield _encode(item, tokenizer)
            elif isinstance(item, torch.Tensor | list | tuple):
                yield _ids(item).flatten()
            else:
                raise TypeError(f"calibration: expected texts or lists of token ids, got a {type(item).__name__}")


def _check_columns(names: Iterable[str]) -> None:
    if not {"text", "input_ids"} & set(names):
        raise ValueError(f"calibration: expected a column named input_ids or text, got {', '.join(names)}")


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"calibration: no file or folder {str(path)!r} (texts are given as a list)")
    if path.is_file():
        return [path]
    files = [p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()]
    if not files:
        raise ValueError(f"calibration: no {', '.join(TEXT_SUFFIXES)} file in {str(path)!r}")
    return sorted(files, key=lambda p: p.relative_to(path).parts)


def _encode(text: str, tokenizer: Any) -> torch.Tensor:
    if tokenizer is None:
        raise ValueError("calibration: text needs a tokenizer, got None")
    if callable(tokenizer):
        # verbose=False: a text longer than the model's context is what windows are for.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    elif hasattr(tokenizer, "encode"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        raise TypeError(f"tokenizer: expected one of transformers or tokenizers, got {type(tokenizer).__name__}")
    return torch.tensor(ids, dtype=torch.int64)


def _ids(values: Any) -> torch.Tensor:
    if isinstance(values, list | tuple):
        if not all(_is_int(v) for v in values):
            raise TypeError("calibration: expected token ids to be integers")
        values = torch.tensor(values, dtype=torch.int64)
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"calibration: expected token ids to be integers, got {values.dtype}")
    return values.detach().to("cpu", torch.int64)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ids(ids: torch.Tensor, vocab_size: int | None) -> None:
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = f"[0, {vocab_size})" if vocab_size is not None else "[0, ...)"
        raise ValueError(f"calibration: expected token ids in {limit}, got {low if low < 0 else high}")
