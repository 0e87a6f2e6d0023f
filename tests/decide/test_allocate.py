"""The best choice within a budget is the best of all choices; controls fill the same budget."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from build import options
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.decide.allocate import (
    allocate,
    at_random,
    budgets,
    bytes_of,
    edges_first,
    loss_of,
    seconds_of,
    smallest,
    uniform,
)
from auto_quantize_model.files import InputError
from auto_quantize_model.records import Options

COST = st.tuples(st.integers(1, 10**9), st.one_of(st.just(0.0), st.floats(1e-9, 10)))


@st.composite
def tables(draw: st.DrawFn) -> list[Options]:
    names = [f"layers.{number}.op" for number in range(draw(st.integers(1, 5)))]
    schemes = draw(st.lists(st.sampled_from(["NVFP4", "W8A8", "unquantized"]), min_size=1, unique=True))
    return [options_of(name, {scheme: draw(COST) for scheme in schemes}) for name in names]


def options_of(name: str, costs: dict[str, tuple[int, float]]) -> Options:
    sizes, losses = ({scheme: cost[side] for scheme, cost in costs.items()} for side in (0, 1))
    return Options(name, (name,), 8, sizes, losses, {})


@given(units=tables(), share=st.floats(0, 1))
def test_no_other_choice_within_the_budget_loses_less(units: list[Options], share: float) -> None:
    low = bytes_of(smallest(units), units)
    high = sum(max(unit.bytes.values()) for unit in units)
    budget = low + round(share * (high - low))
    choice = allocate(units, budget)
    assert bytes_of(choice, units) <= budget
    best = min(
        loss_of(other, units)[0]
        for other in itertools.product(*(unit.bytes for unit in units))
        if bytes_of(other, units) <= budget
    )
    assert loss_of(choice, units)[0] <= best * (1 + 1e-5) + 1e-15  # HiGHS works with a precision of 1e-6


def test_losses_of_any_size_are_told_apart() -> None:
    """One unit that is ruined by its small option does not hide the differences of all others."""
    units = [options("ruined", NVFP4=(4, 5.0))]
    units += [options(f"op{number}", NVFP4=(4, 1e-9 * (number + 1)), W8A8=(8, 1e-12)) for number in range(9)]
    budget = 16 + 4 * 9 + 4 * 4  # the ruined unit unquantized, and four others in their larger option
    assert allocate(units, budget) == ("unquantized", *["NVFP4"] * 5, *["W8A8"] * 4)
    assert set(allocate(units, 16 * 10)) == {"unquantized"}


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_one() -> None:
    units = [options("a", W8A8=(8, 0.1)), options("b", W8A8=(8, 0.2))]
    with pytest.raises(InputError, match=r"^no choice of schemes fits in 15 bytes; the smallest takes 16 bytes$"):
        allocate(units, 15)
    assert allocate(units, 16) == ("W8A8", "W8A8") and allocate(units, 24) == ("W8A8", "unquantized")
    assert allocate(units, 31) == ("W8A8", "unquantized") and allocate(units, 32) == ("unquantized", "unquantized")


@given(units=tables(), share=st.floats(0, 1), speed=st.floats(0, 1), seed=st.integers(0, 99))
def test_no_other_choice_within_bytes_and_time_loses_less(
    units: list[Options], share: float, speed: float, seed: int
) -> None:
    draw = random.Random(seed)
    units = [replace(unit, seconds={scheme: draw.uniform(1e-6, 1e-3) for scheme in unit.bytes}) for unit in units]
    all_choices = list(itertools.product(*(unit.bytes for unit in units)))
    budget = bytes_of(smallest(units), units) + round(share * sum(max(unit.bytes.values()) for unit in units))
    times = sorted(time for choice in all_choices if (time := seconds_of(choice, units)))
    seconds = times[int(speed * (len(times) - 1))] * (1 + 1e-5)
    able = [choice for choice in all_choices if bytes_of(choice, units) <= budget]
    able = [choice for choice in able if (seconds_of(choice, units) or 0) <= seconds]
    if not able:
        with pytest.raises(InputError, match=r"^no choice of schemes fits in \d+ bytes and .* s; the fastest"):
            allocate(units, budget, seconds)
        return
    choice = allocate(units, budget, seconds)
    assert choice in able
    best = min(loss_of(other, units)[0] for other in able)
    assert loss_of(choice, units)[0] <= best * (1 + 1e-5) + 1e-15


def test_a_choice_that_exceeds_the_budget_within_the_solvers_tolerance_gives_way_to_another() -> None:
    """Of 20 million bytes 3 are within the tolerance. The smaller option of the first unit takes too long."""
    tight = options_of("a", {"NVFP4": (1774, 0.0), "W8A8": (1777, 0.0)})
    tight = replace(tight, seconds={"NVFP4": 2.0, "W8A8": 1.0})
    large = replace(options_of("b", {"FP8": (19997722, 0.1)}), seconds={"FP8": 1.0})
    budget = bytes_of(("NVFP4", "FP8"), [tight, large])
    with pytest.raises(InputError, match=r"^no choice of schemes fits in 19999496 bytes and 2.5 s; the fastest"):
        allocate([tight, large], budget, 2.5)
    other = options_of("b", {"FP8": (19997722, 0.1), "W4A16": (19997719, 0.3)})
    slower = replace(other, seconds={"FP8": 1.0, "W4A16": 1.2})
    assert allocate([tight, slower], budget, 2.5) == ("W8A8", "W4A16")


def test_a_choice_without_a_table_has_no_time() -> None:
    assert seconds_of(("W8A8",), [options("a", W8A8=(8, 0.1))]) is None


def test_budgets_grow_by_equal_ratios_from_the_smallest_choice_to_the_largest() -> None:
    units = [options("a", W8A8=(4, 0.1)), options("b", W8A8=(4, 0.2))]
    assert budgets(units, 3) == [8, 16, 32]


def test_a_uniform_choice_leaves_a_unit_that_cannot_have_the_scheme_to_its_least_loss() -> None:
    units = [options("a", W8A8=(8, 0.1), NVFP4=(4, 0.2)), options("b", NVFP4=(4, 0.2))]
    assert uniform(units, "W8A8") == ("W8A8", "unquantized") and uniform(units, "NVFP4") == ("NVFP4", "NVFP4")


def layers(count: int) -> list[Options]:
    return [options(f"model.layers.{layer}.mlp", NVFP4=(4, 0.2), W8A8=(8, 0.1)) for layer in range(count)]


def test_the_first_and_the_last_layers_get_more_bytes_first() -> None:
    units = [*layers(5), options("lm_head", NVFP4=(4, 0.3), W8A8=(8, 0.2))]
    small, large, whole = "NVFP4", "W8A8", "unquantized"
    assert edges_first(units, 36) == (large, small, small, small, large, large)
    assert edges_first(units, 56) == (large, large, large, large, large, whole)


@given(st.integers(16, 64), st.integers(0, 5))
def test_a_random_choice_fills_its_budget(budget: int, seed: int) -> None:
    units = layers(4)
    choice = at_random(units, budget, seed)
    left = budget - bytes_of(choice, units)
    assert 0 <= left and choice == at_random(units, budget, seed)
    assert all(larger - unit.bytes[scheme] > left for unit, scheme, larger in steps(units, choice))


def steps(units: Sequence[Options], choice: Sequence[str]) -> list[tuple[Options, str, int]]:
    """Each step to a larger option of one unit."""
    return [
        (unit, scheme, size)
        for unit, scheme in zip(units, choice, strict=True)
        for size in unit.bytes.values()
        if size > unit.bytes[scheme]
    ]


def test_a_predicted_loss_is_a_sum_with_a_standard_error() -> None:
    first = Options("a", ("a",), 8, {"W8A8": 8}, {"W8A8": 0.1}, {"W8A8": 0.03})
    second = Options("b", ("b",), 8, {"W8A8": 8}, {"W8A8": 0.2}, {"W8A8": 0.04})
    assert loss_of(("W8A8", "W8A8"), [first, second]) == pytest.approx((0.3, 0.05))
