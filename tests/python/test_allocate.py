"""Choosing formats under a budget, on tables small enough to try every choice."""

import itertools
import random

import pytest

from lowbit.quantize.allocate import Budget, BudgetError, Item, Option, allocate, pareto_curve, parse_budget


def item(name, *options, weights=8):
    return Item(name, weights, tuple(Option(f"{size}B", size, loss) for size, loss in options))


def every_choice(items):
    return [
        (sum(o.bytes for o in chosen), sum(o.loss for o in chosen))
        for chosen in itertools.product(*(i.options for i in items))
    ]


def random_items(seed, count=4):
    numbers = random.Random(seed)
    return [
        item(
            f"m{i}",
            *sorted((numbers.randrange(1, 60), numbers.random() * 2**i) for _ in range(numbers.randrange(1, 6))),
        )
        for i in range(count)
    ]


def test_budget_goes_where_it_saves_most_a_byte():
    items = [item("a", (1, 10), (2, 1), (4, 0)), item("b", (1, 6), (2, 4), (4, 0))]
    got = {budget: [o.bytes for o in allocate(items, budget).chosen] for budget in range(2, 9)}
    assert got == {2: [1, 1], 3: [2, 1], 4: [2, 2], 5: [2, 2], 6: [2, 4], 7: [2, 4], 8: [4, 4]}


def test_a_step_that_pays_only_behind_another_is_not_missed():
    """The first step of `late` saves almost nothing, both together most of all: a greedy that looks one step ahead
    spends the budget elsewhere."""
    late = item("late", (1, 10), (2, 9.9), (3, 0))
    early = item("early", (1, 2), (2, 1), (3, 0))
    point = allocate([late, early], 4)
    assert [o.bytes for o in point.chosen] == [3, 1] and point.loss == 2
    assert [o.bytes for o in allocate([early, late], 4).chosen] == [1, 3]


def test_an_option_off_the_hull_is_taken_where_nothing_else_fits():
    only = item("a", (1, 10), (3, 8), (4, 0))
    assert [o.bytes for o in allocate([only], 3).chosen] == [3]
    assert [p.bytes for p in pareto_curve([only])] == [1, 4]


def test_an_item_too_large_does_not_stop_the_others():
    items = [item("large", (10, 100), (1000, 0)), item("a", (1, 1), (2, 0.5)), item("b", (1, 1), (2, 0.9))]
    assert [o.bytes for o in allocate(items, 15).chosen] == [10, 2, 2]


def test_more_bytes_for_as_much_loss_are_never_chosen():
    items = [item("trit and int2", (64, 0.5), (64, 0.2), (128, 0.2), (256, 0.3))]
    point = allocate(items, 10**6)
    assert (point.bytes, point.loss) == (64, 0.2)
    assert pareto_curve(items) == [point]


@pytest.mark.parametrize("seed", range(25))
def test_within_the_budget_and_never_far_from_the_best(seed):
    items = random_items(seed)
    choices = every_choice(items)
    curve = pareto_curve(items)
    # Points of the curve are the best of their size, and a choice with more budget is never a worse one of them.
    for point in curve:
        assert point.loss <= min(loss for size, loss in choices if size <= point.bytes) + 1e-12
        assert allocate(items, point.bytes).loss <= point.loss + 1e-12
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in itertools.pairwise(curve))
    largest = max(max(o.bytes for o in i.options) for i in items)
    for budget in range(curve[0].bytes, curve[-1].bytes + largest, 7):
        got = allocate(items, budget)
        assert got.bytes <= budget and got == allocate(items, budget)
        assert got.loss <= max(p.loss for p in curve if p.bytes <= budget)
        # Not more than one step of the hull is lost to what does not fit.
        reached = [p for p in curve if p.bytes <= budget]
        assert got.loss <= reached[-1].loss + 1e-12


def test_too_small_a_budget_says_what_is_needed():
    items = [item("a", (10, 1), (20, 0)), item("b", (5, 1))]
    with pytest.raises(BudgetError, match=r"at least 15 bytes, 7\.50 bits a weight, for 2 modules .* got 14"):
        allocate(items, 14)
    assert issubclass(BudgetError, ValueError)
    assert allocate(items, 15).bytes == 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: item("a"), "a: expected at least one format"),
        (lambda: item("a", (1, float("nan"))), "a as 1B: expected bytes and a finite loss"),
        (lambda: item("a", (1, -1.0)), "finite loss of at least 0, got 1 and -1.0"),
        (lambda: allocate([], 5), "at least one module"),
    ],
)
def test_wrong_tables_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1.9", Budget(bits=1.9)),
        ("2.5bits", Budget(bits=2.5)),
        ("3 bits", Budget(bits=3.0)),
        ("120MB", Budget(bytes=120_000_000)),
        ("1.5 GB", Budget(bytes=1_500_000_000)),
        ("64kB", Budget(bytes=64_000)),
        ("700B", Budget(bytes=700)),
    ],
)
def test_budgets_as_they_are_written(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "bits", "-1", "0", "0MB", "2.5TB", "MB", "1e3", "nan", "2,5"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="budget: expected bits a weight such as"):
        parse_budget(text)


def test_bytes_of_a_budget():
    items = [item("a", (1, 1), weights=100), item("b", (1, 1), weights=60)]
    assert Budget(bits=2.5).for_items(items, 1000) == 50
    assert Budget(bytes=1200).for_items(items, 1000) == 200
    assert (str(Budget(bits=2.5)), str(Budget(bytes=1200))) == ("2.5 bits a weight", "1,200 bytes")
