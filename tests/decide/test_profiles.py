"""A profile is a measured choice: the smallest within the target, the knee, and the least loss in a budget."""

from typing import Any

import pytest
from build import a_frontier, a_plan, a_point, an_op, two_units

from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles, knee, offered
from auto_quantize_model.decide.proof import comparisons, prediction
from auto_quantize_model.records import Frontier, NotMeasured, Point

PLAN = a_plan(["a", "b", "c", "head"])
UNITS = "abc"


def of_losses(*losses: float, accuracies: tuple[float | None, ...] = (None,) * 4) -> Frontier:
    """A frontier of three units, whose points quantize 3, 2, 1 and no units with these losses."""
    points = []
    for index, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
        schemes = ["W8A8"] * (3 - index) + ["unquantized"] * index
        points.append(a_point(schemes, loss, accuracy=accuracy, sqnr_db=20.0 + 10 * index if loss else None))
    return a_frontier(UNITS, points, answers=10)


@pytest.mark.parametrize(
    ("target", "quantized"),
    [
        ({"max_divergence": 0.4}, 3),
        ({"max_divergence": 0.05}, 2),
        ({"max_divergence": 0.005}, 1),
        ({"min_sqnr_db": 25.0}, 2),
        ({"max_accuracy_drop": 0.1}, 1),
        ({"max_divergence": 0.05, "max_accuracy_drop": 0.1}, 1),
    ],
)
def test_smallest_has_the_fewest_bytes_of_those_that_reach_the_target(target: dict[str, Any], quantized: int) -> None:
    frontier = of_losses(0.4, 0.04, 0.004, 0.0, accuracies=(0.1, 0.5, 0.8, 0.9))
    found = build_profiles(frontier, PLAN, Target(**target)).profiles["smallest"]
    assert found.assignment == dict.fromkeys(UNITS[:quantized], "W8A8")
    assert found.kept == (*UNITS[quantized:], "head")


def test_ops_that_never_ran_are_not_kept() -> None:
    plan = a_plan([an_op("a"), an_op("b"), an_op("c"), an_op("idle", executions=(0,))])
    found = build_profiles(of_losses(0.4, 0.04, 0.004, 0.0), plan, Target(max_divergence=1))
    assert found.profiles["smallest"].kept == ()


def test_without_a_profile_the_reason_is_told() -> None:
    frontier = of_losses(0.4, 0.04, 0.004, 0.0)
    found = build_profiles(frontier, PLAN, Target(max_divergence=0.001, max_bits=7.0))
    assert found.missed["smallest"] == (
        "no measured choice reaches the target (a divergence of at most 0.001); the best one has a divergence of 0.004"
    )
    assert found.missed["safest"] == (
        "no choice of schemes fits the budget (at most 7.0 bits a weight); the smallest has 8.00 bits a weight, 124"
        " bytes"
    )
    found = build_profiles(frontier, PLAN, Target())
    assert found.missed["smallest"] == "the config's profiles block sets no limit for the loss"
    assert found.missed["safest"] == "the config's profiles block sets no budget"
    found = build_profiles(frontier, PLAN, Target(max_accuracy_drop=0.1))
    assert found.missed["smallest"].startswith("no held-out sample has an answer")
    found = build_profiles(NotMeasured("not_measured", "a reason"), PLAN, Target())
    assert set(found.missed.values()) == {"nothing was measured: a reason"} and not found.profiles


def test_safest_loses_least_within_the_budget() -> None:
    frontier = of_losses(0.4, 0.04, 0.004, 0.0)
    for target, quantized in (
        (Target(max_bits=11.0), 2),
        (Target(max_weight_bytes=124), 3),
        (Target(max_bits=16.0), 1),
    ):
        found = build_profiles(frontier, PLAN, target).profiles["safest"]
        assert len(found.assignment) == quantized


def test_a_choice_that_is_no_better_than_a_smaller_one_is_not_offered() -> None:
    frontier = of_losses(0.4, 0.04, 0.05, 0.0)
    assert [len(set(point.schemes)) for point in offered(frontier)] == [1, 2]
    assert build_profiles(frontier, PLAN, Target(max_bits=16.0)).profiles["safest"].point.divergence == 0.04


def test_a_uniform_scheme_counts_as_a_choice_and_other_controls_do_not() -> None:
    frontier = two_units()
    better = a_point(["W8A8", "unquantized"], 0.001, kind="random", name="random_1")
    uniform = a_point(["W8A8", "unquantized"], 0.002, kind="uniform", name="W8A8")
    found = offered(a_frontier("ab", frontier.points, [better, uniform]))
    assert [point.divergence for point in found] == [0.04, 0.002]


def curve(*losses: float) -> list[Point]:
    return [a_point([], loss, weight_bytes=100 + index, bits=float(index)) for index, loss in enumerate(losses)]


def test_the_knee_is_where_more_bytes_bring_less() -> None:
    points = curve(1.0, 1e-3, 1e-3 / 2, 1e-4)
    assert knee(points) is points[1]
    assert knee(curve(1.0, 1e-1, 1e-2, 1e-3)) is None  # each byte buys the same
    assert knee(curve(1.0, 1e-1)) is None


def test_a_control_is_compared_sample_by_sample_with_the_point_of_its_bytes() -> None:
    point = a_point(["W8A8", "unquantized"], 0.02, divergence_by_sample=(0.01, 0.03))
    control = a_point(["unquantized", "W8A8"], 0.05, kind="random", name="random_0", divergence_by_sample=(0.02, 0.08))
    frontier = a_frontier("ab", [a_point(["W8A8", "W8A8"], 0.4), point, two_units().points[-1]], [control])
    (row,) = comparisons(frontier)
    assert row["frontier_divergence"] == 0.02 and row["more"] == pytest.approx(0.03)
    assert row["low"] == pytest.approx(0.01) and row["high"] == pytest.approx(0.05)


def test_predictions_are_compared_with_what_was_measured() -> None:
    points = [a_point(["W8A8"], 0.02, predicted=0.01), a_point(["W8A8"], 0.08, predicted=0.04), a_point([], 0.0)]
    assert prediction(a_frontier("a", points)) == {"compared": 2, "tau": pytest.approx(1), "ratio": pytest.approx(2)}
    assert prediction(a_frontier("a", points, loss="relative_error"))["ratio"] is None
