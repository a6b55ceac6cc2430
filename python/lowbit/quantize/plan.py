"""The plan: what a recipe makes of every matrix of a model, decided and checked before anything is
touched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from lowbit import _C
from lowbit.abi import FORMATS, LINE_BYTES
from lowbit.models import Target, find_targets, weight_matrix
from lowbit.nn import TernaryLinear
from lowbit.quantize.recipe import TRIT_BITS, ModuleSpec, Recipe, rule_regex
from lowbit.quantize.ternary import is_ternary, ternary_state

# Below this many rows or columns a matrix (a router, a gate, a classifier) saves next to nothing, is
# sensitive, and fits no GPTQ checkpoint, whose words hold 32 codes. Only a rule quantizes it.
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class PlannedModule:
    """One matrix and what becomes of it. It holds no weights, so a plan keeps none of them alive.

    names: the modules that share the matrix, the first being the one reported; kinds: what each of them is; spec: how
    it is quantized, or None with `reason` why it stays; bytes, packed_bytes: its weight now and, when quantized,
    afterwards.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    is_table: bool
    shape: tuple[int, int]
    bytes: int
    spec: ModuleSpec | None
    reason: str | None
    packed_bytes: int

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def kind(self) -> str:
        return self.kinds[0]


@dataclass(frozen=True)
class Plan:
    """Every matrix of a model, in module order. parameter_bytes: all parameters of the model, shared ones
    once."""

    modules: tuple[PlannedModule, ...]
    parameter_bytes: int

    @property
    def quantized(self) -> list[PlannedModule]:
        return [m for m in self.modules if m.spec is not None]

    @property
    def kept(self) -> list[PlannedModule]:
        return [m for m in self.modules if m.spec is None]

    @property
    def packed_parameter_bytes(self) -> int:
        """Bytes of all parameters once the plan is carried out."""
        return self.parameter_bytes - sum(m.bytes - m.packed_bytes for m in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the quantized matrices, scales, zeros, permutation and padding included."""
        weights = sum(m.shape[0] * m.shape[1] for m in self.quantized)
        return 8 * sum(m.packed_bytes for m in self.quantized) / weights if weights else 0.0


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Applies a recipe to a model without changing it.

    ValueError: a rule that matches no matrix of the model, or two widths for one shared table.
    """
    targets = find_targets(model)
    _check_rules(recipe, [name for target in targets for name in target.names])
    parameters = {id(p): p.nbytes for p in model.parameters()}
    return Plan(tuple(_planned(target, recipe) for target in targets), sum(parameters.values()))


def packed_bytes(shape: tuple[int, int], spec: ModuleSpec) -> int:
    """Bytes of the packed matrix [rows, cols] that a specification gives: lines, scales, zeros,
    permutation."""
    rows, cols = shape
    lines = LINE_BYTES * _C.row_lines(FORMATS[spec.format], cols)
    scale = getattr(torch, spec.scale_dtype).itemsize
    if spec.per_tensor:
        return rows * lines + scale
    groups = -(-cols // spec.group_size_for(cols))
    permuted = spec.method == "gptq" and spec.order == "act" and spec.grids == "updated"
    return rows * (lines + groups * (scale + (not spec.symmetric))) + 4 * cols * permuted


def _planned(target: Target, recipe: Recipe) -> PlannedModule:
    spec, reason = _resolve(target, recipe)
    if spec is not None and target.obstacle is not None:
        spec, reason = None, target.obstacle
    if spec is not None and spec.rule is None and min(target.shape) < SMALLEST_SIDE:
        spec, reason = None, f"fewer than {SMALLEST_SIDE} rows or columns"
    if spec is not None and target.is_table and spec.method == "gptq":
        spec = _table_spec(spec, target, recipe)
    if spec is not None and isinstance(target.module, TernaryLinear):
        spec = _as_trained(spec, target.module)
    elif spec is not None and spec.format == "trit":
        weight = weight_matrix(target.module)
        if is_ternary(weight):
            spec = replace(spec, method="exact", per_tensor=True, group_size=-1, clip=False, scale_dtype="float32")
        elif spec.method == "exact":
            spec, reason = None, f"not ternary: {ternary_state(weight)}"
    return PlannedModule(
        names=target.names,
        kinds=target.kinds,
        is_table=target.is_table,
        shape=target.shape,
        bytes=weight_matrix(target.module).nbytes,
        spec=spec,
        reason=reason,
        packed_bytes=packed_bytes(target.shape, spec) if spec is not None else 0,
    )


def _table_spec(spec: ModuleSpec, target: Target, recipe: Recipe) -> ModuleSpec:
    """How rows that are looked up are solved: as the rows of the head that shares them, held near the embeddings that
    the blocks expect by more damping. A table without a head has no inputs to be solved for."""
    if "head" not in target.kinds:
        return replace(spec, method="rtn")
    change = recipe.rule_for(target.name)[1]
    damp = spec.damp if isinstance(change, dict) and "damp" in change else recipe.tied_damp
    return replace(spec, damp=damp, correction="none")


def _as_trained(spec: ModuleSpec, module: TernaryLinear) -> ModuleSpec:
    """How a module that is trained ternary is packed, whatever was asked for: as in its own forward pass."""
    return replace(
        spec,
        bits=TRIT_BITS,
        group_size=-1 if module.group_size is None else module.group_size,
        per_tensor=module.group_size is None,
        symmetric=True,
        scale_dtype="float32",
        clip=False,
        correction="none",
        activations=module.activations,
        method="exact",
    )


def _resolve(target: Target, recipe: Recipe) -> tuple[ModuleSpec | None, str | None]:
    """The one specification for all modules of a target: a rule for any of them goes before the defaults, and
    a width before 16 bits, since a shared matrix that one module wants packed is packed for all."""
    by_rule, by_default = [], []
    tied = {"embedding", "head"} <= set(target.kinds)
    for name, kind in zip(target.names, target.kinds, strict=True):
        pattern, _ = recipe.rule_for(name)
        (by_rule if pattern is not None else by_default).append(recipe.for_module(name, kind, tied))
    for specs in (by_rule, by_default):
        distinct = {replace(s, rule=None) for s in specs if s is not None}
        if len(distinct) > 1 or (specs is by_rule and distinct and None in specs):
            wanted = ", ".join(
                "16 bits" if s is None else "trit" if s.format == "trit" else f"{s.bits} bits" for s in specs
            )
            raise ValueError(
                f"{' and '.join(target.names)} share one weight: expected one way to store it, got {wanted}"
            )
        if distinct:
            return next(s for s in specs if s is not None), None
        if specs is by_rule and specs:
            return None, "a rule leaves it"
    return (
        None,
        "the recipe gives it 16 bits" if target.kind != "other" else "outside the blocks, and no rule names it",
    )


def _check_rules(recipe: Recipe, names: Iterable[str]) -> None:
    names = list(names)
    for pattern, change in recipe.rules.items():
        # A rule that leaves modules alone may be meant for many models; one that asks for something must find
        # it.
        if change != "skip" and not any(re.match(rule_regex(pattern), name) for name in names):
            like = f" (names are like {names[-1]!r})" if names else ""
            raise ValueError(f"rules: {pattern!r} matches no matrix of the model{like}")
