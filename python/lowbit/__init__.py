"""lowbit: low-bit weights for language models.

One noun, `PackedMatrix`; four verbs: pack, unpack, matmul, gather.
"""

from __future__ import annotations

import importlib

# Name -> module it is an attribute of (None: it is the module). Everything is loaded when first used: the
# command line answers --help and --cmakedir without torch, and kernels alone do not pay for transformers. The
# modules that use lowbit._C import torch before it, so that the process has torch's OpenMP runtime and no
# second one.
_LAZY = {
    "PackedMatrix": "lowbit.matrix",
    "matmul_group": "lowbit.matrix",
    "Recipe": "lowbit.quantize.recipe",
    "quantize": "lowbit.quantize",
    "resize_vocabulary": "lowbit.vocabulary",
    "prepare_ternary_training": "lowbit.quantize.training",
    "load": "lowbit.checkpoint",
    "load_weight": "lowbit.checkpoint",
    "save": "lowbit.checkpoint",
    "save_weight": "lowbit.checkpoint",
    "cuda": None,
    "ops": None,
    "nn": None,
    "models": None,
    "checkpoint": None,
}


def __getattr__(name: str):
    if name == "__version__":
        import torch  # noqa: F401  before _C, see above

        from lowbit import _C

        return _C.__version__
    if name not in _LAZY:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"lowbit.{name}")
    return getattr(module, name) if _LAZY[name] else module


__all__ = [
    "PackedMatrix",
    "Recipe",
    "__version__",
    "load",
    "load_weight",
    "matmul_group",
    "ops",
    "prepare_ternary_training",
    "quantize",
    "resize_vocabulary",
    "save",
    "save_weight",
]
