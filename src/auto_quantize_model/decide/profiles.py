"""From curves to a decision: which ops to keep in FP32, by measured keep-lists.

In: the trade-off as `tradeoff.measure_tradeoff` returns it, and the config's target. Out: named profiles, and the
smallest keep-list that reaches the target, or the statement that none does.
"""

import math
from dataclasses import dataclass
from typing import Any

from auto_quantize_model.files import InputError

# The share of ops that a profile may keep; at least one op.
SHARES = {"minimal": 0.01, "moderate": 0.05, "aggressive": 0.15, "max": 0.4}
# The curves whose order has a reason; the ranking turned round and random orders are there to be compared with.
ORDERS = ("ranking", "greedy", "weight_bytes")

# A curve whose points are no farther than this from its chord, on axes from 0 to 1, is a straight line: it has no knee.
STRAIGHT = 0.05


@dataclass(frozen=True)
class Target:
    """The config's `profiles` block: what `recommended` has to reach, each null where it does not matter.

    `min_sqnr_db` is of the output on held-out samples; `max_accuracy_drop` a share of the answers that FP32 gets
    right; `max_weight_bytes` bounds the model's weights.

    Raises:
        InputError: a value is out of its range.
    """

    min_sqnr_db: float | None = None
    max_accuracy_drop: float | None = None
    max_weight_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.min_sqnr_db is not None and not math.isfinite(self.min_sqnr_db):
            raise InputError(f"profiles.min_sqnr_db: {self.min_sqnr_db} is no number of decibels")
        if self.max_accuracy_drop is not None and not 0 <= self.max_accuracy_drop <= 1:
            raise InputError(f"profiles.max_accuracy_drop: {self.max_accuracy_drop} is no share from 0 to 1")
        if self.max_weight_bytes is not None and self.max_weight_bytes < 1:
            raise InputError(f"profiles.max_weight_bytes: {self.max_weight_bytes} is no number of bytes")


def build_profiles(tradeoff: dict[str, Any], target: Target) -> dict[str, Any]:
    """Profiles out of the curves of `ORDERS`, each as measured.

    Returns:
        {target, profiles: {name: profile}, missed, knee, nearest, short}. A profile is a point of a curve with `order`,
        that curve, `kept`, all its ops in that order, and `worse` as `worse_than` returns it. Each name of `SHARES` has
        the least error among the keep-lists that are no longer than its share of the ops, so a longer profile never has
        more error. `recommended` is as `recommended` returns it; where there is none, `missed` says why. `knee` is as
        `knee` returns it. Where the target is missed, `nearest` is the list that comes nearest to it, and `short` what
        that list lacks, by part of the target; else null and empty.
    """
    none: dict[str, Any] = {"knee": None, "nearest": None, "short": {}}
    if tradeoff["status"] == "not_measured":
        return {"target": vars(target), "profiles": {}, "missed": f"nothing was measured: {tradeoff['reason']}"} | none
    curves = {order: with_kept(order, tradeoff["curves"].get(order, [])) for order in ORDERS}
    int8, *_, fp32 = curves["ranking"]
    points = [
        point | {"worse": worse_than(point, int8)}
        for curve in curves.values()
        for point in curve
        if point["keep"] < tradeoff["ops"]
    ]
    found = {}
    for name, share in SHARES.items():
        longest = max(1, int(share * tradeoff["ops"]))
        found[name] = min((point for point in points if point["keep"] <= longest), key=_by_error)
    best, missed = recommended(points, fp32, target)
    if best:
        found["recommended"] = best
    near, short = nearest(points, fp32, target) if not best else (None, {})
    return {
        "target": vars(target),
        "profiles": found,
        "missed": missed,
        "knee": knee(points, tradeoff["ops"]),
        "nearest": near,
        "short": short,
    }


def worse_than(point: dict[str, Any], int8: dict[str, Any]) -> dict[str, float]:
    """The metrics in which a keep-list does worse than all ops in INT8, each with the value of the latter."""
    higher_is_better = {"relative_error": False, "top1_agreement": True, "kl_divergence": False, "accuracy": True}
    return {
        name: int8[name]
        for name, higher in higher_is_better.items()
        if point.get(name) is not None
        and int8.get(name) is not None
        and (point[name] < int8[name] if higher else point[name] > int8[name])
    }


def knee(points: list[dict[str, Any]], ops: int) -> dict[str, Any] | None:
    """The keep-list beyond which keeping more ops buys less; None where the curve does not bend that way.

    By Kneedle (Satopaa, Albrecht, Irwin and Raghavan, "Finding a 'Kneedle' in a Haystack", 2011): the point with the
    greatest distance from the chord between the curve's ends, both axes scaled to 0 to 1. The axes are log(1 + kept
    ops) and SQNR in dB. The curve holds the least error of any order at each length, up to half of the ops: with nearly
    all of them in FP32 the SQNR shoots up, and no list of that length is of use.
    """
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=_by_length):
        better = not front or point["relative_error"] < front[-1]["relative_error"]
        if better and point["sqnr_db"] is not None and point["keep"] <= ops / 2:
            front.append(point)
    if len(front) < 3 or front[0]["keep"]:
        return None
    first, last = front[0], front[-1]  # of no op, at log(1 + 0) = 0, and of the most

    def distance(point: dict[str, Any]) -> float:
        gained = (point["sqnr_db"] - first["sqnr_db"]) / (last["sqnr_db"] - first["sqnr_db"])
        return gained - math.log1p(point["keep"]) / math.log1p(last["keep"])

    farthest = max(front[1:-1], key=distance)
    return farthest if distance(farthest) > STRAIGHT else None


def nearest(
    points: list[dict[str, Any]], fp32: dict[str, Any], target: Target
) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """The keep-list that lacks least of a target that none reaches, and what it lacks by part of the target.

    A budget of bytes comes first, then the SQNR, then the accuracy. None where the target is none, or asks for an
    accuracy that was not measured.
    """
    if set(vars(target).values()) == {None} or (target.max_accuracy_drop is not None and not fp32["accuracy"]):
        return None, {}

    def lacking(point: dict[str, Any]) -> dict[str, float]:
        found = {}
        if target.max_weight_bytes is not None:
            found["max_weight_bytes"] = max(0, point["weight_bytes"] - target.max_weight_bytes)
        if target.min_sqnr_db is not None:
            short = target.min_sqnr_db - point["sqnr_db"] if point["sqnr_db"] is not None else 0.0
            found["min_sqnr_db"] = max(0.0, short)
        if target.max_accuracy_drop is not None:
            found["max_accuracy_drop"] = max(0.0, fp32["accuracy"] - point["accuracy"] - target.max_accuracy_drop)
        return found

    best = min(points, key=lambda point: (*lacking(point).values(), *_by_length(point)))
    return best, {name: value for name, value in lacking(best).items() if value}


def recommended(
    points: list[dict[str, Any]], fp32: dict[str, Any], target: Target
) -> tuple[dict[str, Any] | None, str]:
    """The smallest keep-list that reaches the target and quantizes something, or None and why there is none.

    Of equally small ones it is the one with the least error. Of a byte budget alone every list within it would do, the
    empty one first of all; there the one with the least error is meant.
    """
    if set(vars(target).values()) == {None}:
        return None, "the config's profiles block sets no target"
    if target.max_accuracy_drop is not None and fp32["accuracy"] is None:
        return None, f"no held-out sample has an answer: the target is {described(target)}"
    if target.max_accuracy_drop is not None and fp32["accuracy"] == 0:
        return (
            None,
            f"FP32 itself answers no held-out sample right, so no drop shows: the target is {described(target)}",
        )
    reached = [point for point in points if reaches(point, fp32, target)]
    if not reached:
        return None, f"no measured keep-list that leaves an op in INT8 reaches it: the target is {described(target)}"
    only_bytes = target.min_sqnr_db is None and target.max_accuracy_drop is None
    return min(reached, key=_by_error if only_bytes else _by_length), ""


def _by_error(point: dict[str, Any]) -> tuple[float, int]:
    return point["relative_error"], point["keep"]


def _by_length(point: dict[str, Any]) -> tuple[int, float]:
    return point["keep"], point["relative_error"]


def with_kept(order: str, curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a curve with its name and all the ops that they keep, in place of those that they add."""
    points: list[dict[str, Any]] = []
    kept: list[str] = []
    for point in curve:
        kept = [*kept, *point["added"]]
        points.append({key: value for key, value in point.items() if key != "added"} | {"order": order, "kept": kept})
    return points


def reaches(point: dict[str, Any], fp32: dict[str, Any], target: Target) -> bool:
    """Whether a point meets every part of the target that is set; an SQNR of null is infinite."""
    if target.min_sqnr_db is not None and point["sqnr_db"] is not None and point["sqnr_db"] < target.min_sqnr_db:
        return False
    if target.max_accuracy_drop is not None and fp32["accuracy"] - point["accuracy"] > target.max_accuracy_drop:
        return False
    return target.max_weight_bytes is None or point["weight_bytes"] <= target.max_weight_bytes


def described(target: Target) -> str:
    """The parts of a target that are set, in words."""
    words = {
        "min_sqnr_db": "an SQNR of at least {} dB",
        "max_accuracy_drop": "an accuracy drop of at most {}",
        "max_weight_bytes": "weights of at most {} bytes",
    }
    return " and ".join(text.format(value) for name, text in words.items() if (value := vars(target)[name]) is not None)
