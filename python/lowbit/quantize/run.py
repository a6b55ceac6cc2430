"""Quantizes a model in place, block by block.

    embeddings                     rounded to nearest
    modules before the blocks      \\
    block 0: stage, stage, ...      | calibrated on what the quantized modules before them give
    block 1: ...                    |
    modules after them, the head   /
    what calibration never reached rounded to nearest, with the reason recorded

A block's modules form stages in order of execution; modules that read the same tensor (query, key and value,
gate and up) share one Hessian and one stage. Beside the model, memory holds one block's activations for all
calibration windows, in the model's dtype, and the Hessians of one stage. Every figure is a function of the
model, the windows and the recipe.

With a correction the original network runs beside the quantized one, block by block: its activations are held as
well, and the weights of one block as they were.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.matrix import PackedMatrix
from lowbit.models import find_blocks, find_targets, patch, replace_module, weight_matrix
from lowbit.nn import TernaryLinear
from lowbit.quantize.calibration import token_windows
from lowbit.quantize.correction import LEAST_TOKENS, Drift, LeastSquares
from lowbit.quantize.gptq import Factor, prepare_factor, solve
from lowbit.quantize.hessian import Hessian
from lowbit.quantize.plan import Plan, PlannedModule, make_plan
from lowbit.quantize.progress import Progress
from lowbit.quantize.recipe import Recipe
from lowbit.quantize.replay import Replay, hooks, stop, survey, until_stop

MAX_DEFAULT_CONTEXT = 2048
_BATCH_TOKENS = 4096  # of a batch by default: enough rows for a matrix product to run at its full speed


@dataclass
class Report:
    """What a run did, in plain values.

    modules: one dict a packed matrix, in order of packing: name, names (all modules that share it), kind, shape
        [rows, cols], format, group_size, bits_per_weight, method, relative_error and its `error_of`: "output", the
        root of tr(dW H dWt) / tr(W H Wt), W being the corrected weights where there was a correction, or "weight",
        |dW| / |W| where there was no calibration; tokens, damp and loss (None without calibration), correction (the one
        made, or "none: " and the reason, or None when none was wanted), seconds, fallback (None, or what was done
        otherwise than asked, and why). A figure that is no finite number is None
    kept: one dict a matrix left as it was: name, names, kind, shape, reason
    unpatched: parameters with two or more dimensions that no module above holds (fused experts): name, shape
    calibration: windows, context and tokens, or None
    """

    recipe: dict[str, Any]
    modules: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    unpatched: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, int] | None = None
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
    NotImplementedError: a model that is not on the CPU. Numbers never raise: a matrix that cannot be solved is rounded
    to nearest, and its row says why.
    """
    start = time.monotonic()
    recipe = Recipe() if recipe is None else recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    progress = progress if progress is not None else Progress()
    if devices := {p.device.type for p in model.parameters()} - {"cpu"}:
        raise NotImplementedError(f"model: expected all parameters on the CPU, got {', '.join(sorted(devices))}")
    plan = make_plan(model, recipe)
    windows = None
    if any(m.spec.method == "gptq" for m in plan.quantized):
        if calibration is None:
            raise ValueError("calibration: expected data, got None (only method='rtn' needs none)")
        windows = token_windows(
            calibration,
            tokenizer,
            context=_default_context(model, calibration) if context is None else context,
            vocab_size=_vocabulary(model),
            max_windows=max_windows,
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")

    report = _new_report(model, recipe, plan, windows)
    progress.on_plan(plan)
    run = _Run(model, recipe, plan, windows, batch_size, report, progress)
    # Not inference_mode here: tensors made in it could not be used in training afterwards.
    with torch.no_grad(), _calibration_mode(model):
        run.everything()
    report.packed_parameter_bytes -= sum(m.packed_bytes for m in plan.quantized) - run.packed_bytes
    report.seconds = time.monotonic() - start
    model._lowbit_report = report
    progress.on_done(report)
    return report


class _Run:
    """One run's state: what is still to be packed, and how to reach it."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: Plan,
        windows: torch.Tensor | None,
        batch_size: int | None,
        report: Report,
        progress: Progress,
    ) -> None:
        self.model, self.recipe, self.report, self.progress = model, recipe, report, progress
        self.left = {m.name: m for m in plan.quantized}
        # What was packed of blocks that are not done, by name, while the original network runs beside.
        self.originals: dict[str, nn.Module] | None = None
        self.packed_bytes = 0
        self.batches: tuple[torch.Tensor, ...] = ()
        if windows is not None:
            size = max(1, _BATCH_TOKENS // windows.shape[1]) if batch_size is None else batch_size
            self.batches = windows.split(size)
        self._call, self._options = _forward_call(model)

    def everything(self) -> None:
        if self.batches:
            self.calibrated()
        self.tables()
        reason = "calibration reached no token of it"
        self.round_to_nearest([m for m in self.left.values() if m.spec.method != "gptq"], None)
        self.round_to_nearest(list(self.left.values()), reason)

    def tables(self) -> None:
        self.round_to_nearest([m for m in self.left.values() if m.is_table], None)

    def calibrated(self) -> None:
        """Everything that a forward pass of the model reaches."""
        # A model without blocks is one block.
        blocks = find_blocks(self.model) or {"": self.model}
        inside = {name: self._inside(name) for name in blocks}
        planned_inside = {m for names in inside.values() for m in names}
        outside = [name for name, m in self.left.items() if name not in planned_inside and not m.is_table]
        seen = survey(self.short_forward, blocks, {name: self.model.get_submodule(name) for name in outside})
        outside += [name for block in blocks if block in seen.repeated for name in inside[block]]

        order = {name: i for i, name in enumerate(seen.order)}
        first_block = min((order[name] for name in blocks if name in order), default=0)
        before = [n for n in outside if order.get(n, first_block) < first_block]
        segments = [segment.until(lambda step: bool(inside[step.name])) for segment in seen.segments]
        segments = [segment for segment in segments if segment.steps]
        # The original network's inputs are taken before anything of it is packed.
        batches = len(self.batches)
        corrected = (
            any(_corrects(m) for m in self.left.values()) and sum(map(torch.numel, self.batches)) >= LEAST_TOKENS
        )
        originals = [Replay(self.short_forward, s, batches) if corrected else None for s in segments]
        self.tables()
        self.outside_blocks(before)

        total = sum(len(segment.steps) for segment in segments)
        index = 0
        for segment, original in zip(segments, originals, strict=True):
            replay = Replay(self.short_forward, segment, batches)
            self.originals = {} if original else None
            for i, step in enumerate(segment.steps):
                self.progress.on_block_start(index, total, step.name)
                self.stages(partial(replay.run, i), inside[step.name], original=original and partial(original.run, i))
                replay.advance(i)
                if original:
                    with self._as_they_were():
                        original.advance(i)
                    done = _prefix(step.name)
                    self.originals = {n: m for n, m in self.originals.items() if not n.startswith(done)}
                self.progress.on_block_end(index, total, step.name)
                index += 1
        self.originals = None
        self.outside_blocks([n for n in outside if n in self.left])

    def outside_blocks(self, names: list[str]) -> None:
        """Packs modules that are reached only by running the whole model."""
        self.stages(self.forward, names, self.short_forward)

    def stages(
        self,
        forward: Callable[[int], object],
        names: list[str],
        discover: Callable[[int], object] | None = None,
        original: Callable[[int], object] | None = None,
    ) -> None:
        """Packs some modules stage by stage. forward(batch) reaches them; discover is a cheaper forward pass
        that shows which of them share an input; original(batch) is forward on the original network's inputs."""
        self.round_to_nearest([self.left[n] for n in names if self.left[n].spec.method != "gptq"], None)
        modules = {name: self.model.get_submodule(name) for name in names if name in self.left}
        if not modules:
            return
        groups, repeated = _shared_inputs(discover or forward, len(self.batches), modules)
        for stage in self._stages(groups) if self.recipe.true_sequential else [groups]:
            # Nothing after the only input that is wanted has to run.
            early = len(stage) == 1 and stage[0][0] not in repeated
            drifts = self._drifts(stage) if original else {}
            hessians = self._hessians(forward, stage, modules, early, original, drifts)
            for group in stage:
                self._solve(group, hessians.pop(group[0]), drifts.pop(group[0], None))

    def round_to_nearest(self, modules: list[PlannedModule], reason: str | None) -> None:
        for planned in modules:
            begin, spec = time.monotonic(), planned.spec
            module = self.model.get_submodule(planned.name)
            weight, mended = _finite(weight_matrix(module))
            if isinstance(module, TernaryLinear) and not mended:
                weight, packed = module.quantized_weight(), module.pack()
            else:
                packed = PackedMatrix.from_float(
                    weight,
                    spec.format,
                    spec.group_size_for(planned.shape[1]),
                    symmetric=spec.symmetric,
                    scale_dtype=getattr(torch, spec.scale_dtype),
                    clip=spec.clip,
                    per_tensor=spec.per_tensor,
                )
            figures = {
                "method": "rtn" if spec.method == "gptq" else spec.method,
                "relative_error": _relative_weight_error(weight, packed),
                "error_of": "weight",
                "fallback": _joined(mended, reason),
            }
            self._pack(planned, packed, figures, time.monotonic() - begin)

    @torch.inference_mode()
    def forward(self, batch: int) -> object:
        """The whole model on one batch."""
        return self._call(self.batches[batch])

    @torch.inference_mode()
    def short_forward(self, batch: int) -> object:
        """The same with logits of the last position only, where the model can: logits are not what is
        wanted."""
        return self._call(self.batches[batch], **self._options)

    def _solve(self, group: list[str], hessian: Hessian, drift: Drift | None) -> None:
        """Packs the modules that share a Hessian; those with the same options share its factor too."""
        matrix = hessian.matrix
        factors: dict[tuple, Factor] = {}
        wanted = [name for name in group if _corrects(self.left[name])]
        correct, obstacle = _correction(matrix, hessian.tokens, drift) if wanted else (None, None)
        for name in group:
            begin, planned = time.monotonic(), self.left[name]
            spec, group_size = planned.spec, planned.spec.group_size_for(planned.shape[1])
            options = (spec.damp, spec.order, group_size)
            if options not in factors:
                factors[options] = prepare_factor(matrix, damp=spec.damp, order=spec.order, group_size=group_size)
            weight, mended = _finite(weight_matrix(self.model.get_submodule(name)))
            correction = uncorrected = None
            if name in wanted and correct is not None:
                weight, correction = correct(weight), "least_squares"
            elif name in wanted:
                correction = f"none: {obstacle}"
                uncorrected = f"not corrected: {obstacle}" if spec.correction is not None else None
            solution = solve(
                weight,
                matrix,
                format=spec.format,
                group_size=group_size,
                symmetric=spec.symmetric,
                clip=spec.clip,
                order=spec.order,
                grids=spec.grids,
                damp=spec.damp,
                scale_dtype=getattr(torch, spec.scale_dtype),
                factor=factors[options],
            )
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
        if self.originals is not None:
            self.originals |= {name: self.model.get_submodule(name) for name in planned.names}
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
            "correction": None,
            "seconds": seconds,
            "fallback": None,
        }
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self.report.modules.append(row | figures)
        self.progress.on_module(self.report.modules[-1])

    def _inside(self, block: str) -> list[str]:
        return [name for name in self.left if name.startswith(_prefix(block))]

    def _stages(self, groups: list[list[str]]) -> list[list[list[str]]]:
        """Groups in stages, in order of execution. The same layer of sibling experts is one stage, or a block
        of many experts would be run once for each of them."""
        stages: dict[str, list[list[str]]] = {}
        for group in groups:
            stages.setdefault(self._without_list_indices(group[0]), []).append(group)
        return list(stages.values())

    def _without_list_indices(self, name: str) -> str:
        parts = name.split(".")
        lists = [isinstance(self.model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(len(parts))]
        return ".".join("*" if inside else part for part, inside in zip(parts, lists, strict=True))

    def _hessians(
        self,
        forward: Callable[[int], object],
        stage: list[list[str]],
        modules: dict[str, nn.Module],
        stop_early: bool,
        original: Callable[[int], object] | None,
        drifts: dict[str, Drift],
    ) -> dict[str, Hessian]:
        """The Hessian of every group of a stage, by the name of its first module; fills the drifts, too."""
        hessians = {group[0]: Hessian(self.left[group[0]].shape[1]) for group in stage}
        for batch, ids in enumerate(self.batches):
            before: dict[str, torch.Tensor] = {}

            def keep(name: str, x: torch.Tensor, before=before) -> None:
                before[name] = x.clone()  # a model may go on to change its tensors in place

            if drifts:
                with self._as_they_were():
                    _each_input(original, batch, {name: modules[name] for name in drifts}, keep, stop_early)

            def add(name: str, x: torch.Tensor, before=before, ids=ids) -> None:
                if x.numel():
                    hessians[name].add(x)
                # Rows are paired by position, so a module must read all tokens: experts do not.
                then = before.pop(name, None)
                if then is not None and then.shape == x.shape and x[..., 0].numel() == ids.numel():
                    drifts[name].add(then, x)

            _each_input(forward, batch, {name: modules[name] for name in hessians}, add, stop_early)
        return hessians

    def _drifts(self, stage: list[list[str]]) -> dict[str, Drift]:
        """An empty drift for every group of a stage with a module to correct."""
        wanted = [group for group in stage if any(_corrects(self.left[name]) for name in group)]
        return {group[0]: Drift(self.left[group[0]].shape[1]) for group in wanted}

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        """For a while, what has been packed of the current block as it was."""
        originals = self.originals or {}
        packed = {name: self.model.get_submodule(name) for name in originals}
        for name, module in originals.items():
            replace_module(self.model, name, module)
        try:
            yield
        finally:
            for name, module in packed.items():
                replace_module(self.model, name, module)


def _each_input(
    forward: Callable[[int], object],
    batch: int,
    modules: dict[str, nn.Module],
    take: Callable[[str, torch.Tensor], object],
    stop_early: bool,
) -> None:
    """Runs one batch and gives take(name, input) each input of some modules; stop_early: of the first call alone."""

    def hook(name: str):
        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            take(name, _input(args, kwargs))
            if stop_early:
                stop()

        return before

    with hooks() as add:
        for name, module in modules.items():
            add(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        until_stop(forward, batch)


def _shared_inputs(
    forward: Callable[[int], object], batches: int, modules: dict[str, nn.Module]
) -> tuple[list[list[str]], set[str]]:
    """Modules grouped by the tensor that they read, groups in order of execution, and the modules that read several
    tensors in one forward pass, each a group of its own. Modules that are never reached are in no group; batches
    are run until all have been (experts) or there are no more."""
    groups: list[list[str]] = []
    repeated: set[str] = set()
    missing = set(modules)
    for batch in range(batches):
        # The inputs stay alive until the batch is through, so that no address is met twice.
        calls: dict[tuple, tuple[torch.Tensor, list[str]]] = {}

        def note(name: str, calls=calls):
            def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _input(args, kwargs)
                if x.numel():
                    calls.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

            return hook

        with hooks() as add:
            for name, module in modules.items():
                add(module.register_forward_pre_hook(note(name), with_kwargs=True))
            forward(batch)
        readers = [names for _, names in calls.values()]
        counts = Counter(name for names in readers for name in names)
        repeated |= {name for name, count in counts.items() if count > 1}
        for names in readers:
            new = [name for name in dict.fromkeys(names) if name in missing]
            alone = [[name] for name in new if name in repeated]
            shared = [name for name in new if name not in repeated]
            groups += [*([shared] if shared else []), *alone]
            missing -= set(new)
        if not missing:
            break
    return groups, repeated


def _prefix(block: str) -> str:
    """What the names of the modules in a block begin with; a model without blocks is the block ""."""
    return f"{block}." if block else ""


def _corrects(planned: PlannedModule) -> bool:
    return planned.spec is not None and planned.spec.method == "gptq" and planned.spec.correction != "none"


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


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _finite(weight: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """A weight matrix [rows, cols] as the packers take it, and what had to be done to it: numbers that are
    infinite or none have no code nearest to them."""
    weight = weight.contiguous()
    bad = weight.numel() - int(weight.isfinite().sum())
    return (weight.nan_to_num(0.0, 0.0, 0.0), f"{bad} weights are not finite, taken as 0") if bad else (weight, None)


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(r for r in reasons if r) or None


def _relative_weight_error(weight: torch.Tensor, packed: PackedMatrix) -> float:
    """|packed - weight| / |weight| (Frobenius), some rows at a time."""
    difference = norm = 0.0
    rows = max(1, (1 << 22) // packed.cols)
    for begin in range(0, packed.rows, rows):
        part = slice(begin, min(begin + rows, packed.rows))
        exact = weight[part].double()
        difference += float((packed.unpack(rows=part) - exact).square().sum())
        norm += float(exact.square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0


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


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _default_context(model: nn.Module, calibration: Any) -> int:
    if isinstance(calibration, torch.Tensor) and calibration.ndim == 2:
        return calibration.shape[1]
    longest = getattr(_text_config(model), "max_position_embeddings", None) or MAX_DEFAULT_CONTEXT
    # Some models count positions from 2: RoBERTa's 514 hold 512 tokens.
    return min(longest - longest % 8, MAX_DEFAULT_CONTEXT)


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the token embedding, or what the configuration says."""
    tables = [t.shape[0] for t in find_targets(model) if t.is_table and "embedding" in t.kinds]
    return tables[0] if tables else getattr(_text_config(model), "vocab_size", None)


def _forward_call(model: nn.Module) -> tuple[Callable[..., object], dict[str, Any]]:
    """(call of a model on token ids, without cache; options that spare it logits), from its forward's
    signature."""
    parameters = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in parameters else {}
    options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda ids, **more: model(input_ids=ids, decoder_input_ids=ids, **fixed, **more), options
    if "input_ids" in parameters:
        return lambda ids, **more: model(input_ids=ids, **fixed, **more), options
    return lambda ids, **more: model(ids, **fixed, **more), options


@contextmanager
def _calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without caches; as before afterwards."""
    training = {name: m.training for name, m in model.named_modules()}  # by name: modules are replaced meanwhile
    config = getattr(model, "config", None)
    configs = [c for c in {id(c): c for c in (config, _text_config(model))}.values() if hasattr(c, "use_cache")]
    caches = [(c, c.use_cache) for c in configs]
    model.eval()
    for c in configs:
        c.use_cache = False
    try:
        yield
    finally:
        for c, use_cache in caches:
            c.use_cache = use_cache
        for name, mode in training.items():
            model.get_submodule(name).training = mode
