"""The frontier: for growing budgets the best choice of a scheme for each unit, proved on held-out samples.

In: the plan, the capture, the config's block decide, and the held-out batches. Out: the options of each unit, and the
measured points.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from auto_quantize_model.config import DecideSpec, Target
from auto_quantize_model.decide.allocate import (
    Choice,
    allocate,
    at_random,
    budgets,
    bytes_of,
    edges_first,
    loss_of,
    seconds_of,
    smallest,
    state_of,
    uniform,
)
from auto_quantize_model.decide.profiles import reaches
from auto_quantize_model.decide.ranking import aggregated
from auto_quantize_model.decide.refine import Budget, Refinement
from auto_quantize_model.escape import quoted
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.capture import arithmetic
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.parts import require_all
from auto_quantize_model.measure.states import UNITS
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.sample import samples_in
from auto_quantize_model.records import Capture, Frontier, HeldOutPart, Op, Options, Plan, Point, Scales, Unit
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.schemes.scheme import INC_INT8, UNQUANTIZED

SEEDS = 3  # random choices for each budget with controls
CONTROLLED = 4  # budgets with controls, evenly among the points between the smallest and the unquantized model
NEAR = 0.005  # the smallest model that reaches a target is found within this share of its bytes
REFINED = "refined"  # the name of a point whose choice was refined
STEPS = 8  # and within so many steps
Progress = Callable[[int, int], None]  # done and total, in forwards


def deciding_units(plan: Plan, candidates: Sequence[str]) -> list[Unit]:
    """The units that a decision is about: those that ran and can have a candidate.

    INC holds each op as a matrix of its own, so with `inc_int8` only tied weights form units.
    """
    ran = {op.op_name for op in plan.ops if op.ran}
    if INC_INT8 in candidates:
        groups = [ops for unit in plan.units for ops in ([unit.ops] if unit.tied else [(name,) for name in unit.ops])]
        found = [Unit("+".join(ops), ops, len(ops) > 1, (INC_INT8,), {}) for ops in groups]
    else:
        found = [unit for unit in plan.units if not set(candidates).isdisjoint(unit.schemes)]
    return [unit for unit in found if not ran.isdisjoint(unit.ops)]


def options_of(plan: Plan, capture: Capture, candidates: Sequence[str], spec: DecideSpec) -> tuple[str, list[Options]]:
    """What is summed to choose, and the options of each unit that the config allows.

    A loss is the mean over the scored batches of a unit quantized alone. Where it was not measured, it is an estimate.

    Raises:
        InputError: a pattern of the config matches no unit, or leaves a unit without any option.
    """
    units, ops = deciding_units(plan, candidates), {op.op_name: op for op in plan.ops}
    by = "divergence" if all(score.divergence is not None for score in capture.scores) else "relative_error"
    references = [batch.reference for batch in capture.batches]
    scores = {scheme: capture.of_map("isolated", scheme) | capture.of_map(UNITS, scheme) for scheme in candidates}
    estimates = {scheme: capture.estimates_of(scheme) for scheme in candidates}
    found = []
    for unit in units:
        allowed = allowed_of(unit, candidates, spec, bytes_in(unit, ops))
        loss: dict[str, float] = {UNQUANTIZED: 0.0}
        error: dict[str, float] = {}
        for scheme in allowed:
            if scheme == UNQUANTIZED:
                continue
            if of_unit := scores[scheme].get(unit.name):
                loss[scheme] = aggregated(of_unit, references)[by] or 0.0  # a measured score has both metrics
            elif made := estimates[scheme].get(unit.name):
                loss[scheme], error[scheme] = made.divergence, made.standard_error
            else:
                raise InputError(f"{unit.name} was not measured in {scheme}; {advice_to_measure(plan, scheme)}")
        weights = [ops[name].weight_bytes // 4 for name in unit.ops]
        size = weights[0] if unit.tied else sum(weights)
        losses = {name: loss[name] for name in allowed}
        active = ops[unit.ops[0]].active
        found.append(Options(unit.name, unit.ops, size, allowed, losses, error, times_of(unit, allowed, spec), active))
    require_matches(spec, units)
    return by, found


def advice_to_measure(plan: Plan, scheme: str) -> str:
    """What the user can do about a unit without a score."""
    if scheme == INC_INT8 and plan.engine != "replay":
        return "INC as the engine measures each op alone; set sensitivity.engine to replay"
    return "capture again with the candidates of the config (snakemake --cores 1 --forcerun capture_sensitivity)"


def times_of(unit: Unit, schemes: Iterable[str], spec: DecideSpec) -> dict[str, float]:
    """The seconds of a unit's ops in each scheme, by the first pattern that matches an op; empty without a table.

    Raises:
        InputError: the table has no time for an op in a scheme that the op can get.
    """
    found: dict[str, float] = {}
    for name in unit.ops if spec.seconds else ():
        of_op = next((times for pattern, times in spec.seconds.items() if re.fullmatch(pattern, name)), {})
        for scheme in schemes:
            if scheme not in of_op:
                raise InputError(
                    f"decide.seconds: no time for {name} in {scheme}; each op needs one for every scheme it can get"
                )
            found[scheme] = found.get(scheme, 0.0) + of_op[scheme]
    return found


def bytes_in(unit: Unit, ops: Mapping[str, Op]) -> dict[str, int]:
    """The bytes of a unit in each scheme that it can have, and unquantized: BF16, or FP32 next to INC's INT8."""
    sizes = {
        scheme: sum(ops[name].stored_bytes[scheme] for name in unit.ops)
        for scheme in unit.schemes
        if all(scheme in ops[name].stored_bytes for name in unit.ops)
    }
    in_fp32 = [ops[name].weight_bytes for name in unit.ops]
    whole = in_fp32[0] if unit.tied else sum(in_fp32)
    return {**sizes, UNQUANTIZED: whole if INC_INT8 in unit.schemes else whole // 2}


def allowed_of(unit: Unit, candidates: Sequence[str], spec: DecideSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes of a unit in each option that the config allows.

    Raises:
        InputError: no option is left.
    """
    found = {scheme: sizes[scheme] for scheme in (*candidates, UNQUANTIZED) if scheme in sizes}

    def matching(patterns: Mapping[str, Any]) -> list[Any]:
        return [value for pattern, value in patterns.items() if any(re.fullmatch(pattern, name) for name in unit.ops)]

    for scheme in matching(spec.fixed):
        if scheme not in sizes:
            why = unit.refused.get(scheme, "the plan has no bytes of that scheme for its ops")
            raise InputError(f"decide.fixed: {unit.name} cannot have {scheme}: {why}; remove the pattern")
        found = {name: size for name, size in found.items() if name == scheme}
    for schemes in matching(spec.never):
        found = {name: size for name, size in found.items() if name not in schemes}
    for scheme in matching(spec.at_least):
        fewest = sizes.get(scheme, sizes[UNQUANTIZED])
        found = {name: size for name, size in found.items() if size >= fewest}
    if not found:
        raise InputError(
            f"decide: fixed, never and at_least together leave {unit.name} no scheme; remove one of their patterns"
        )
    return found


def require_matches(spec: DecideSpec, units: Sequence[Unit]) -> None:
    """Refuse a pattern that matches no op of any unit.

    Raises:
        InputError: the message names the pattern.
    """
    names = [name for unit in units for name in unit.ops]
    for key in ("fixed", "never", "at_least", "seconds"):
        for pattern in getattr(spec, key):
            if not any(re.fullmatch(pattern, name) for name in names):
                raise InputError(
                    f"decide.{key}: {quoted(pattern)} matches no op that can be quantized; patterns match whole names,"
                    f" such as {quoted(re.escape(names[0]))}"
                )


def measure_frontier(
    model: torch.nn.Module,
    plan: Plan,
    capture: Capture,
    candidates: Sequence[str],
    scales: Scales,
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    store: ScoreStore,
    spec: DecideSpec,
    target: Target,
    calibration: Sequence[Batch] = (),
    on_progress: Progress = lambda done, total: None,
    parts: Sequence[HeldOutPart] = (),
) -> Frontier:
    """Choose for growing budgets, and measure each choice and the controls on the held-out batches.

    More choices are measured between the smallest one that reaches the target and the next smaller one. So the profile
    `smallest` is the smallest.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: as `inc.plan.build_plan` returns it.
        capture: of the plan, with the candidates.
        candidates: the schemes to choose from.
        scales: of all calibration batches together.
        heldout: batches that no calibration has used.
        answers: for each sample of each held-out batch, the positions of its answer's tokens; None without an answer.
        store: keeps the record of each forward; a record in the store is not measured again.
        spec: the config's block decide.
        target: the config's block profiles.
        calibration: the batches that set the scales. The choices for the budgets of the target are refined on the first
            `spec.refine_batches` of these.
        on_progress: called after each forward, or what takes as long.
        parts: what `in_parts.measure_part` measured of the choices that are known from the start; without parts all is
            measured here.

    Raises:
        InputError: as `options_of` says, or a number is not finite. Or a part is missing, or other arithmetic did it.
    """
    by, units, other = units_of(plan, capture, candidates, spec)
    require_all(parts, arithmetic(next(model.parameters()).device))
    known = [record for part in parts for record in part.records]
    done, total = itertools.count(1), 0

    def on_forward() -> None:
        on_progress(next(done), total)

    with HeldOut(model, plan, scales, heldout, answers, store, on_forward, known) as on_heldout:
        decision = Decision(units, other, on_heldout)
        refinement = Refinement(units, on_heldout, calibration[: spec.refine_batches], on_forward)
        total = refinement.forwards * len(decision.asked(target))
        states = [*decision.frontier(spec, target), *decision.refined(refinement, target)]
        states += decision.controls(candidates, spec)
        total += len({choice for _, _, choice in states}) * len(heldout)
        points = decision.measured(states)
        for _ in range(STEPS):
            if (state := decision.between(points, target)) is None:
                break
            total += len(heldout)
            points += decision.measured([state])
        asked = on_heldout.asked
        positions = sum(of_batch["image_positions"] + of_batch["text_positions"] for of_batch in on_heldout.totals)
    size = lambda point: (point.weight_bytes, -point.predicted)  # noqa: E731
    return Frontier(
        **asdict(arithmetic(next(model.parameters()).device)),
        candidates=tuple(candidates),
        loss=by,
        units=tuple(units),
        other_bytes=other,
        calibration_batches=len(calibration),
        batches=len(heldout),
        samples=sum(map(samples_in, heldout)),
        tokens=round(positions),
        answers=asked,
        points=tuple(sorted((point for point in points if point.kind == "frontier"), key=size)),
        controls=tuple(point for point in points if point.kind != "frontier"),
    )


def units_of(
    plan: Plan, capture: Capture, candidates: Sequence[str], spec: DecideSpec
) -> tuple[str, list[Options], int]:
    """The loss that is summed, the units with their options, and the bytes of all other weights.

    Raises:
        InputError: as `options_of` says, or no unit can have a candidate.
    """
    by, units = options_of(plan, capture, candidates, spec)
    if not units:
        raise InputError(
            f"no op that ran can have {' or '.join(candidates)}, so nothing can be decided; change decide.candidates"
        )
    unit_bytes = 4 if INC_INT8 in candidates else 2
    return by, units, unit_bytes * (plan.coverage["weights_total"] - sum(unit.weights for unit in units))


State = tuple[str, str, Choice]  # kind and name of a point, and its choice


class Decision:
    """The choices of one frontier.

    Args:
        units: with their options.
        other_bytes: of all weights outside of the units.
        heldout: measures states.
    """

    def __init__(self, units: Sequence[Options], other_bytes: int, heldout: HeldOut) -> None:
        self.units, self.other_bytes, self.heldout = units, other_bytes, heldout
        self.weights = sum(unit.weights for unit in units)

    def asked(self, target: Target) -> list[Budget]:
        """The budgets that the target names, in bytes of the units.

        A budget that no choice can meet is left out; `build_profiles` says so.
        """
        found = []
        if target.max_bits is not None:
            found.append(int(target.max_bits * self.weights / 8))
        if target.max_weight_bytes is not None:
            found.append(target.max_weight_bytes - self.other_bytes)
        found = [size for size in found if size >= bytes_of(smallest(self.units), self.units)]
        asked = [Budget(size) for size in sorted(found)]
        if target.max_seconds is None:
            return asked
        most = min(found, default=bytes_of(uniform(self.units, UNQUANTIZED), self.units))
        in_time = Budget(most, target.max_seconds)
        try:
            self.best(in_time)
        except InputError:
            return asked
        return [*asked, in_time]

    def best(self, budget: Budget) -> Choice:
        """The choice with the least sum of losses within a budget.

        Raises:
            InputError: no choice fits.
        """
        return allocate(self.units, budget.bytes, budget.seconds)

    def frontier(self, spec: DecideSpec, target: Target) -> list[State]:
        """The best choice for each budget, each once, and last the one with the least loss of all."""
        sizes = [Budget(size) for size in budgets(self.units, spec.points)]
        asked = sorted([*sizes, *self.asked(target)], key=lambda budget: (budget.seconds is not None, budget.bytes))
        found = [*(self.best(budget) for budget in asked), uniform(self.units, UNQUANTIZED)]
        return [("frontier", "", choice) for choice in dict.fromkeys(found)]

    def refined(self, refinement: Refinement, target: Target) -> list[State]:
        """The refined choices for the budgets of the target, as far as they differ from the best ones."""
        if not refinement.batches:
            return []
        pairs = [(self.best(budget), budget) for budget in self.asked(target)]
        found = {choice: refinement.refined(choice, budget) for choice, budget in pairs}
        return [("frontier", REFINED, made) for choice, made in found.items() if made != choice]

    def controls(self, candidates: Sequence[str], spec: DecideSpec) -> list[State]:
        """Uniform schemes; and for some budgets random choices, and the first and last layers first; each once."""
        found = [("uniform", scheme, uniform(self.units, scheme)) for scheme in candidates]
        inner = budgets(self.units, spec.points)[1:-1]
        step = max(1, len(inner) // CONTROLLED)
        for budget in inner[::step][:CONTROLLED]:
            budget = bytes_of(allocate(self.units, budget), self.units)
            found += [("random", f"random_{seed}", at_random(self.units, budget, seed)) for seed in range(SEEDS)]
            found.append(("edges", "first and last layers", edges_first(self.units, budget)))
        known: dict[Choice, State] = {}
        for state in found:
            known.setdefault(state[2], state)
        return list(known.values())

    def measured(self, states: Sequence[State]) -> list[Point]:
        """The points of choices; a choice of several states is measured once."""
        choices = list(dict.fromkeys(choice for _, _, choice in states))
        metrics = dict(
            zip(choices, self.heldout.measure([state_of(choice, self.units) for choice in choices]), strict=True)
        )
        return [self.point(kind, name, choice, metrics[choice]) for kind, name, choice in states]

    def point(self, kind: str, name: str, choice: Choice, metrics: Mapping[str, Any]) -> Point:
        """A measured choice."""
        size = bytes_of(choice, self.units)
        loss, error = loss_of(choice, self.units)
        metrics = {**metrics, "seconds": seconds_of(choice, self.units), "active_bytes": self.active_bytes(choice)}
        return Point(kind, name, choice, size + self.other_bytes, 8 * size / self.weights, loss, error, **metrics)

    def active_bytes(self, choice: Choice) -> int | None:
        """The bytes of the weights that one token needs; None without experts."""
        if all(unit.active == 1 for unit in self.units):
            return None
        needed = (unit.active * unit.bytes[scheme] for unit, scheme in zip(self.units, choice, strict=True))
        return round(math.fsum(needed)) + self.other_bytes

    def between(self, points: Sequence[Point], target: Target) -> State | None:
        """A choice between the smallest that reaches the target and the largest below it; None if they are near."""
        known = sorted((point for point in points if point.kind == "frontier"), key=lambda point: point.weight_bytes)
        reached = [point for point in known if reaches(point, known[-1], target)]
        if not reached or reached[0] is known[0]:
            return None
        high = reached[0].weight_bytes
        low = max(point.weight_bytes for point in known if point.weight_bytes < high)
        if high - low <= NEAR * high:
            return None
        choice = allocate(self.units, (low + high) // 2 - self.other_bytes)
        return None if any(point.schemes == choice for point in known) else ("frontier", "", choice)
