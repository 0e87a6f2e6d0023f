"""A profile is a measured keep-list; the recommended one is the smallest that reaches the target, or there is none."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from build import a_plan, a_point, a_tradeoff, with_point

from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.documents import write_document
from auto_quantize_model.records import NotMeasured, Point, Tradeoff, body_of
from auto_quantize_model.schemes.scheme import assigned

SQNR = {0: 5.0, 1: 12.0, 2: 11.0, 4: 25.0, 8: 40.0, 20: None}


def tradeoff(accuracy: bool = True) -> Tradeoff:
    points, before = [], 0
    for keep, sqnr in SQNR.items():
        share = (0.5 if keep < 4 else 0.9) if accuracy else None
        points.append(a_point(keep, sqnr, [f"op{number}" for number in range(before, keep)], accuracy=share))
        before = keep
    return a_tradeoff({"ranking": points}, 20)


def with_curves(found: Tradeoff, **curves: Iterable[Point]) -> Tradeoff:
    """A trade-off with more curves."""
    return replace(found, curves=found.curves | {order: list(curve) for order, curve in curves.items()})


@pytest.mark.parametrize(
    ("target", "keep"),
    [
        ({"min_sqnr_db": 5.0}, 0),
        ({"min_sqnr_db": 12.0}, 1),
        ({"min_sqnr_db": 26.0}, 8),
        ({"max_accuracy_drop": 0.1}, 4),
        ({"min_sqnr_db": 10.0, "max_weight_bytes": 110}, 1),
    ],
)
def test_recommended_is_the_smallest_that_reaches_the_target(target: dict[str, Any], keep: int) -> None:
    recommended = build_profiles(tradeoff(), Target(**target)).profiles["recommended"]
    assert recommended.keep == keep
    assert recommended.kept == tuple(f"op{number}" for number in range(keep))
    assert recommended.assignment == assigned(f"op{number}" for number in range(keep, 20))


def test_where_no_keep_list_reaches_the_target_that_is_said() -> None:
    found = build_profiles(tradeoff(), Target(min_sqnr_db=26.0, max_weight_bytes=150))
    assert "recommended" not in found.profiles
    assert found.missed.endswith("an SQNR of at least 26.0 dB and weights of at most 150 bytes")


def test_an_accuracy_is_not_asked_of_samples_without_answers() -> None:
    found = build_profiles(tradeoff(accuracy=False), Target(max_accuracy_drop=0.0))
    assert "recommended" not in found.profiles
    assert "no held-out sample has an answer" in found.missed


def test_a_named_profile_is_the_best_keep_list_of_its_share_and_no_longer_one_is_worse() -> None:
    found = tradeoff()
    names = ("minimal", "moderate", "aggressive", "max")
    assert [build_profiles(found, Target()).profiles[name].keep for name in names] == [1, 1, 1, 8]
    found = with_point(found, "ranking", 4, sqnr_db=24.5, relative_error=10**-2.45)  # eight ops, worse than four
    assert [build_profiles(found, Target()).profiles[name].keep for name in names] == [1, 1, 1, 4]


def test_the_largest_weights_first_are_taken_where_they_do_better_and_random_lists_never() -> None:
    found = tradeoff()
    better = [replace(point, relative_error=point.relative_error / 2) for point in found.curves["ranking"]]
    found = with_curves(found, weight_bytes=better, random_0=[replace(point, relative_error=0.0) for point in better])
    assert build_profiles(found, Target()).profiles["max"].order == "weight_bytes"


def test_all_ops_in_fp32_are_no_profile() -> None:
    found = build_profiles(tradeoff(), Target(min_sqnr_db=99.0))
    assert "recommended" not in found.profiles and "leaves an op in INT8" in found.missed


def test_a_byte_budget_alone_is_filled_with_what_leaves_the_least_error() -> None:
    assert build_profiles(tradeoff(), Target(max_weight_bytes=125)).profiles["recommended"].keep == 1
    assert build_profiles(tradeoff(), Target(max_weight_bytes=180)).profiles["recommended"].keep == 8


def test_without_a_target_nothing_is_recommended() -> None:
    found = build_profiles(tradeoff(), Target())
    assert "recommended" not in found.profiles and found.missed.endswith("sets no target")


def test_without_a_measurement_there_are_no_profiles() -> None:
    found = build_profiles(NotMeasured("not_measured", "tradeoff.heldout_batches is 0"), Target())
    assert found.profiles == {} and "heldout_batches is 0" in found.missed


def test_a_greedy_keep_list_is_recommended_where_it_is_smaller_or_better() -> None:
    found = with_curves(tradeoff(), greedy=tradeoff().curves["ranking"][:3])
    found = with_point(found, "greedy", 2, sqnr_db=30.0, relative_error=1e-3, added=("op7",))
    recommended = build_profiles(found, Target(min_sqnr_db=25)).profiles["recommended"]
    assert (recommended.order, recommended.keep, recommended.kept) == ("greedy", 2, ("op0", "op7"))
    found = with_point(found, "greedy", 2, sqnr_db=11.5, relative_error=10**-1.15)
    assert build_profiles(found, Target(min_sqnr_db=25)).profiles["recommended"].order == "ranking"


def curve(sqnr_of: dict[int, float | None]) -> Tradeoff:
    """A trade-off of 64 ops with such SQNRs by the number of kept ops."""
    return a_tradeoff({"ranking": [a_point(keep, sqnr, accuracy=0.5) for keep, sqnr in sqnr_of.items()]}, 64)


@pytest.mark.parametrize(
    ("sqnr_of", "keep"),
    [
        # Over log2(1 + kept), 0 to 5, the distances from the chord are 0.3, 0.5, 0.35, 0.2 at 1, 3, 7, 15.
        ({0: 0.0, 1: 5.0, 3: 9.0, 7: 9.5, 15: 10.0, 31: 10.0, 64: None}, 3),
        ({0: 0.0, 1: 9.0, 3: 9.1, 7: 9.2, 15: 9.3, 31: 10.0, 64: None}, 1),
        # A list beyond half of the ops, such as 63 with next to no error, moves nothing.
        ({0: 0.0, 1: 9.0, 3: 9.1, 7: 9.2, 15: 9.3, 31: 10.0, 63: 90.0, 64: None}, 1),
        # A list worse than a shorter one is not a point of the curve.
        ({0: 0.0, 1: 5.0, 3: 9.0, 7: 2.0, 15: 9.5, 31: 10.0, 64: None}, 3),
        ({0: -6.0, 1: -1.0, 3: 3.0, 7: 3.5, 15: 4.0, 31: 4.0, 64: None}, 3),
        ({0: 0.0, 1: 2.0, 3: 4.0, 7: 6.0, 15: 8.0, 31: 10.0, 64: None}, None),  # straight
        ({0: 0.0, 1: 0.1, 3: 0.2, 7: 1.0, 15: 3.0, 31: 10.0, 64: None}, None),  # bends the other way
        ({0: 5.0, 1: 5.0, 3: 5.0, 64: None}, None),  # keeping buys nothing
        ({0: None, 1: None, 64: None}, None),
        ({0: 5.0, 64: None}, None),
    ],
)
def test_the_knee_is_the_point_farthest_from_the_chord(sqnr_of: dict[int, float | None], keep: int | None) -> None:
    found = build_profiles(curve(sqnr_of), Target()).knee
    assert (found and found.keep) == keep


def test_the_knee_may_be_of_any_order_that_has_a_reason() -> None:
    found = curve({0: 0.0, 1: 5.0, 3: 9.0, 7: 9.5, 15: 10.0, 31: 10.5, 64: None})
    better = curve({0: 0.0, 1: 5.0, 3: 9.2, 7: 9.5, 15: 10.0, 31: 10.5, 64: None})
    far = curve({3: 60.0})
    found = with_curves(found, weight_bytes=better.curves["ranking"], random_0=far.curves["ranking"])
    knee = build_profiles(found, Target()).knee
    assert knee and (knee.order, knee.keep) == ("weight_bytes", 3)


def test_a_missed_target_has_the_nearest_list_and_what_it_lacks_and_a_reached_one_has_none() -> None:
    found = build_profiles(tradeoff(), Target(min_sqnr_db=45.0))
    assert found.nearest and (found.nearest.keep, found.short) == (8, {"min_sqnr_db": 5.0})
    found = build_profiles(tradeoff(), Target(min_sqnr_db=45.0, max_weight_bytes=120))
    assert found.nearest and (found.nearest.keep, found.short) == (1, {"min_sqnr_db": 33.0})
    found = build_profiles(tradeoff(), Target(min_sqnr_db=40.0))
    assert (found.nearest, found.short) == (None, {})
    found = build_profiles(tradeoff(accuracy=False), Target(min_sqnr_db=45.0, max_accuracy_drop=0.1))
    assert (found.nearest, found.short) == (None, {})


def test_the_terminal_says_the_share_of_the_weights_and_never_keep_nothing_of_a_part(tmp_path: Path) -> None:
    group = {"pattern": "experts", "class": "Experts", "count": 1, "weights": 50, "bytes": 200}
    share = {"weights_total": 100, "weights_planned": 50, "weights_kept": 0, "share": 0.5, "left_out": [group]}
    plan = write_document(
        tmp_path / "plan.json", "plan", body_of(a_plan([f"op{number}" for number in range(20)], coverage=share))
    )
    write_document(tmp_path / "tradeoff.json", "tradeoff", body_of(tradeoff()), [plan])
    command = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "build_profiles.py")]
    command += ["--plan", "plan.json", "--tradeoff", "tradeoff.json", "--profiles", "profiles.json"]
    command += ["--target", '{"min_sqnr_db": 5.0, "max_accuracy_drop": null, "max_weight_bytes": null}']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    share_said, warning, recommended = ended.stdout.splitlines()
    assert share_said == "profiles: 20 ops hold 50.0 % of the weights"
    assert warning.startswith("warning: The planned ops hold only 50.0 % of the model's weights")
    expected = "recommended: Keep no op of the 20 planned ones: INT8 reaches the target as it is."
    assert recommended == expected
