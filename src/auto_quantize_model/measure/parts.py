"""A capture in parts: several jobs share its probes and its exact scores, and one joins what they found.

In: the same inputs as for a whole capture, and which part of how many. Out: a part, and from all parts the capture. Its
bytes are those of a capture by one job, because a score depends on its state and its batch alone.

A part is contiguous in the order in which one job would work, so that its states share their kept outputs. Each part
begins every batch, which is one forward in FP32, to know the states and their costs.
"""

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.capture import (
    ByReplay,
    Measured,
    Progress,
    Work,
    arithmetic_of,
    assembled,
    without_replay,
)
from auto_quantize_model.measure.effort import Costs, chosen, described_effort
from auto_quantize_model.measure.probes import Values
from auto_quantize_model.measure.states import ALL
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import (
    METRICS,
    Arithmetic,
    Capture,
    HeldOutPart,
    Part,
    Plan,
    ProbeValues,
    Scales,
    Score,
    ScoredBatch,
)
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Batch, OtherOrder, Replay

SAME_MACHINES = (
    "The bits of scores depend on the machine; run all parts on machines of one kind, with the same number of threads"
)


class Place(NamedTuple):
    """Which part of how many a job does; the first is number 1."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.parts}"


WHOLE = Place(1, 1)


def cut(costs: Sequence[float], parts: int) -> list[range]:
    """The positions of each part: contiguous, and of nearly equal cost.

    An item belongs to the part in which the middle of its cost lies. A part may be empty.
    """
    total, before = sum(costs) or 1.0, 0.0
    ends = [0] * parts
    for cost in costs:
        ends[min(parts - 1, int(parts * (before + cost / 2) / total))] += 1
        before += cost
    starts = [sum(ends[:number]) for number in range(parts)]
    return [range(start, start + count) for start, count in zip(starts, ends, strict=True)]


def measure_part(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    store: ScoreStore,
    place: Place,
    scales: Sequence[Scales],
    of_all: Scales | None,
    exact: str,
    candidates: Sequence[str] = (),
    estimated: Sequence[Part] | None = None,
    on_progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Part, dict[str, Any]]:
    """One part of the probes, or of the exact scores.

    Args:
        model, batches, plan, store, on_progress, say, candidates: as `capture.capture_sensitivity` takes them.
        place: which part.
        scales, of_all: as there, both calibrated before, so that all parts have the same.
        exact: as there. A budget of time is not offered: its outcome would differ from part to part.
        estimated: all parts of the probes. None does a part of the probes.

    Returns:
        (part, run_record).

    Raises:
        InputError: as there. Or the parts of the probes do not fit this one.
    """
    started = time.monotonic()
    scored = batches[: plan.confidence_batches]
    work = Work(model=model, batches=scored, plan=plan, store=store, candidates=candidates)
    by, tf32 = arithmetic_of(model)
    probes: list[ProbeValues] = []
    try:
        with Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(plan.schemes, model)) as replay:
            maps = [*plan.maps, ALL]
            by_replay = ByReplay(work, maps, plan.ops, replay, scales, of_all, on_progress)
            by_replay.base |= {"part": str(place)}  # a shelf of its own, so that no two parts write to one file
            costs, multiply_adds = by_replay.costs()
            work.effort = chosen(exact, None, costs, len(plan.ops), multiply_adds, replay.device.type)
            say(f"{place}; all parts together: {described_effort(work.effort, costs, len(plan.ops))}")
            if estimated is None:
                probes = part_of_probes(by_replay, place, costs)
            else:
                if work.effort.probes:
                    work.estimate(values_of(estimated, work.effort.probes, len(scored)))
                listed = states_of_all(by_replay)
                if estimated:
                    require_fitting(estimated, Part(number=1, parts=place.parts, **_fields(work, by, tf32)))
                part_of_scores(by_replay, place, listed)
    except OtherOrder as error:
        raise InputError(f"{error}; {without_replay(plan)}") from None
    scores = [
        Score(batch, label, scheme, name, **{key: record.get(key) for key in METRICS})  # type: ignore[arg-type]
        for (batch, scheme, label, name), record in work.scores.items()
    ]
    part = Part(
        number=place.number,
        parts=place.parts,
        **_fields(work, by, tf32),
        probes=tuple(probes),
        scores=tuple(scores),
    )
    return part, work.record(started)


def _fields(work: Work, by: Any, tf32: bool) -> dict[str, Any]:
    """The fields of a part that are the same in all parts."""
    batches = tuple(ScoredBatch(index, reference) for index, reference in sorted(work.references.items()))
    return {
        "arithmetic": by,
        "tf32": tf32,
        "candidates": tuple(work.candidates),
        "effort": work.effort,
        "batches": batches,
    }


def part_of_probes(by_replay: ByReplay, place: Place, costs: Costs) -> list[ProbeValues]:
    """The values of a part's probes."""
    indices, probes = range(costs.batches), by_replay.work.effort.probes
    listed = [(index, number) for index in indices for number in range(probes)]
    own = cut([1.0] * len(listed), place.parts)[place.number - 1]
    found = []
    of_batches = [
        (index, [number for _, number in of_batch])
        for index, of_batch in groupby((listed[position] for position in own), lambda one: one[0])
    ]
    runs = {index: by_replay.blocks * costs.forwards_of_probes(len(numbers)) for index, numbers in of_batches}
    by_replay.expect(sum(runs.values()))
    for index, numbers in of_batches:
        values = by_replay.probed(index, numbers, runs[index])
        found += [ProbeValues(index, number, of) for number, of in zip(numbers, values, strict=True)]
    for index in indices:  # each part computes all references, so that differences are found
        if index not in by_replay.work.references:
            by_replay.begin(index)
    return found


def states_of_all(by_replay: ByReplay) -> list[tuple[int, int, float]]:
    """All states, as batch, position among its states, and cost; each batch is begun for that."""
    listed: list[tuple[int, int, float]] = []
    for index in range(len(by_replay.work.batches)):
        by_replay.begin(index)
        listed += [(index, position, cost) for position, (cost, _) in enumerate(by_replay.states())]
    return listed


def part_of_scores(by_replay: ByReplay, place: Place, listed: Sequence[tuple[int, int, float]]) -> None:
    """Measure a part's share of the listed states."""
    own = [listed[position] for position in cut([cost for *_, cost in listed], place.parts)[place.number - 1]]
    by_replay.expect(sum(cost for *_, cost in own))
    for index, of_batch in groupby(own, lambda one: one[0]):
        positions = [position for _, position, _ in of_batch]
        by_replay.measure(index, slice(positions[0], positions[-1] + 1))


def values_of(estimated: Sequence[Part], probes: int, batches: int) -> list[list[Values]]:
    """The values of all probes of each batch, in the order of their numbers.

    Raises:
        InputError: a probe is missing.
    """
    found = {(one.batch, one.number): one.values for part in estimated for one in part.probes}
    wanted = [(index, number) for index in range(batches) for number in range(probes)]
    if missing := [key for key in wanted if key not in found]:
        raise InputError(f"no part has probe {missing[0][1]} of batch {missing[0][0]}; remove the parts and run again")
    return [[found[index, number] for number in range(probes)] for index in range(batches)]


def require_fitting(parts: Sequence[Part], other: Part) -> None:
    """Refuse parts that are not all parts of one capture, or that other arithmetic measured.

    Args:
        parts: of one kind.
        other: a part with which all must agree.

    Raises:
        InputError: the message names the part, and in what it differs.
    """
    numbers = sorted(part.number for part in parts)
    if numbers != list(range(1, other.parts + 1)):
        raise InputError(f"the parts are number {numbers}, where 1 to {other.parts} are asked for; name all parts")
    for part in parts:
        for field in ("parts", "arithmetic", "tf32", "candidates", "effort", "batches"):
            one, expected = getattr(part, field), getattr(other, field)
            if one != expected:
                differs = (
                    "its sums of squares of the FP32 output are not those of another part"
                    if field == "batches"
                    else f"its {field} is {one}, and another part has {expected}"
                )
                raise InputError(f"part {part.number} of {part.parts}: {differs}. {SAME_MACHINES}")


def require_all(parts: Sequence[HeldOutPart], here: Arithmetic) -> None:
    """Refuse held-out parts of which one is missing, or which other arithmetic measured than that of this process.

    Args:
        parts: all parts, or none.
        here: by which this process measures.

    Raises:
        InputError: the message names the part.
    """
    if parts and sorted(part.number for part in parts) != list(range(1, parts[0].parts + 1)):
        raise InputError(f"the held-out parts are not number 1 to {parts[0].parts}, each once; name all parts")
    for part in parts:
        if part.arithmetic != here:
            raise InputError(
                f"held-out part {part.number} of {part.parts}: measured with {part.arithmetic}, and this process has"
                f" {here}. {SAME_MACHINES}"
            )


def joined(plan: Plan, estimated: Sequence[Part], measured: Sequence[Part]) -> Capture:
    """The capture of all parts.

    Args:
        plan: of the parts.
        estimated: the parts of the probes; empty where all scores are exact by the config.
        measured: the parts of the exact scores.

    Raises:
        InputError: a part is missing or does not fit the others, or a score is missing.
    """
    first = measured[0]
    require_fitting(measured, first)
    work = Measured(plan=plan, candidates=first.candidates, effort=first.effort)
    work.references = {batch.batch: batch.reference for batch in first.batches}
    if first.effort.probes:
        require_fitting(estimated, first)
        work.estimate(values_of(estimated, first.effort.probes, len(first.batches)))
    for part in measured:
        for score in part.scores:
            record = {key: getattr(score, key) for key in METRICS}
            work.scores[score.batch, score.scheme, score.map, score.op_name] = record
    try:
        return assembled(work, first.arithmetic, first.tf32)
    except KeyError as error:
        raise InputError(f"no part has the score {error.args[0]}; remove the parts and run again") from None
