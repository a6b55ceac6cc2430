"""Quantizes a model in place, block by block.

    embeddings                     rounded to nearest
    modules before the blocks      \\
    block 0: stage, stage, ...      | calibrated on what the quantized modules before them give
    block 1: ...                    |
    modules after them, the head   /
    what calibration never reached rounded to nearest, with the reason recorded

How the modules are reached, and what that takes of memory, is told in `walk`. Every figure is a function of the
model, the windows and the recipe.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.matrix import PackedMatrix
from lowbit.models import adopt, find_targets, patch, replaced, weight_matrix
from lowbit.nn import TernaryLinear
from lowbit.quantize.correction import LEAST_TOKENS, Drift, LeastSquares
from lowbit.quantize.gptq import Factor
from lowbit.quantize.hessian import Hessian
from lowbit.quantize.packing import finite, relative_weight_error, rounded, solved
from lowbit.quantize.plan import Plan, PlannedModule, make_plan
from lowbit.quantize.progress import Progress
from lowbit.quantize.recipe import Recipe
from lowbit.quantize.tables import divergence, share_head
from lowbit.quantize.walk import Walk, calibration_mode, calibration_windows, corrects, model_device


@dataclass
class Report:
    """What a run did, in plain values.

    modules: one dict a packed matrix, in order of packing: name, names (all modules that share it), kind, shape
        [rows, cols], format, group_size, bits_per_weight, method, relative_error and its `error_of`: "output", the
        root of tr(dW H dWt) / tr(W H Wt), W being the corrected weights where there was a correction, or "weight",
        |dW| / |W| where there was no calibration; tokens, damp and loss (None without calibration), kl_divergence (of a
        table of embeddings, what it does by itself, on the calibration text; else None), correction (the one made, or
        "none: " and the reason, or None when none was wanted), seconds, fallback (None, or what was done otherwise than
        asked, and why). A figure that is no finite number is None
    kept: one dict a matrix left as it was: name, names, kind, shape, reason
    unpatched: parameters with two or more dimensions that no module above holds (fused experts): name, shape
    calibration: windows, context and tokens, or None
    embed_from_head: KL divergence of the model whose embedding uses the head's table, before anything is quantized, or
        None where it was not asked for
    """

    recipe: dict[str, Any]
    modules: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    unpatched: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, int] | None = None
    embed_from_head: float | None = None
    parameter_bytes: int = 0
    packed_parameter_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: nn.Module,
    calibration: Any = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replaces the matrices of a model by packed ones, as a recipe says, in place.

    model: any module called with token ids int64 [batch, tokens]; a transformers model in float32,
        bfloat16 or float16, which is also the dtype of calibration
    calibration: see `token_windows`; not needed when every module is rounded to nearest
    recipe: a Recipe, a mapping of its fields, or None for the default one
    tokenizer: for calibration by text
    context: tokens a window; default the rows of a two-dimensional tensor of ids, else the model's longest up
        to 2048
    max_windows: calibrate on the first so many only
    batch_size: windows a forward pass
    progress: told what happens, see `Progress`

    A `lowbit.nn.TernaryLinear` that the recipe does not leave is packed as its own forward pass has it, trits, scales
    and activations, whatever width and method the recipe gives.

    Returns the report, which is also kept as `model._lowbit_report` for saving.
    ValueError or TypeError before anything is changed: recipe, rules or data that do not fit the model;
    NotImplementedError: a model that is neither on the CPU nor on one GPU (where its calibration then happens too).
    Numbers never raise: a matrix that cannot be solved is rounded to nearest, and its row says why.
    """
    start = time.monotonic()
    recipe = Recipe() if recipe is None else recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    progress = progress if progress is not None else Progress()
    model_device(model)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    plan = make_plan(model, recipe)
    windows = None
    if recipe.embed_from_head or any(m.spec.method == "gptq" for m in plan.quantized):
        if calibration is None:
            raise ValueError("calibration: expected data, got None (only method='rtn' needs none)")
        windows = calibration_windows(model, calibration, tokenizer, context=context, max_windows=max_windows)
    walk = {"batch_size": batch_size, "true_sequential": recipe.true_sequential, "progress": progress}
    damage = None
    if recipe.embed_from_head:
        with torch.no_grad(), calibration_mode(model):
            before = Walk(model, (), windows, **walk)
            damage = share_head(model, before.forward, before.batches, recipe.embed_bound)
        plan = make_plan(model, recipe)

    report = _new_report(model, recipe, plan, windows)
    report.embed_from_head = damage
    progress.on_plan(plan)
    run = _Run(model, plan.quantized, windows, report=report, **walk)
    # Not inference_mode here: tensors made in it could not be used in training afterwards.
    with torch.no_grad(), calibration_mode(model):
        run.everything()
    adopt(model)
    if "transformers" in sys.modules:
        from lowbit.integrations.transformers import attach

        attach(model)
    report.packed_parameter_bytes -= sum(m.packed_bytes for m in plan.quantized) - run.packed_bytes
    report.seconds = time.monotonic() - start
    model._lowbit_report = report
    progress.on_done(report)
    return report


class _Run(Walk):
    """One run's state: what is still to be packed, and the report on what has been."""

    def __init__(self, *walk: Any, report: Report, **options: Any) -> None:
        super().__init__(*walk, **options)
        self.report = report
        self.packed_bytes = 0

    def everything(self) -> None:
        if self.batches:
            self.calibrated()
        self.tables()
        reason = "calibration reached no token of it"
        self.without_inputs([m for m in self.left.values() if m.spec.method != "gptq"], None)
        self.without_inputs(list(self.left.values()), reason)

    def without_inputs(self, modules: list[PlannedModule], reason: str | None) -> None:
        for planned in modules:
            begin, spec = time.monotonic(), planned.spec
            module = self.model.get_submodule(planned.name)
            weight, mended = finite(weight_matrix(module))
            if isinstance(module, TernaryLinear) and not mended:
                weight, packed = module.quantized_weight(), module.pack()
            else:
                packed = rounded(weight, spec)
            figures = {
                "method": "rtn" if spec.method == "gptq" else spec.method,
                "relative_error": relative_weight_error(weight, packed),
                "error_of": "weight",
                "fallback": _joined(mended, reason),
            }
            self._pack(planned, packed, figures, time.monotonic() - begin)

    def with_inputs(self, group: list[str], hessian: Hessian, drift: Drift | None) -> None:
        """Packs the modules that share a Hessian; those with the same options share its factor too."""
        matrix = hessian.matrix
        factors: dict[tuple, Factor] = {}
        wanted = [name for name in group if corrects(self.left[name])]
        correct, obstacle = _correction(matrix, hessian.tokens, drift) if wanted else (None, None)
        for name in group:
            begin, planned = time.monotonic(), self.left[name]
            spec = planned.spec
            weight, mended = finite(weight_matrix(self.model.get_submodule(name)))
            correction = uncorrected = None
            if name in wanted and correct is not None:
                weight, correction = correct(weight), "least_squares"
            elif name in wanted:
                correction = f"none: {obstacle}"
                uncorrected = f"not corrected: {obstacle}" if spec.correction is not None else None
            solution = solved(weight, spec, matrix, factors)
            figures = {
                "method": "gptq",
                "relative_error": solution.relative_error,
                "error_of": "output",
                "damp": solution.damp,
                "loss": solution.loss,
                "tokens": hessian.tokens,
                "correction": correction,
                "fallback": _joined(mended, uncorrected, solution.fallback),
            }
            self._pack(planned, solution.packed, figures, time.monotonic() - begin)

    def _pack(self, planned: PlannedModule, packed: PackedMatrix, figures: dict[str, Any], seconds: float) -> None:
        replaced_modules = {name: self.model.get_submodule(name) for name in planned.names}
        if self.originals is not None:
            self.originals |= replaced_modules
        patch(self.model, dict.fromkeys(planned.names, packed), activations=planned.spec.activations)
        del self.left[planned.name]
        self.packed_bytes += packed.nbytes
        row = {
            "name": planned.name,
            "names": list(planned.names),
            "kind": planned.kind,
            "shape": list(planned.shape),
            "format": packed.format,
            "group_size": packed.group_size,
            "bits_per_weight": packed.bits_per_weight,
            "method": None,
            "relative_error": None,
            "error_of": None,
            "tokens": 0,
            "damp": None,
            "loss": None,
            "kl_divergence": self._damage(replaced_modules) if planned.is_table else None,
            "correction": None,
            "seconds": seconds,
            "fallback": None,
        }
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self.report.modules.append(row | figures)
        self.progress.on_module(self.report.modules[-1])

    def _damage(self, originals: dict[str, nn.Module]) -> float | None:
        """What one table that was just packed does to the predictions of the network as it is."""

        def reference(batch: int) -> object:
            with replaced(self.model, originals):
                return self.forward(batch)

        return divergence(self.forward, reference, self.batches)


def _correction(hessian: torch.Tensor, tokens: int, drift: Drift | None) -> tuple[LeastSquares | None, str | None]:
    """The correction of modules with this Hessian of so many tokens, or None and why there is none."""
    if tokens < LEAST_TOKENS:
        return None, f"{tokens} tokens, fewer than {LEAST_TOKENS}"
    if drift is None:
        return None, "outside the blocks"
    if drift.tokens != tokens:
        return None, "it does not read every token once"
    correct = LeastSquares(hessian, drift.matrix)
    return (correct, None) if correct.lower is not None else (None, "its inputs are zero or not finite")


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(r for r in reasons if r) or None


def _new_report(model: nn.Module, recipe: Recipe, plan: Plan, windows: torch.Tensor | None) -> Report:
    held = {id(t.module.weight) for t in find_targets(model)}
    return Report(
        recipe=recipe.to_dict(),
        kept=[
            {
                "name": m.name,
                "names": list(m.names),
                "kind": m.kind,
                "shape": list(m.shape),
                "reason": m.reason,
            }
            for m in plan.kept
        ],
        unpatched=[
            {"name": name, "shape": list(p.shape)}
            for name, p in model.named_parameters()
            if p.ndim > 1 and id(p) not in held
        ],
        calibration=None
        if windows is None
        else {"windows": windows.shape[0], "context": windows.shape[1], "tokens": windows.numel()},
        parameter_bytes=plan.parameter_bytes,
        packed_parameter_bytes=plan.packed_parameter_bytes,
    )
