"""Why the worst units break, and which cures regain their loss at no cost.

In: the frontier with its profiles, the model, and its batches. Out: the record `Why`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from auto_quantize_model.decide.cures import Percentiles, Subject, UnitCures, scheme_with
from auto_quantize_model.measure.alone import Alone, Records, distance_of, regained
from auto_quantize_model.measure.folding import folding_of
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.measure.why import watch_inputs
from auto_quantize_model.models.sample import samples_in
from auto_quantize_model.records import Cause, Cured, Frontier, Options, Plan, Profile, Profiles, Scales, Why
from auto_quantize_model.replay.model import Batch

WORST = 3  # units that are explained in their worst scheme
OF_PROFILE = 1  # units of each profile that are explained in the scheme that they have there
HELDOUT = 8  # held-out batches that say whether a cure of one unit helps
Progress = Callable[[int, int], None]  # done and total, in forwards
States = Mapping[str, dict[str, str]]  # assignments by name


def subjects_of(plan: Plan, frontier: Frontier, profiles: Profiles) -> list[Subject]:
    """The worst units, each in its worst scheme, and the worst units of each profile; the largest loss first.

    A scheme that a checkpoint holds is left out, because its tool has chosen all ranges already. So are the experts of
    a block, each of which has other inputs.
    """
    units = [unit for unit in frontier.units if unit.name not in units_of_experts(plan)]
    able = {name for name in frontier.candidates if "checkpoint" not in plan.schemes[name]}
    chosen: dict[tuple[str, str], Options] = {}

    def add(pairs: Sequence[tuple[Options, str]], count: int) -> None:
        worst = sorted((pair for pair in pairs if pair[0].loss[pair[1]] > 0), key=lambda pair: -pair[0].loss[pair[1]])
        chosen.update({(unit.name, scheme): unit for unit, scheme in worst[:count]})

    given = {
        name: dict(zip((unit.name for unit in frontier.units), profile.point.schemes, strict=True))
        for name, profile in profiles.profiles.items()
    }
    in_any = [(unit, sorted(able & unit.loss.keys(), key=lambda name: -unit.loss[name])) for unit in units]
    add([(unit, schemes[0]) for unit, schemes in in_any if schemes], WORST)
    for schemes in given.values():
        add([(unit, schemes[unit.name]) for unit in units if schemes[unit.name] in able], OF_PROFILE)
    found = [
        Subject(unit, scheme, tuple(name for name, schemes in given.items() if schemes[unit.name] == scheme))
        for (_, scheme), unit in chosen.items()
    ]
    return sorted(found, key=lambda subject: -subject.loss)


def units_of_experts(plan: Plan) -> set[str]:
    """The units that hold the experts of a block."""
    return {op.unit for op in plan.ops if op.expert}


def explain(
    model: torch.nn.Module,
    plan: Plan,
    frontier: Frontier,
    profiles: Profiles,
    scales: Scales,
    percentiles: Percentiles,
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    store: ScoreStore,
    on_progress: Progress = lambda done, total: None,
) -> Why:
    """Explain the worst units and those of the profiles, and try the cures.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: the plan behind the frontier.
        frontier: of schemes of compressed-tensors.
        profiles: of the frontier.
        scales: of all calibration batches together.
        percentiles: {op: {percentile: value}} of the inputs that the calibration saw.
        calibration: all calibration batches; the first ones were scored.
        heldout: the held-out batches of the frontier.
        store: keeps the record of each forward.
        on_progress: called after each forward.

    Raises:
        InputError: a number is not finite.
    """
    subjects = subjects_of(plan, frontier, profiles)
    few, scored = heldout[:HELDOUT], calibration[: plan.confidence_batches]
    done, total = itertools.count(1), len(calibration) + len(few)

    def on_forward() -> None:
        on_progress(next(done), total)

    inputs = watch_inputs(model, [subject.unit.ops[0] for subject in subjects], calibration, few, on_forward)
    subjects = [subject for subject in subjects if subject.unit.ops[0] in inputs]  # the others did not run
    device = next(model.parameters()).device
    first = {name: tensor.to(device) for name, tensor in calibration[0].items()}
    folds = {subject.unit.name: folding_of(model, subject.unit.ops, plan.measured_op, first) for subject in subjects}
    with Alone(model, plan, scales, store, on_forward) as alone:
        found = [
            UnitCures(subject, alone, inputs[subject.unit.ops[0]], folds[subject.unit.name], scales, percentiles)
            for subject in subjects
        ]

        def measure(batches: Sequence[Batch], states: Callable[[UnitCures], States], into: str) -> None:
            nonlocal total
            wanted = {
                f"{index} {name}": state for index, own in enumerate(found) for name, state in states(own).items()
            }
            total += len(wanted) * len(batches)
            for key, records in alone.measure(batches, wanted).items():
                index, _, name = key.partition(" ")
                getattr(found[int(index)], into)[name] = records

        measure(scored, UnitCures.states, "on_calibration")
        for own in found:
            own.combine()
        measure(scored, UnitCures.combined, "on_calibration")
        measure(few, UnitCures.best, "on_heldout")
        causes = tuple(own.cause() for own in found)
        choices = {name: cured_states(profile, name, causes) for name, profile in profiles.profiles.items()}
        total += len(scored) * sum(map(len, choices.values())) + len(heldout) * len(choices)
        cured = {
            name: cured_profile(profiles.profiles[name], states, causes, alone, scored, heldout)
            for name, states in choices.items()
            if len(states) > 1
        }
    return Why(
        calibration_batches=len(scored),
        heldout_batches=len(few),
        heldout_samples=sum(map(samples_in, few)),
        causes=causes,
        cured=cured,
        skipped=skipped(plan, frontier),
    )


def skipped(plan: Plan, frontier: Frontier) -> tuple[str, ...]:
    """What is not explained, in words."""
    names = [name for name in frontier.candidates if "checkpoint" in plan.schemes[name]]
    found = [
        f"{name} is the scheme of a checkpoint, whose tool has chosen its ranges, so that scheme is not explained"
        for name in names
    ]
    if experts := len(units_of_experts(plan)):
        blocks = f"{experts} block{'s' * (experts != 1)}"
        found.append(f"Each expert has other inputs, so the experts of {blocks} are not explained")
    return tuple(found)


def cured_states(profile: Profile, name: str, causes: Sequence[Cause]) -> dict[tuple[str, ...], dict[str, str]]:
    """The states of a profile by the units that have their chosen cure: no unit, all units, and each one alone."""
    able = {cause.unit: cause for cause in causes if name in cause.profiles and cause.cure}
    sets = dict.fromkeys([(), tuple(able), *((unit,) for unit in able)])
    found = {}
    for units in sets:
        state = dict(profile.assignment)
        for unit in units:
            cause = able[unit]
            if cause.cure:
                state |= dict.fromkeys(cause.ops, scheme_with(cause.scheme, cause.cure.settings))
        found[units] = state
    return found


def cured_profile(
    profile: Profile,
    states: Mapping[tuple[str, ...], dict[str, str]],
    causes: Sequence[Cause],
    alone: Alone,
    scored: Sequence[Batch],
    heldout: Sequence[Batch],
) -> Cured:
    """A profile with those cures that the calibration batches choose, compared with the profile on held-out batches.

    A cure that helps a unit alone may not help among the errors of the other units, so the whole is measured.
    """
    on_scored = alone.measure(scored, {"+".join(units): state for units, state in states.items()})
    tried = max(states, key=len)
    units = min(states, key=lambda units: distance_of(on_scored["+".join(units)]).divergence)
    before = profile.point.divergence
    if not units:
        return Cured(tried, (), before)
    (records,) = alone.measure(heldout, {"cured": states[units]}).values()
    values = iter(profile.point.divergence_by_sample)
    own: Records = [{**record, "divergences": [next(values) for _ in record["divergences"]]} for record in records]
    return Cured(tried, units, before, distance_of(records).divergence, *regained(own, records))
