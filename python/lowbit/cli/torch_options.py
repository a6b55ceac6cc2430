"""What several commands need of torch and transformers: options turned into dtypes, threads and loaded models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.strict_json import parse_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name. ValueError: not a float type that models run in."""
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def set_threads(threads: int) -> None:
    """Threads of torch's operators and of lowbit's kernels; 0 changes nothing."""
    if threads:
        from lowbit import _C

        torch.set_num_threads(threads)
        _C.set_threads(threads)


def model_folder(name: str) -> Path:
    """The folder of a model: a path, or else the name of a repository on the Hugging Face hub, which is downloaded.

    FileNotFoundError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    # "out/typo" beside an existing "out" is a mistyped path, not a repository.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    raise FileNotFoundError(f"{name}: no such model folder")


def is_quantized(folder: Path) -> bool:
    """Whether the model's configuration says that it holds packed modules."""
    return "quantization_config" in parse_json(folder / "config.json")


def load_model(folder: Path, dtype: str = "auto") -> torch.nn.Module:
    """The causal language model in a folder, packed or plain, ready to run. dtype "auto": as stored."""
    wanted = "auto" if dtype == "auto" else parse_dtype(dtype)
    transformers = quiet_transformers()
    if is_quantized(folder):
        import lowbit

        return lowbit.load(folder, dtype=None if dtype == "auto" else wanted).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder."""
    return quiet_transformers().AutoTokenizer.from_pretrained(folder)


def quiet_transformers() -> Any:
    """The transformers package, without its progress bars and advice: a command prints its own lines.

    NotImplementedError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise NotImplementedError("models need transformers: pip install 'lowbit[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers
