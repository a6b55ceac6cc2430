"""Calibration data of every kind become the same windows; what is no token stream is refused by name."""

import pytest
import torch

from lowbit.quantize.calibration import token_windows


class Letters:
    """A tokenizer of transformers' kind: one token a character."""

    def __call__(self, text, *, add_special_tokens, verbose):
        assert add_special_tokens is False and verbose is False
        return {"input_ids": [ord(c) for c in text]}


class Encoding:
    def __init__(self, ids):
        self.ids = ids


class Encoder:
    """A tokenizer of the tokenizers library's kind."""

    def encode(self, text, *, add_special_tokens):
        return Encoding([ord(c) for c in text])


class Dataset:
    """What a Hugging Face dataset looks like from outside."""

    def __init__(self, column, values):
        self.column_names, self._rows = [column, "label"], [{column: v, "label": 0} for v in values]

    def __iter__(self):
        return iter(self._rows)


TEXTS = ["abcd", "ef", "ghijk"]
STREAM = torch.tensor([ord(c) for c in "abcdefghijk"])
WINDOWS = STREAM[:9].view(3, 3)


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        tuple(TEXTS),
        [[ord(c) for c in t] for t in TEXTS],
        [torch.tensor([ord(c) for c in t], dtype=torch.int32) for t in TEXTS],
        STREAM,
        STREAM.tolist(),
        Dataset("text", TEXTS),
        Dataset("input_ids", [[ord(c) for c in t] for t in TEXTS]),
        [{"input_ids": [ord(c) for c in t]} for t in TEXTS],
        [{"text": t} for t in TEXTS],
        {"input_ids": STREAM},
    ],
    ids=[
        "texts",
        "tuple",
        "lists",
        "tensors",
        "tensor",
        "ids",
        "dataset of text",
        "dataset of ids",
        "rows of ids",
        "rows of text",
        "mapping",
    ],
)
def test_every_kind_of_data_gives_the_same_windows(data):
    windows = token_windows(data, Letters(), context=3)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, WINDOWS)


def test_a_tokenizer_of_the_tokenizers_library():
    assert torch.equal(token_windows(TEXTS, Encoder(), context=3), WINDOWS)


def test_rows_of_a_tensor_are_one_stream():
    ids = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert torch.equal(token_windows(ids, context=4), ids.long())
    assert torch.equal(token_windows(ids, context=6), torch.arange(12).view(2, 6))


def test_a_file_and_a_folder_sorted_by_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.py").write_text("cd")
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "c.md").write_text("ef")
    (tmp_path / "d.bin").write_bytes(b"\xff\xff")
    expected = torch.tensor([ord(c) for c in "abcdef"]).view(2, 3)
    assert torch.equal(token_windows(tmp_path, Letters(), context=3), expected)
    assert torch.equal(token_windows(str(tmp_path), Letters(), context=3), expected)
    assert token_windows(tmp_path / "a.txt", Letters(), context=2).tolist() == [[97, 98]]


def test_fewer_tokens_than_a_window_give_one_shorter_window():
    assert token_windows([1, 2, 3], context=8).tolist() == [[1, 2, 3]]


def test_max_windows_reads_no_further():
    def endless():
        while True:
            yield [1, 2, 3]

    assert token_windows(endless(), context=4, max_windows=5).shape == (5, 4)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "expected at least 2 tokens, got 0"),
        ([[]], ValueError, "expected at least 2 tokens, got 0"),
        (torch.empty(0, dtype=torch.int64), ValueError, "at least 2 tokens"),
        ([[1, 2, 300]], ValueError, r"token ids in \[0, 256\), got 300"),
        ([[1, -2]], ValueError, "got -2"),
        ([[1.5, 2.0]], TypeError, "integers"),
        ([[True, False]], TypeError, "integers"),
        (torch.ones(4), TypeError, "integers, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), TypeError, "torch.bool"),
        (torch.ones(1, 2, 3, dtype=torch.int64), ValueError, "1 or 2 dimensions"),
        (7, TypeError, "got int"),
        ([None], TypeError, "NoneType"),
        (["text", 3], TypeError, "got a int"),
        (Dataset("words", ["a"]), ValueError, "column named input_ids or text, got words, label"),
        ({"words": [1]}, ValueError, "input_ids or text, got words"),
    ],
)
def test_what_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        token_windows(data, Letters(), context=4, vocab_size=256)


def test_paths_and_tokenizers_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'a text'"):
        token_windows("a text", Letters(), context=4)
    with pytest.raises(ValueError, match=r"no \.md, \.py, \.txt file"):
        token_windows(tmp_path, Letters(), context=4)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        token_windows(["abc"], context=4)
    with pytest.raises(TypeError, match="tokenizer: expected"):
        token_windows(["abc"], object(), context=4)


@pytest.mark.parametrize(("name", "value"), [("context", 1), ("max_windows", 0)])
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        token_windows([1, 2, 3], **{"context": 2, name: value})
