"""Which module gets which format, so that a byte budget is met and least is lost.

Every item (a module, or modules that take one format together) has options: bytes, and what is lost in them. Of the
options of an item only those on the lower convex hull of loss over bytes are steps: so every step saves less a byte
than the one before it, and an option that pays only together with a dearer one is not looked at alone. From every item
in its cheapest option, the steps of all items are taken in the order of loss saved a byte while they fit. That is the
best there is at every size it passes through; what is left of the budget behind the last step that fits is spent on
whatever still fits, the most saved a byte first.

Nothing here knows a model: sizes and losses come from `sensitivity`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


class BudgetError(ValueError):
    """A budget that no choice of formats meets."""


@dataclass(frozen=True)
class Option:
    """One format of an item: what it takes and what it loses, a finite number of at least 0."""

    format: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """Modules that take one format together: one of them, a table tied to the head, or a group of modules.

    weights: their number, for budgets in bits a weight.
    """

    name: str
    weights: int
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"{self.name}: expected at least one format to choose from")
        for option in self.options:
            if option.bytes < 0 or not 0 <= option.loss < math.inf:
                raise ValueError(
                    f"{self.name} as {option.format}: expected bytes and a finite loss of at least 0, "
                    f"got {option.bytes} and {option.loss}"
                )


@dataclass(frozen=True)
class Point:
    """A choice for every item: their bytes and loss in all, and the option of each, in the order of the items."""

    bytes: int
    loss: float
    chosen: tuple[Option, ...]


@dataclass(frozen=True)
class Budget:
    """What may be spent: bytes of a whole model's parameters, or bits a weight of the matrices to choose for."""

    bytes: int | None = None
    bits: float | None = None

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight" if self.bytes is None else f"{self.bytes:,} bytes"

    def for_items(self, items: Sequence[Item], other_bytes: int) -> int:
        """Bytes that the items may take in all. other_bytes: of the model's parameters outside them."""
        if self.bytes is not None:
            return self.bytes - other_bytes
        return int(self.bits * sum(item.weights for item in items) / 8)


def parse_budget(text: str) -> Budget:
    """A budget as on a command line: `2.5` or `2.5bits` a weight, `120MB` (also B, kB, GB; decimal) of parameters.

    ValueError: anything else, and a budget that is not above 0.
    """
    units = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)\s*(bits?|{'|'.join(units)})?", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"budget: expected bits a weight such as 2.5 or 2.5bits, or bytes such as 120MB, got {text!r}")
    if match[2] in units:
        return Budget(bytes=int(float(match[1]) * units[match[2]]))
    return Budget(bits=float(match[1]))


def pareto_curve(items: Sequence[Item]) -> list[Point]:
    """The choices that are the best of their size: from every item in its smallest option to every item in its best
    one, one step of one item at a time."""
    hulls = [_hull(item) for item in items]
    at = [0] * len(hulls)
    points = [_point([hull[0] for hull in hulls])]
    for index, _ in _steps(hulls):
        at[index] += 1
        points.append(_point([hull[i] for hull, i in zip(hulls, at, strict=True)]))
    return points


def allocate(items: Sequence[Item], budget_bytes: int) -> Point:
    """The choice of least loss that the greedy way finds within budget_bytes for all items together. Among equals the
    item that comes first gets its step first: the same choice every time.

    BudgetError: the items take more in their smallest formats. ValueError: no items.
    """
    if not items:
        raise ValueError("items: expected at least one module to choose a format for")
    hulls = [_hull(item) for item in items]
    chosen = [hull[0] for hull in hulls]
    spent = sum(option.bytes for option in chosen)
    if spent > budget_bytes:
        weights = sum(item.weights for item in items)
        bits = f", {8 * spent / weights:.2f} bits a weight," if weights else ""
        raise BudgetError(
            f"budget: expected at least {spent:,} bytes{bits} for {len(items)} modules in their smallest formats, got "
            f"{budget_bytes:,}"
        )
    closed = set()  # items whose next step did not fit: the steps behind it start where they never arrived
    for index, option in _steps(hulls):
        more = option.bytes - chosen[index].bytes
        if index in closed or spent + more > budget_bytes:
            closed.add(index)
            continue
        chosen[index], spent = option, spent + more
    # Also options off the hull: between two steps, one that fits is better than none.
    while (best := _best_that_fits(items, chosen, budget_bytes - spent)) is not None:
        index, option = best
        spent += option.bytes - chosen[index].bytes
        chosen[index] = option
    return _point(chosen)


def _hull(item: Item) -> list[Option]:
    """The options on the lower convex hull, by bytes: the first is the smallest, the last the best."""
    hull: list[Option] = []
    for option in sorted(item.options, key=lambda o: (o.bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue  # as many bytes or more for nothing
        while len(hull) > 1 and _saved_a_byte(hull[-1], option) > _saved_a_byte(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _saved_a_byte(small: Option, large: Option) -> float:
    return (small.loss - large.loss) / (large.bytes - small.bytes)


def _steps(hulls: Sequence[Sequence[Option]]) -> list[tuple[int, Option]]:
    """(item, option reached), the most saved a byte first. A hull's own steps come in its order, because each saves
    less a byte than the one before it."""
    steps = [
        (-_saved_a_byte(small, large), index, large.bytes, large)
        for index, hull in enumerate(hulls)
        for small, large in pairwise(hull)
    ]
    return [(index, option) for _, index, _, option in sorted(steps, key=lambda step: step[:3])]


def _best_that_fits(items: Sequence[Item], chosen: Sequence[Option], left: int) -> tuple[int, Option] | None:
    best, most = None, 0.0
    for index, item in enumerate(items):
        for option in item.options:
            more, saved = option.bytes - chosen[index].bytes, chosen[index].loss - option.loss
            if more <= left and saved > 0:
                rate = saved / more if more > 0 else math.inf
                if rate > most:
                    best, most = (index, option), rate
    return best


def _point(chosen: Sequence[Option]) -> Point:
    return Point(sum(o.bytes for o in chosen), math.fsum(o.loss for o in chosen), tuple(chosen))
