"""From curves to a decision: which ops to keep in FP32, by measured keep-lists.

In: the trade-off as `tradeoff.measure_tradeoff` returns it, and the config's target. Out: named profiles, and the
smallest keep-list that reaches the target, or the statement that none does.
"""

import math
from dataclasses import dataclass
from typing import Any

from auto_quantize_model.files import InputError

# The share of ops that a profile may keep; one op at the least.
SHARES = {"minimal": 0.01, "moderate": 0.05, "aggressive": 0.15, "max": 0.4}
# The curves whose order has a reason; the ranking turned round and random orders are there to be compared with.
ORDERS = ("ranking", "greedy", "weight_bytes")


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
        {target, profiles: {name: profile}, missed}. A profile is a point of a curve with `order`, that curve, and
        `kept`, all its ops in that order. Each name of `SHARES` has the least error among the keep-lists that are no
        longer than its share of the ops, so a longer profile is never the worse one. `recommended` is as `recommended`
        returns it; where there is none, `missed` says why.
    """
    if tradeoff["status"] == "not_measured":
        return {"target": vars(target), "profiles": {}, "missed": f"nothing was measured: {tradeoff['reason']}"}
    curves = {order: with_kept(order, tradeoff["curves"].get(order, [])) for order in ORDERS}
    *_, fp32 = curves["ranking"]
    points = [point for curve in curves.values() for point in curve if point["keep"] < tradeoff["ops"]]
    found = {}
    for name, share in SHARES.items():
        longest = max(1, int(share * tradeoff["ops"]))
        found[name] = min((point for point in points if point["keep"] <= longest), key=_by_error)
    best, missed = recommended(points, fp32, target)
    if best:
        found["recommended"] = best
    return {"target": vars(target), "profiles": found, "missed": missed}


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
