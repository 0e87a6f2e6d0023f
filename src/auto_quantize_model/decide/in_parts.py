"""The forwards of a frontier in parts: several jobs share the choices and controls that are known from the start.

In: the same inputs as for a whole frontier, and which part of how many. Out: the records of a part. The choices that
depend on what others lose are left to `frontier.measure_frontier`, which takes the parts.
"""

import itertools
from collections.abc import Sequence

import torch

from auto_quantize_model.config import DecideSpec, Target
from auto_quantize_model.decide.allocate import state_of
from auto_quantize_model.decide.frontier import Decision, Progress, units_of
from auto_quantize_model.measure.capture import arithmetic
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.parts import Place, cut
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Capture, HeldOutPart, Plan, Scales
from auto_quantize_model.replay.model import Batch


def measure_part(
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
    place: Place,
    on_progress: Progress = lambda done, total: None,
) -> HeldOutPart:
    """One part of the forwards of a frontier.

    Args:
        place: which part; the others as `frontier.measure_frontier` takes them.

    Raises:
        InputError: as `frontier.measure_frontier` says.
    """
    _, units, other = units_of(plan, capture, candidates, spec)
    done, share = itertools.count(1), range(0)
    on_forward = lambda: on_progress(next(done), len(share))  # noqa: E731
    with HeldOut(model, plan, scales, heldout, answers, store, on_forward, part=str(place)) as on_heldout:
        decision = Decision(units, other, on_heldout)
        known = [*decision.frontier(spec, target), *decision.controls(candidates, spec)]
        states = [state_of(choice, units) for choice in dict.fromkeys(choice for _, _, choice in known)]
        share = cut([1.0] * (len(states) * len(heldout)), place.parts)[place.number - 1]
        records = on_heldout.measure_part(states, share)
    by = arithmetic(next(model.parameters()).device)
    return HeldOutPart(number=place.number, parts=place.parts, arithmetic=by, records=tuple(records))
