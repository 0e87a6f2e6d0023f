"""Profiles: the measured choices with a name, `smallest`, `balanced` and `safest`.

In: the frontier, and the config's target. Out: the profiles that exist, and why another does not exist.
"""

import math
from collections.abc import Sequence

from auto_quantize_model.config import Target
from auto_quantize_model.records import Frontier, NotMeasured, Plan, Point, Profile, Profiles

NAMES = ("smallest", "balanced", "safest")
# If no point of a curve is farther than this from its chord, on axes from 0 to 1, the curve is straight: without knee.
STRAIGHT = 0.05


def build_profiles(frontier: Frontier | NotMeasured, plan: Plan, target: Target) -> Profiles:
    """The profiles of a frontier.

    `smallest` has the fewest bytes of all measured choices that reach the target. `balanced` is the knee of the curve,
    as `knee` says. `safest` has the least divergence within the budget. No profile is worse than a smaller choice.
    """
    asked = target.model_dump()
    if isinstance(frontier, NotMeasured):
        return Profiles(asked, {}, dict.fromkeys(NAMES, f"nothing was measured: {frontier.reason}"))
    points = offered(frontier)
    found: dict[str, Point | None] = {
        "smallest": smallest(points, frontier.unquantized, target),
        "balanced": knee(points),
        "safest": safest(points, target),
    }
    missed = {
        "smallest": without_smallest(points, frontier, target),
        "balanced": "the measured curve has no knee: each byte buys about the same",
        "safest": without_safest(points, target),
    }
    profiles = {}
    for name, point in found.items():
        if point:
            assignment = frontier.assignment(point)
            kept = tuple(op.op_name for op in plan.ops if op.ran and op.op_name not in assignment)
            profiles[name] = Profile(point, assignment, kept)
    return Profiles(asked, profiles, {name: why for name, why in missed.items() if name not in profiles})


def offered(frontier: Frontier) -> list[Point]:
    """The measured choices that quantize something and have less divergence than every smaller one, growing.

    Uniform schemes count as choices. Random choices and the rule of first and last layers are controls alone.
    """
    known = [*frontier.points, *(point for point in frontier.controls if point.kind == "uniform")]
    found: list[Point] = []
    for point in sorted(known, key=lambda point: (point.weight_bytes, point.divergence)):
        better = not found or point.divergence < found[-1].divergence
        if better and set(point.schemes) != {"unquantized"}:
            found.append(point)
    return found


def smallest(points: Sequence[Point], unquantized: Point, target: Target) -> Point | None:
    """The first of growing points that reaches the target; None without a target or such a point."""
    if not has_loss_target(target):
        return None
    return next((point for point in points if reaches(point, unquantized, target)), None)


def safest(points: Sequence[Point], target: Target) -> Point | None:
    """The point with the least divergence within the budget; None without a budget or such a point."""
    if not has_budget(target):
        return None
    return min((point for point in points if fits(point, target)), key=lambda point: point.divergence, default=None)


def has_loss_target(target: Target) -> bool:
    """Whether the target limits what the output may lose."""
    return any(value is not None for value in (target.max_divergence, target.max_accuracy_drop, target.min_sqnr_db))


def has_budget(target: Target) -> bool:
    """Whether the target limits what the weights may take."""
    return any(value is not None for value in (target.max_bits, target.max_weight_bytes, target.max_seconds))


def reaches(point: Point, unquantized: Point, target: Target) -> bool:
    """Whether a choice loses no more than the target allows in every part that is set; false without any part."""
    parts = []
    if target.max_divergence is not None:
        parts.append(point.divergence <= target.max_divergence)
    if target.max_accuracy_drop is not None:
        known = point.accuracy is not None and unquantized.accuracy is not None
        parts.append(known and dropped(point, unquantized) <= target.max_accuracy_drop)
    if target.min_sqnr_db is not None:
        parts.append(point.sqnr_db is None or point.sqnr_db >= target.min_sqnr_db)
    return bool(parts) and all(parts)


def fits(point: Point, target: Target) -> bool:
    """Whether a choice is within the budget in every part that is set."""
    if target.max_bits is not None and point.bits > target.max_bits:
        return False
    if target.max_seconds is not None and not (point.seconds is not None and point.seconds <= target.max_seconds):
        return False
    return target.max_weight_bytes is None or point.weight_bytes <= target.max_weight_bytes


def dropped(point: Point, unquantized: Point) -> float:
    """The share of answers that a choice loses; both accuracies must have been measured."""
    assert point.accuracy is not None and unquantized.accuracy is not None  # noqa: S101  callers check first
    return unquantized.accuracy - point.accuracy


def knee(points: Sequence[Point]) -> Point | None:
    """The point beyond which more bytes bring less; None if the curve has no such bend.

    By Kneedle (Satopaa, Albrecht, Irwin and Raghavan, "Finding a 'Kneedle' in a Haystack", 2011). The knee is the point
    with the greatest distance from the chord between the curve's ends, both axes scaled to 0 to 1. The axes are the
    bytes and the logarithm of the divergence.
    """
    curve = [point for point in points if point.divergence > 0]
    if len(curve) < 3:
        return None
    first, last = curve[0], curve[-1]

    def distance(point: Point) -> float:
        lost = math.log(first.divergence / point.divergence) / math.log(first.divergence / last.divergence)
        return lost - (point.weight_bytes - first.weight_bytes) / (last.weight_bytes - first.weight_bytes)

    farthest = max(curve[1:-1], key=distance)
    return farthest if distance(farthest) > STRAIGHT else None


def without_smallest(points: Sequence[Point], frontier: Frontier, target: Target) -> str:
    """Why there is no smallest profile, as a clause."""
    if not has_loss_target(target):
        return "the config's profiles block sets no limit for the loss"
    if target.max_accuracy_drop is not None and frontier.unquantized.accuracy is None:
        return f"no held-out sample has an answer: the target is {described(target)}"
    best = min((point.divergence for point in points), default=None)
    nearest = "" if best is None else f"; the best one has a divergence of {best:.3g}"
    return f"no measured choice reaches the target ({described(target)}){nearest}"


def without_safest(points: Sequence[Point], target: Target) -> str:
    """Why there is no safest profile, as a clause."""
    if not has_budget(target):
        return "the config's profiles block sets no budget"
    fewest = min(points, key=lambda point: point.weight_bytes, default=None)
    if fewest is None:
        nearest = ""
    else:
        nearest = f"; the smallest has {fewest.bits:.2f} bits a weight, {fewest.weight_bytes} bytes"
        times = [point.seconds for point in points if point.seconds is not None]
        nearest += f", and the fastest measured one takes {min(times):g} s" if times else ""
    return f"no choice of schemes fits the budget ({described(target, budget=True)}){nearest}"


def described(target: Target, budget: bool = False) -> str:
    """The parts of a target that are set: those of the loss, or those of the budget."""
    texts = {
        "max_divergence": "a divergence of at most {}",
        "max_accuracy_drop": "an accuracy drop of at most {}",
        "min_sqnr_db": "an SQNR of at least {} dB",
        "max_bits": "at most {} bits a weight",
        "max_weight_bytes": "at most {} bytes",
        "max_seconds": "at most {} seconds",
    }
    of_budget = ("max_bits", "max_weight_bytes", "max_seconds")
    asked = target.model_dump(exclude_none=True)
    return " and ".join(
        text.format(asked[name]) for name, text in texts.items() if name in asked and (name in of_budget) == budget
    )
