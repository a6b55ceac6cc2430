"""What several commands need of torch and transformers: dtypes, threads and models from options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

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
    """The folder of a model: a path, or else the name of a repository on the Hugging Face hub, which is
    downloaded.

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


def parse_device(name: str) -> torch.device:
    """The device of that name. ValueError: not a CPU or an NVIDIA GPU; NotImplementedError: one that cannot be used."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        from lowbit.doctor import gpu

        if not (facts := gpu())["usable"]:
            raise NotImplementedError(f"device: {name} cannot be used: {facts['state']}")
        if not torch.cuda.is_available():
            raise NotImplementedError(f"device: {name} cannot be used: this torch ({torch.__version__}) finds no GPU")
    return device


def load_model(folder: Path, dtype: str = "auto", ternary: str = "auto", device: str = "cpu") -> torch.nn.Module:
    """The causal language model in a folder, packed or plain, ready to run. dtype "auto": as stored; ternary: see
    lowbit.load; device: where it is to run."""
    wanted, place = None if dtype == "auto" else parse_dtype(dtype), parse_device(device)
    _quiet_transformers()
    import lowbit

    model = lowbit.load(folder, ternary=ternary)
    if wanted is not None:
        _cast(model, wanted)
    return model.to(place)


def load_float_model(folder: Path, dtype: str = "auto", device: str = "cpu") -> torch.nn.Module:
    """The same for a model to be quantized. ValueError: it is quantized already."""
    from lowbit.checkpoint import quantization_config

    described, where = quantization_config(folder)
    if described is not None:
        raise ValueError(f"{where}: expected a model that is not quantized, got {described.get('quant_method')!r}")
    return load_model(folder, dtype, device=device)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder."""
    return _quiet_transformers().AutoTokenizer.from_pretrained(folder)


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts every float parameter. Buffers stay: rotary frequencies need float32, and the scales of packed matrices
    are part of the weights."""
    from lowbit.nn import Embedding

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, Embedding):
            module.dtype = dtype


def _quiet_transformers() -> Any:
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
