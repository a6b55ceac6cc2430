"""Quantizing a model: `lowbit.quantize(model, calibration, recipe)` is this package, called.

recipe       what becomes of which module            plan      a recipe applied to a model
calibration  any data as windows of token ids        replay    blocks run one at a time
hessian      what the solver knows of the inputs     gptq      the solver
correction   weights for inputs that have moved      packing   one matrix as its specification says
walk         every matrix taken to its inputs        progress  how far it is
ternary      how ternary a matrix is              training  a model made ready for ternary training
run          the whole of it
sensitivity  what each module loses in each format   allocate  formats under a byte budget
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lowbit.quantize.calibration import token_windows
from lowbit.quantize.plan import Plan, make_plan
from lowbit.quantize.progress import Progress, terminal_progress
from lowbit.quantize.recipe import ModuleSpec, Recipe, parse_rule
from lowbit.quantize.run import Report, quantize
from lowbit.quantize.training import prepare_ternary_training

__all__ = [
    "ModuleSpec",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "make_plan",
    "parse_rule",
    "prepare_ternary_training",
    "quantize",
    "terminal_progress",
    "token_windows",
]


class _CallablePackage(ModuleType):
    """Python binds a package to its name in the parent, so `lowbit.quantize` is the package whenever it is
    loaded; calling it has to be calling the function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
