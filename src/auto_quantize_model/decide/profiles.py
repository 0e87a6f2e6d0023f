"""Choose which ops stay in FP32, from the measured keep-lists.

In: the trade-off, and the config's target. Out: named profiles, and the smallest keep-list that reaches the target, or
the statement that no list reaches it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from auto_quantize_model.config import Target
from auto_quantize_model.records import NotMeasured, Point, Profile, Profiles, Tradeoff
from auto_quantize_model.schemes.scheme import assigned

# The share of ops that a profile may keep, but at least one op.
SHARES = {"minimal": 0.01, "moderate": 0.05, "aggressive": 0.15, "max": 0.4}
# The curves whose order has a reason. The reversed ranking and random orders are only controls.
ORDERS = ("ranking", "greedy", "weight_bytes")

# If no point of a curve is farther than this from its chord, on axes from 0 to 1, the curve is straight: without knee.
STRAIGHT = 0.05


def build_profiles(tradeoff: Tradeoff | NotMeasured, target: Target) -> Profiles:
    """Profiles from the points of the curves of `ORDERS`, each as measured.

    Each name of `SHARES` has the least error among the keep-lists that are no longer than its share of the ops. So a
    longer profile never has more error. `recommended` and `knee` are as the functions of these names return them. If
    there is no recommended profile, `missed` says why. If no list reaches the target, `nearest` is the list that comes
    nearest to the target. `short` is then the gap to the target, by part of the target.
    """
    if isinstance(tradeoff, NotMeasured):
        return Profiles(target.model_dump(), {}, f"nothing was measured: {tradeoff.reason}", None, None, {})
    curves = {order: whole(order, tradeoff.curves.get(order, []), tradeoff.op_names) for order in ORDERS}
    int8, *_, fp32 = curves["ranking"]
    profiles = [
        replace(profile, worse=worse_than(profile, int8))
        for curve in curves.values()
        for profile in curve
        if profile.keep < tradeoff.ops
    ]
    found = {}
    for name, share in SHARES.items():
        longest = max(1, int(share * tradeoff.ops))
        found[name] = min((profile for profile in profiles if profile.keep <= longest), key=_by_error)
    best, missed = recommended(profiles, fp32, target)
    if best:
        found["recommended"] = best
    near, short = nearest(profiles, fp32, target) if not best else (None, {})
    return Profiles(target.model_dump(), found, missed, knee(profiles, tradeoff.ops), near, short)


def worse_than(profile: Profile, int8: Profile) -> dict[str, float]:
    """The metrics in which a keep-list does worse than all ops in INT8, each with the value of all ops in INT8."""
    higher_is_better = {"relative_error": False, "top1_agreement": True, "kl_divergence": False, "accuracy": True}
    found = {}
    for name, higher in higher_is_better.items():
        mine, other = getattr(profile, name), getattr(int8, name)
        if mine is not None and other is not None and (mine < other if higher else mine > other):
            found[name] = other
    return found


def knee(points: Sequence[Profile], ops: int) -> Profile | None:
    """The keep-list beyond which keeping more ops brings less; None if the curve has no such bend.

    By Kneedle (Satopaa, Albrecht, Irwin and Raghavan, "Finding a 'Kneedle' in a Haystack", 2011). The knee is the point
    with the greatest distance from the chord between the curve's ends, both axes scaled to 0 to 1. The axes are
    log(1 + kept ops) and SQNR in dB. The curve holds the least error of any order at each length, up to half of the
    ops. Longer lists are left out: with nearly all ops in FP32 the SQNR rises steeply, and such lists are of no use.
    """
    front: list[Profile] = []
    for point in sorted(points, key=_by_length):
        better = not front or point.relative_error < front[-1].relative_error
        if better and point.sqnr_db is not None and point.keep <= ops / 2:
            front.append(point)
    if len(front) < 3 or front[0].keep:
        return None
    first, last = front[0], front[-1]  # of no op, at log(1 + 0) = 0, and of the most ops

    def distance(point: Profile) -> float:
        gained = (_number(point) - _number(first)) / (_number(last) - _number(first))
        return gained - math.log1p(point.keep) / math.log1p(last.keep)

    farthest = max(front[1:-1], key=distance)
    return farthest if distance(farthest) > STRAIGHT else None


def nearest(points: Sequence[Profile], fp32: Profile, target: Target) -> tuple[Profile | None, dict[str, float]]:
    """If no keep-list reaches the target: the list that comes nearest, and its gap by part of the target.

    A budget of bytes comes first, then the SQNR, then the accuracy. None if no target is set, or if the target asks for
    an accuracy that was not measured.
    """
    if target == Target() or (target.max_accuracy_drop is not None and not fp32.accuracy):
        return None, {}

    def lacking(point: Profile) -> dict[str, float]:
        found: dict[str, float] = {}
        if target.max_weight_bytes is not None:
            found["max_weight_bytes"] = max(0, point.weight_bytes - target.max_weight_bytes)
        if target.min_sqnr_db is not None:
            found["min_sqnr_db"] = max(0.0, target.min_sqnr_db - _number(point))
        if target.max_accuracy_drop is not None:
            found["max_accuracy_drop"] = max(0.0, dropped(point, fp32) - target.max_accuracy_drop)
        return found

    best = min(points, key=lambda point: (*lacking(point).values(), *_by_length(point)))
    return best, {name: value for name, value in lacking(best).items() if value}


def recommended(points: Sequence[Profile], fp32: Profile, target: Target) -> tuple[Profile | None, str]:
    """The smallest keep-list that reaches the target and quantizes something, or None and the reason.

    Of equally small lists, the one with the least error is taken. If the target is only a byte budget, any list within
    it would do, the empty one too. So the list with the least error is taken then.
    """
    if target == Target():
        return None, "the config's profiles block sets no target"
    if target.max_accuracy_drop is not None and fp32.accuracy is None:
        return None, f"no held-out sample has an answer: the target is {described(target)}"
    if target.max_accuracy_drop is not None and fp32.accuracy == 0:
        return (
            None,
            f"FP32 itself answers no held-out sample right, so no drop shows: the target is {described(target)}",
        )
    reached = [point for point in points if reaches(point, fp32, target)]
    if not reached:
        return None, f"no measured keep-list that leaves an op in INT8 reaches it: the target is {described(target)}"
    only_bytes = target.min_sqnr_db is None and target.max_accuracy_drop is None
    return min(reached, key=_by_error if only_bytes else _by_length), ""


def _by_error(point: Profile) -> tuple[float, int]:
    return point.relative_error, point.keep


def _by_length(point: Profile) -> tuple[int, float]:
    return point.keep, point.relative_error


def _number(point: Profile) -> float:
    """The SQNR for a comparison; None is infinite."""
    return math.inf if point.sqnr_db is None else point.sqnr_db


def dropped(point: Profile, fp32: Profile) -> float:
    """The share of answers that a keep-list loses; both accuracies must have been measured."""
    assert point.accuracy is not None and fp32.accuracy is not None  # noqa: S101  `recommended` checks first
    return fp32.accuracy - point.accuracy


def whole(order: str, curve: Sequence[Point], op_names: Sequence[str]) -> list[Profile]:
    """The points of a curve as profiles: each has its whole assignment, where a point has only the added ops."""
    profiles: list[Profile] = []
    kept: tuple[str, ...] = ()
    for point in curve:
        kept = (*kept, *point.added)
        metrics = {key: value for key, value in asdict(point).items() if key != "added"}
        assignment = assigned(name for name in op_names if name not in kept)
        profiles.append(Profile(**metrics, order=order, kept=kept, worse={}, assignment=assignment))
    return profiles


def reaches(point: Profile, fp32: Profile, target: Target) -> bool:
    """Whether a keep-list meets every part of the target that is set."""
    if target.min_sqnr_db is not None and _number(point) < target.min_sqnr_db:
        return False
    if target.max_accuracy_drop is not None and dropped(point, fp32) > target.max_accuracy_drop:
        return False
    return target.max_weight_bytes is None or point.weight_bytes <= target.max_weight_bytes


def described(target: Target) -> str:
    """The parts of a target that are set, as text."""
    texts = {
        "min_sqnr_db": "an SQNR of at least {} dB",
        "max_accuracy_drop": "an accuracy drop of at most {}",
        "max_weight_bytes": "weights of at most {} bytes",
    }
    asked = target.model_dump(exclude_none=True)
    return " and ".join(text.format(asked[name]) for name, text in texts.items() if name in asked)
