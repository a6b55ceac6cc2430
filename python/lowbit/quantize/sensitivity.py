"""What every module of a model loses in every format it could have, measured without changing the model.

One calibration pass over the model as it is gives each module its Hessian; every candidate format is then one solve,
and its loss tr(dW H dWt), the squared error of the module's output a token. A table has no solver: it is rounded, and
its loss is that of the rows which the calibration's tokens look up, plus that of the logits where the head shares it.

Groups of modules (all attention, every q_proj) are measured end to end as well: the KL divergence of the logits with
that group alone in a format, everything else as it is. A layer's error knows nothing of what follows it; this does.

Modules that a rule of the recipe names are left out: what a rule says stays.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowbit.evaluate import Totals, forward
from lowbit.matrix import PackedMatrix
from lowbit.models import is_table, patch, replaced, weight_matrix
from lowbit.nn import TernaryLinear
from lowbit.quantize.allocate import Budget, Item, Option, allocate
from lowbit.quantize.correction import Drift
from lowbit.quantize.gptq import Factor, output_energy
from lowbit.quantize.hessian import Hessian
from lowbit.quantize.packing import finite, rounded, solved
from lowbit.quantize.plan import Plan, PlannedModule, make_plan
from lowbit.quantize.progress import Progress
from lowbit.quantize.recipe import ModuleSpec, Recipe, parse_change
from lowbit.quantize.walk import Walk, calibration_mode, calibration_windows, model_device
from lowbit.report import split_names

FORMATS = ("trit", "2", "3", "4", "8")
GROUPS = ("modules", "projections", "kinds")
_KEPT = "16"  # the format of what stays as it is
_HELD_OUT = 8  # one window in so many


@dataclass
class Sensitivity:
    """What was measured, in plain values.

    formats: the candidates, as `parse_change` reads them ("4", "2:g64"); "16": as it is
    modules: one dict a module and format: name, names (all that share the matrix), kind ("attention", "mlp", "head",
        "embedding" or "other"), projection (the name without its numbers), shape, format, bytes, bits_per_weight, loss
        (tr(dW H dWt), or |dW|^2 without calibration), relative_error (its root, relative to the output's), error_of
        ("output" or "weight"), tokens, seconds, fallback
    groups: one dict a group and format, where groups are not single modules: group, format, modules (their number),
        weights, bytes, bits_per_weight, relative_error (root of the mean square), perplexity, kl_divergence,
        top1_agreement
    by: what the groups are, one of GROUPS
    perplexity: of the model as it is on the windows that groups were measured on, or None
    other_bytes: of the model's parameters outside the modules measured
    A figure that is no finite number is None
    """

    formats: list[str]
    by: str
    modules: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    perplexity: float | None = None
    other_bytes: int = 0
    calibration: dict[str, int] | None = None
    evaluation: dict[str, int] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def members(self) -> dict[str, list[str]]:
        """The modules of every group, by the group's name."""
        groups: dict[str, dict[str, None]] = {}
        for row in self.modules:
            groups.setdefault(_group(row, self.by), {})[row["name"]] = None
        return {group: list(names) for group, names in groups.items()}

    def items(self) -> list[Item]:
        """The table that formats are chosen from: every module with the formats that its figures are known in. Its loss
        is the error of its output; where groups were measured, the KL divergence of its group, shared among the group's
        modules by the squares of their relative errors. The first costs no forward pass, the second knows what an error
        does to the model and chooses better."""
        shares: dict[tuple[str, str], float] = {}
        for row in self.modules:
            of = _group(row, self.by), row["format"]
            shares[of] = shares.get(of, 0.0) + (row["relative_error"] or 0.0) ** 2
        divergence = {(row["group"], row["format"]): row["kl_divergence"] for row in self.groups}
        options: dict[str, list[Option]] = {}
        for row in self.modules:
            of, loss = (_group(row, self.by), row["format"]), row["loss"]
            found = options.setdefault(row["name"], [])
            if self.by != "modules" and loss is not None and loss > 0:
                whole, error = divergence.get(of), row["relative_error"]
                loss = None if whole is None or error is None else max(whole, 0.0) * error**2 / shares[of]
            if loss is not None:
                found.append(Option(row["format"], row["bytes"], loss))
        weights = {row["name"]: math.prod(row["shape"]) for row in self.modules}
        return [Item(name, weights[name], tuple(found)) for name, found in options.items()]


@dataclass(frozen=True)
class Choice:
    """What a budget bought.

    formats: of every module, by name
    rules: the same as `--rule` takes it, beside 16 bits for everything else
    recipe: the same as a recipe
    bytes, total_bytes: of the modules measured, and of all parameters of the model; loss: in all, as `items` has it
    """

    formats: dict[str, str]
    rules: list[str]
    recipe: Recipe
    bytes: int
    total_bytes: int
    bits_per_weight: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def hold_out(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(those to calibrate on, those to measure on): of windows [n, context], the last of every eight and at least one
    is held out. ValueError: fewer than two windows."""
    count = len(windows)
    if count < 2:
        raise ValueError(f"calibration: expected at least 2 windows, one to be held out, got {count}")
    out = torch.arange(count) % _HELD_OUT == min(_HELD_OUT, count) - 1
    return windows[~out], windows[out]


def measure(
    model: nn.Module,
    calibration: Any,
    formats: Sequence[str] = FORMATS,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    by: str = "modules",
    evaluation: torch.Tensor | None = None,
    tokenizer: Any = None,
    context: int | None = None,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures the linear layers of the blocks, the head and the token embedding of a model in every format.

    model, calibration, tokenizer, context, max_windows, batch_size, progress: as in `quantize`
    formats: changes of a rule that name a width: "trit", "4", "2:g64", "4:asym"; "16" for staying as it is
    recipe: what the formats do not say (group size, method, ...); its widths and its correction count for nothing
    by: "modules"; or "projections" or "kinds", whose groups are also measured end to end. Memory then holds every
        module in every format, packed
    evaluation: windows int64 [n, context] to measure groups on

    ValueError or TypeError: what does not fit the model, as in `quantize`, and groups without windows to measure on.
    """
    start = time.monotonic()
    recipe = Recipe() if recipe is None else recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    progress = progress if progress is not None else Progress()
    if by not in GROUPS:
        raise ValueError(f"groups: expected one of {', '.join(GROUPS)}, got {by!r}")
    if by != "modules" and (evaluation is None or evaluation.ndim != 2 or evaluation.shape[1] < 2):
        raise ValueError(f"evaluation: expected windows [n, context] of 2 tokens or more to measure {by} on")
    model_device(model)
    candidates = _candidates(formats, recipe)
    plans = {label: make_plan(model, candidate) for label, candidate in candidates.items()}
    kept = make_plan(model, replace(recipe, bits=16, head_bits=16, embed_bits=16))
    reached = make_plan(model, _candidate(recipe, {"bits": 8, "method": "gptq", "per_tensor": False}))
    specs = _specs(plans)
    modules = [m for m in reached.quantized if m.spec.rule is None and m.name in specs]
    if not modules:
        raise ValueError("model: expected a matrix to measure, but all are packed, too small or named by a rule")
    windows = calibration_windows(model, calibration, tokenizer, context=context, max_windows=max_windows)

    progress.on_plan(Plan(tuple(modules), reached.parameter_bytes))
    run = _Measure(
        model,
        modules,
        windows,
        batch_size=batch_size,
        true_sequential=False,
        progress=progress,
        specs=specs,
        keep=by != "modules",
    )
    with torch.no_grad(), calibration_mode(model):
        run.everything()
    measured = Sensitivity(
        formats=list(formats),
        by=by,
        modules=run.rows,
        other_bytes=kept.packed_parameter_bytes - sum(m.bytes for m in modules),
        calibration={"windows": windows.shape[0], "context": windows.shape[1], "tokens": windows.numel()},
    )
    if by != "modules":
        _end_to_end(model, measured, run.packed, evaluation, progress)
    measured.seconds = time.monotonic() - start
    return measured


def choose(sensitivity: Sensitivity, budget: Budget, recipe: Recipe | None = None) -> Choice:
    """The formats that a budget allows, in the recipe given: its rules go first. BudgetError: the budget is too
    small."""
    items = sensitivity.items()
    point = allocate(items, budget.for_items(items, sensitivity.other_bytes))
    formats = {item.name: option.format for item, option in zip(items, point.chosen, strict=True)}
    rules = format_rules(formats)
    recipe = Recipe() if recipe is None else recipe
    weights = sum(item.weights for item in items)
    return Choice(
        formats=formats,
        rules=rules,
        recipe=replace(recipe, bits=16, head_bits=16, embed_bits=16, rules={**recipe.rules, **_parsed(rules)}),
        bytes=point.bytes,
        total_bytes=point.bytes + sensitivity.other_bytes,
        bits_per_weight=8 * point.bytes / weights,
        loss=point.loss,
    )


def format_rules(formats: Mapping[str, str]) -> list[str]:
    """Rules `PATTERN=CHANGE`, as `--rule` takes them, that give modules their formats: one for all layers that have the
    same format in the same place. Modules that stay need none."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    rules = []
    for name, label in formats.items():
        if label == _KEPT:
            continue
        match = re.fullmatch(r"((?:.*?\.)?)(\d+)(\..+)", name)
        if match is None:
            rules.append(f"{re.escape(name)}$={label}")
        else:
            layers.setdefault((match[1], match[3], label), []).append(match[2])
    for (before, after, label), numbers in layers.items():
        place = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        rules.append(f"{re.escape(before)}{place}{re.escape(after)}$={label}")
    return rules


def _parsed(rules: Iterable[str]) -> dict[str, Any]:
    pairs = [rule.rpartition("=") for rule in rules]
    return {pattern: parse_change(label) for pattern, _, label in pairs}


def _candidates(formats: Sequence[str], recipe: Recipe) -> dict[str, Recipe]:
    if not formats:
        raise ValueError("formats: expected at least one")
    candidates = {}
    for label in formats:
        change = parse_change(label)
        if not isinstance(change, dict) or "bits" not in change:
            raise ValueError(f"formats: expected a width such as 4, trit or 2:g64, got {label!r}")
        if change["bits"] == 16 and label != _KEPT:
            raise ValueError(f"formats: expected {_KEPT} alone for what stays as it is, got {label!r}")
        if label in candidates:
            raise ValueError(f"formats: {label} given twice")
        candidates[label] = _candidate(recipe, change)
    return candidates


def _candidate(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """The recipe with every module in one format."""
    bits = change["bits"]
    return replace(recipe, **{**change, "head_bits": bits, "embed_bits": bits, "correction": "none"})


def _specs(plans: Mapping[str, Plan]) -> dict[str, dict[str, ModuleSpec | None]]:
    """Of every module by name: how it is packed in each format; None where it stays."""
    specs: dict[str, dict[str, ModuleSpec | None]] = {}
    for label, plan in plans.items():
        for planned in plan.modules:
            # A matrix that only ternary weights could fill (method exact) has no such format.
            if planned.spec is not None or label == _KEPT:
                specs.setdefault(planned.name, {})[label] = planned.spec
    return specs


class _Measure(Walk):
    """One pass: rows of figures and, to be measured in groups, (packed matrix, activations) by format and name."""

    def __init__(self, *walk: Any, specs: dict[str, dict[str, ModuleSpec | None]], keep: bool, **options: Any) -> None:
        super().__init__(*walk, **options)
        self._specs, self._keep = specs, keep
        self._rest = dict(zip(self.left, (rest for _, rest in split_names(list(self.left))), strict=True))
        self.rows: list[dict[str, Any]] = []
        self.packed: dict[str, dict[str, tuple[PackedMatrix, str]]] = {}

    def everything(self) -> None:
        order = list(self.left)
        self.calibrated()
        for planned in [m for m in self.left.values() if m.is_table]:
            self._row_by_row(planned)
        self.without_inputs(list(self.left.values()), "calibration reached no token of it")
        self.rows.sort(key=lambda row: order.index(row["name"]))

    def tables(self) -> None:
        """Not before the others: nothing is changed, and their heads are reached at the end."""

    def wants_inputs(self, planned: PlannedModule) -> bool:
        return not planned.is_table

    def with_inputs(self, group: list[str], hessian: Hessian, drift: Drift | None) -> None:
        matrix, factors = hessian.matrix, {}
        for name in group:
            self._module(self.left.pop(name), _Outputs(matrix), factors, hessian.tokens, None)

    def without_inputs(self, modules: list[PlannedModule], reason: str | None) -> None:
        for planned in modules:
            del self.left[planned.name]
            self._module(planned, _Weights(), None, 0, reason)

    def _row_by_row(self, planned: PlannedModule) -> None:
        """A table, by the rows that are looked up and by the outputs of the head that shares it."""
        heads = [n for n in planned.names if not is_table(self.model.get_submodule(n))]
        uses: list[Any] = []
        if planned.kind == "embedding":
            ids = torch.cat([batch.flatten() for batch in self.batches])
            uses.append(_Rows(ids.bincount(minlength=planned.shape[0]) / len(ids)))
        if heads:
            head = {planned.name: self.model.get_submodule(heads[0])}
            hessian = self.hessians(self.forward, [[planned.name]], head, True, None, {})[planned.name]
            uses += [_Outputs(hessian.matrix)] if hessian.tokens else []
        if uses:
            del self.left[planned.name]
            self._module(planned, _Sum(uses), None, sum(map(torch.numel, self.batches)), None)

    def _module(
        self,
        planned: PlannedModule,
        loss: Any,
        factors: dict[tuple, Factor] | None,
        tokens: int,
        reason: str | None,
    ) -> None:
        """Rows of one module in all formats. loss(weight, difference) is (loss, its share of the output's energy)."""
        module = self.model.get_submodule(planned.name)
        weight, mended = finite(weight_matrix(module))
        # What is trained ternary has one way to be packed, whatever the format, and loses nothing.
        as_trained = isinstance(module, TernaryLinear) and not mended
        weight = module.quantized_weight() if as_trained else weight
        for label, spec in self._specs[planned.name].items():
            begin, packed, fallback = time.monotonic(), None, None
            if spec is None:
                lost, share = 0.0, 0.0
            else:
                if as_trained:
                    packed = module.pack()
                elif factors is not None and spec.method == "gptq":
                    solution = solved(weight, spec, loss.hessian, factors)
                    packed, fallback = solution.packed, solution.fallback
                else:
                    packed = rounded(weight, spec)
                lost, share = loss(weight, packed)
                if self._keep:
                    self.packed.setdefault(label, {})[planned.name] = packed, spec.activations
            size = planned.bytes if packed is None else packed.nbytes
            row = {
                "name": planned.name,
                "names": list(planned.names),
                "kind": kind(planned),
                "projection": re.sub(r"\b\d+\b", "*", self._rest[planned.name]),
                "shape": list(planned.shape),
                "format": label,
                "bytes": size,
                "bits_per_weight": 8 * size / math.prod(planned.shape),
                "loss": lost if math.isfinite(lost) else None,
                "relative_error": math.sqrt(share) if 0 <= share < math.inf else None,
                "error_of": loss.of,
                "tokens": tokens,
                "seconds": time.monotonic() - begin,
                "fallback": "; ".join(r for r in (mended, reason, fallback) if r) or None,
            }
            self.rows.append(row)
            self.progress.on_module(row)


class _Energy:
    """A measure of matrices that adds up over their rows; called, the loss of a packed one and its share."""

    of = "output"

    def energy(self, w: torch.Tensor, rows: slice) -> float:
        """Of some rows of a matrix, float32."""
        raise NotImplementedError

    def __call__(self, weight: torch.Tensor, packed: PackedMatrix) -> tuple[float, float]:
        lost = whole = 0.0
        step = max(1, (1 << 22) // packed.cols)
        for begin in range(0, packed.rows, step):
            part = slice(begin, min(begin + step, packed.rows))
            exact = weight[part].float()
            lost += self.energy(packed.unpack(rows=part).float() - exact, part)
            whole += self.energy(exact, part)
        return lost, lost / whole if whole else (math.inf if lost else 0.0)


class _Outputs(_Energy):
    """tr(W H Wt)"""

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian = hessian

    def energy(self, w: torch.Tensor, rows: slice) -> float:
        return output_energy(w, self.hessian)


class _Rows(_Energy):
    """|row|^2, of each row as often as it is looked up"""

    def __init__(self, share: torch.Tensor) -> None:
        self.share = share

    def energy(self, w: torch.Tensor, rows: slice) -> float:
        return float(w.square().sum(1).double() @ self.share[rows].double())


class _Weights(_Energy):
    """|W|^2"""

    of = "weight"

    def energy(self, w: torch.Tensor, rows: slice) -> float:
        return float(w.double().square().sum())


class _Sum:
    """Several uses of one matrix: what is lost in all of them."""

    of = "output"

    def __init__(self, uses: Sequence[_Energy]) -> None:
        self.uses = uses

    def __call__(self, weight: torch.Tensor, packed: PackedMatrix) -> tuple[float, float]:
        lost, shares = zip(*(use(weight, packed) for use in self.uses), strict=True)
        return sum(lost), sum(shares)


def kind(planned: PlannedModule) -> str:
    """What a module belongs to: "attention" or "mlp" in a block, by what models call them; else as in the plan."""
    if planned.kind != "linear":
        return planned.kind
    return "attention" if re.search("attn|attention", planned.name.lower()) else "mlp"


def _group(row: Mapping[str, Any], by: str) -> str:
    return row[{"modules": "name", "projections": "projection", "kinds": "kind"}[by]]


def _end_to_end(
    model: nn.Module,
    measured: Sensitivity,
    packed: Mapping[str, Mapping[str, tuple[PackedMatrix, str]]],
    windows: torch.Tensor,
    progress: Progress,
) -> None:
    """Adds the rows of groups. All groups take turns on one window, so that the model as it is runs once on each, and
    one window's logits are all that is kept of it."""
    rows = {(row["name"], row["format"]): row for row in measured.modules}
    members = measured.members()
    names = {row["name"]: row["names"] for row in measured.modules}
    changed: dict[tuple[str, str], dict[str, nn.Module]] = {}
    for group, inside in members.items():
        for label, matrices in packed.items():
            if all(name in matrices for name in inside):
                shared = {other: matrices[name] for name in inside for other in names[name]}
                changed[group, label] = _packed_modules(model, shared)
    totals: dict[tuple[str, str], Totals] = {choice: Totals() for choice in changed}
    alone = Totals()
    with torch.inference_mode(), calibration_mode(model):
        for done, ids in enumerate(windows.to(model_device(model)), 1):
            reference, _ = forward(model, ids)
            alone.add(ids, reference, None)
            for choice, modules in changed.items():
                with replaced(model, modules):
                    logits, _ = forward(model, ids)
                totals[choice].add(ids, logits, reference)
            progress.on_window(done, len(windows))
    measured.perplexity = alone.perplexity
    measured.evaluation = {"windows": windows.shape[0], "context": windows.shape[1], "tokens": windows.numel()}
    for (group, label), total in totals.items():
        own = [rows[name, label] for name in members[group]]
        weights = sum(math.prod(row["shape"]) for row in own)
        errors = [row["relative_error"] for row in own]
        row = {
            "group": group,
            "format": label,
            "modules": len(own),
            "weights": weights,
            "bytes": sum(row["bytes"] for row in own),
            "bits_per_weight": 8 * sum(row["bytes"] for row in own) / weights,
            "relative_error": None if None in errors else math.sqrt(math.fsum(e * e for e in errors) / len(errors)),
            "perplexity": total.perplexity,
            "kl_divergence": total.kl_divergence,
            "top1_agreement": total.top1_agreement,
        }
        finite_row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        measured.groups.append(finite_row)


def _packed_modules(model: nn.Module, matrices: Mapping[str, tuple[PackedMatrix, str]]) -> dict[str, nn.Module]:
    """The modules that `patch` would put around packed matrices with their activations, by name; the model stays as it
    is."""
    with replaced(model, {name: model.get_submodule(name) for name in matrices}):
        patch(
            model,
            {name: packed for name, (packed, _) in matrices.items()},
            activations={name: activations for name, (_, activations) in matrices.items()},
        )
        return {name: model.get_submodule(name) for name in matrices}
