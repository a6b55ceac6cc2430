"""lowbit: low-bit weights for language models. One noun, `PackedMatrix`; four verbs: pack, unpack, matmul, gather."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  first, so that the process has torch's OpenMP runtime and no second one

from lowbit import _C, ops
from lowbit.matrix import PackedMatrix

__version__ = _C.__version__

# Loaded when first used: `import lowbit` for the kernels alone must not pay for transformers.
_LAZY = {
    "Recipe": "lowbit.quantize.recipe",
    "quantize": "lowbit.quantize",
    "load": "lowbit.checkpoint",
    "save": "lowbit.checkpoint",
    "nn": None,
    "models": None,
    "checkpoint": None,
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"lowbit.{name}")
    return getattr(module, name) if _LAZY[name] else module


__all__ = ["PackedMatrix", "Recipe", "__version__", "load", "ops", "quantize", "save"]
