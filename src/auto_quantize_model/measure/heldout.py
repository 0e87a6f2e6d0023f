"""Measure what keeping ops in FP32 gains: the mixed-precision model runs on held-out samples for growing keep-lists.

In: a model, its plan, the ranking of its capture, scales, calibration and held-out batches. Out: a curve for each order
in which ops are kept. The orders are the ranking and its greedy refinement. Controls are random orders, the reversed
ranking, and the largest weights first.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from auto_quantize_model.config import TradeoffSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.aggregate import decibels
from auto_quantize_model.measure.capture import arithmetic, context, digest_of_batch, state_key
from auto_quantize_model.measure.metrics import Reference, require_finite, right_answers
from auto_quantize_model.measure.store import ScoreStore, Shelf
from auto_quantize_model.records import Plan, Point, Scales, Tradeoff
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.replay.scales import digest_of_scales
from auto_quantize_model.schemes.scheme import Assignment, assigned

RANDOM_SEEDS = 5
Progress = Callable[[int, int], None]  # done and total, in forwards
NO_NUMBER = "keep the ops that overflow in FP32 with sensitivity.op_name_dict, or check the weights"


def keep_sizes(ops: int, as_well: int = 0) -> list[int]:
    """The lengths of the keep-lists: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., all ops, and `as_well`."""
    sizes, step = {0, 1, 2, 3, ops, as_well}, 4
    while step < ops:
        sizes |= {step, step * 3 // 2}
        step *= 2
    return sorted(size for size in sizes if size <= ops)


def orders(ranking: Sequence[str], weight_bytes: Mapping[str, int]) -> dict[str, list[str]]:
    """The orders in which ops are kept, by name; `ranking` has the most sensitive op first.

    Args:
        ranking: op names.
        weight_bytes: of each op in FP32.

    Returns:
        `ranking`, `inverse`, `weight_bytes` (the largest first, ties by the ranking), and `random_0` to `random_4`.
    """
    found = {
        "ranking": list(ranking),
        "inverse": list(ranking)[::-1],
        "weight_bytes": sorted(ranking, key=lambda name: -weight_bytes[name]),
    }
    for seed in range(RANDOM_SEEDS):
        found[f"random_{seed}"] = random.Random(seed).sample(sorted(ranking), len(ranking))  # noqa: S311
    return found


def model_bytes(model: torch.nn.Module, assignment: Assignment) -> int:
    """Bytes of the model's weights with the ops of an assignment in INT8.

    An INT8 weight takes one byte per value and a float32 scale per row. All other values are float32. A parameter that
    FP32 modules share is counted once.
    """
    modules = dict(model.named_modules())
    weights = [modules[name].weight for name in assignment]
    int8: int = sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    quantized = {f"{name}.weight" for name in assignment}
    named = model.named_parameters(remove_duplicate=False)
    in_fp32 = {id(parameter): parameter.numel() for name, parameter in named if name not in quantized}
    return int8 + 4 * sum(in_fp32.values())


def greedy_runs(spec: TradeoffSpec, ops: int) -> int:
    """How many forwards the greedy steps take with a ranking of this many ops."""
    return sum(min(spec.greedy_candidates, ops - kept) for kept in range(min(spec.greedy_ops, ops)))


def measure_tradeoff(
    model: torch.nn.Module,
    plan: Plan,
    ranking: Sequence[str],
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    store: ScoreStore,
    spec: TradeoffSpec = TradeoffSpec(),  # noqa: B008  frozen
    scales: Scales | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Tradeoff:
    """Measure every keep-list of every order on the held-out batches. The scales come from the calibration batches.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: as `inc.plan.build_plan` returns it.
        ranking: the measured ops, the most sensitive first.
        calibration: the batches that set every scale, all of them together.
        heldout: batches that no calibration has used.
        answers: for each sample of each held-out batch, the positions of its answer's tokens; None without an answer.
        store: keeps the record of each forward; a record in the store is not measured again.
        spec: the config's block tradeoff. Its greedy steps choose on the last calibration batch, so the held-out
            batches stay unseen.
        scales: from all calibration batches together; None calibrates here.
        on_progress: called after each forward.

    Returns:
        The curves by order. `greedy` is there if it was asked for, and ends with its last chosen op. `random` has the
        mean and the standard deviation over the seeds. `gains_db` are the ranking's gains over each control, up to
        half of the ops, as `gain` returns them. `losses` are the lengths at which the control does better.
        `greedy_gain_db` is the greedy curve's gain over the ranking.

    Raises:
        InputError: a number is not finite.
    """
    sizes = keep_sizes(len(ranking), spec.greedy_ops if spec.greedy_candidates else 0)
    weights = {op.op_name: op.weight_bytes for op in plan.ops}
    kept_by = orders(ranking, weights)
    asked = sum(span is not None for spans in answers for span in spans)
    done, total = itertools.count(1), greedy_runs(spec, len(ranking))

    def step() -> None:
        on_progress(next(done), total)

    base = context(model, plan, plan.ops)
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = scales or replay.calibrate(*calibration)
        replay.set_scales(scales)
        base |= {"scales": digest_of_scales(scales)}
        if total:
            with store.shelf(base | {"batch": digest_of_batch(calibration[-1])}) as shelf:
                reference = Reference(replay.begin(calibration[-1]), calibration[-1].get("mm_token_type_ids"))
                kept_by["greedy"] = greedy_order(replay, reference, ranking, spec, shelf, step)
        # Orders share states, such as those with no op and with all ops: each state is measured once.
        states = {
            frozenset(names[:size]): f"{order}/{size}"
            for order, names in kept_by.items()
            for size in sizes
            if size <= len(names)
        }
        total += len(states) * len(heldout)
        records: dict[frozenset[str], list[dict[str, Any]]] = {kept: [] for kept in states}
        references = []
        for index, batch in enumerate(heldout):
            of = base | {"batch": digest_of_batch(batch), "answers": _spans(answers[index])}
            with store.shelf(of) as shelf:
                found, squares = _of_batch(replay, index, batch, answers[index], ranking, states, shelf, step)
            references.append(squares)
            for kept, record in found.items():
                records[kept].append(record)
    points = {
        kept: summary(found, references, asked) | {"weight_bytes": model_bytes(model, quantized(ranking, kept))}
        for kept, found in records.items()
    }
    curves = curves_of(kept_by, sizes, points)
    return Tradeoff(
        **asdict(arithmetic(next(model.parameters()).device)),
        ops=len(ranking),
        calibration_batches=len(calibration),
        batches=len(heldout),
        answers=asked,
        curves=curves,
        **against_controls(curves, len(ranking) / 2),
    )


def curves_of(
    kept_by: Mapping[str, Sequence[str]], sizes: Sequence[int], points: Mapping[frozenset[str], Mapping[str, Any]]
) -> dict[str, list[Point]]:
    """The measured keep-lists of each order as a curve.

    Args:
        kept_by: {order: ops in the order in which they are kept}.
        sizes: lengths of the keep-lists; an order ends at its own length.
        points: the metrics of each keep-list.
    """
    return {
        order: [
            Point(size, tuple(names[before:size]), **points[frozenset(names[:size])])
            for before, size in zip([0, *sizes], sizes, strict=False)
            if size <= len(names)
        ]
        for order, names in kept_by.items()
    }


def against_controls(curves: Mapping[str, Sequence[Point]], longest: float) -> dict[str, Any]:
    """The ranking's curve compared with its controls, and the greedy curve with the ranking's, as in `Tradeoff`.

    Args:
        curves: as `curves_of` returns them.
        longest: the longest keep-list that counts in a gain over a control.
    """
    seeds = [curves[f"random_{seed}"] for seed in range(RANDOM_SEEDS)]
    averaged = [spread(list(of_one_length)) for of_one_length in zip(*seeds, strict=True)]
    of_seeds = [(point["keep"], point["sqnr_db"]) for point in averaged]
    controls = {"random": of_seeds, "inverse": _line(curves["inverse"]), "weight_bytes": _line(curves["weight_bytes"])}
    by_ranking = _line(curves["ranking"])
    return {
        "random": averaged,
        "gains_db": {name: gain(by_ranking, control, longest) for name, control in controls.items()},
        "losses": {name: losses(by_ranking, control) for name, control in controls.items()},
        "greedy_gain_db": gain(_line(curves["greedy"]), by_ranking) if "greedy" in curves else None,
    }


def quantized(ranking: Sequence[str], kept: frozenset[str]) -> dict[str, str]:
    """The assignment with every op of the ranking quantized, except those of `kept`."""
    return assigned(name for name in ranking if name not in kept)


def greedy_order(
    replay: Replay,
    reference: Reference,
    ranking: Sequence[str],
    spec: TradeoffSpec,
    shelf: Shelf,
    on_step: Callable[[], None],
) -> list[str]:
    """Ops to keep, in order: each is the op whose keeping leaves the least error, given the ops chosen before.

    Args:
        replay: of the batch whose FP32 output is `reference`.
        ranking: op names, the most sensitive first; the next ops that are not yet chosen are the candidates.
        shelf: keeps the records of that batch.
    """
    kept: list[str] = []
    left = list(ranking)
    while left and len(kept) < spec.greedy_ops:
        errors = {}
        for name in left[: spec.greedy_candidates]:
            assignment = quantized(ranking, frozenset({*kept, name}))
            key = state_key(assignment)
            if (record := shelf.get(key)) is None:
                record = reference.compare(replay.run(assignment))
                shelf.add(key, require_finite(record, "greedy refinement", in_words([*kept, name]), NO_NUMBER))
            errors[name] = record["mse_value"]
            on_step()
        kept.append(min(errors, key=errors.__getitem__))
        left.remove(kept[-1])
    return kept


def _of_batch(
    replay: Replay,
    index: int,
    batch: Batch,
    answers: Sequence[range | None],
    ranking: Sequence[str],
    states: Mapping[frozenset[str], str],
    shelf: Shelf,
    on_step: Callable[[], None],
) -> tuple[dict[frozenset[str], dict[str, Any]], float]:
    """The record of each keep-list on one held-out batch, and the sum of squares of the FP32 output."""
    reference = Reference(replay.begin(batch), batch.get("mm_token_type_ids"))
    squares = sum_of_squares(reference, index)
    records = {}
    for kept, name in states.items():
        assignment = quantized(ranking, kept)
        key = state_key(assignment)
        if (record := shelf.get(key)) is None:
            output = replay.run(assignment)
            compared = reference.compare(output)
            place = f"held-out batch {index}, list {name}"
            record = require_finite(compared, place, in_words(sorted(kept)), NO_NUMBER)
            record = record | {"right": right_answers(output, batch, answers)}
            shelf.add(key, record)
        records[kept] = record
        on_step()
    return records, squares


def _spans(answers: Sequence[range | None]) -> list[list[int] | None]:
    """The positions of a batch's answers, as JSON."""
    return [None if span is None else [span.start, span.stop] for span in answers]


def in_words(kept: Sequence[str]) -> str:
    """The model with some ops in FP32 and all others in INT8, in words."""
    named = ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
    return f"the model with {named} in FP32" if kept else "the model with every op in INT8"


def sum_of_squares(reference: Reference, index: int) -> float:
    """The sum of squares of the FP32 output on a held-out batch; every error is divided by this sum.

    Raises:
        InputError: the sum is 0 or not finite.
    """
    squares = reference.totals()["all"]
    if not 0 < squares < math.inf:
        raise InputError(
            f"held-out batch {index}: the sum of squares of the FP32 output is {squares}, so errors cannot be divided"
            " by the sum. Check the weights, or set tradeoff.heldout_batches to 0"
        )
    return squares


def summary(records: Sequence[Mapping[str, Any]], references: Sequence[float], asked: int) -> dict[str, Any]:
    """A keep-list's point: sums of errors over the sums of squares of the FP32 output, means over batches.

    `sqnr_db_lowest` is the SQNR of the one batch with the largest error.
    """
    errors = [record["mse_value"] for record in records]
    relative = math.fsum(errors) / math.fsum(references)
    worst = max(error / squares for error, squares in zip(errors, references, strict=True))
    means = {name: statistics.fmean(record[name] for record in records) for name in ("kl_divergence", "top1_agreement")}
    accuracy = sum(record["right"] for record in records) / asked if asked else None
    return {
        "relative_error": relative,
        "sqnr_db": decibels(relative),
        "sqnr_db_lowest": decibels(worst),
        **means,
        "accuracy": accuracy,
    }


def spread(points: Sequence[Point]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, for keep-lists of one length."""
    found: dict[str, Any] = {"keep": points[0].keep}
    for name in ("weight_bytes", "sqnr_db", "kl_divergence", "top1_agreement", "accuracy"):
        values = [getattr(point, name) for point in points]
        known = None not in values
        found[name] = statistics.fmean(values) if known else None
        found[f"{name}_std"] = statistics.stdev(values) if known else None
    return found


# A curve as points of growing length: how many ops a keep-list holds, and the SQNR in dB; None is infinite.
Line = Sequence[tuple[int, float | None]]


def _line(curve: Sequence[Point]) -> Line:
    return [(point.keep, point.sqnr_db) for point in curve]


def losses(curve: Line, other: Line) -> list[int]:
    """The lengths at which a curve's SQNR is below another's."""
    pairs = zip(curve, other, strict=True)
    return [keep for (keep, mine), (_, theirs) in pairs if _number(mine) < _number(theirs)]


def _number(sqnr_db: float | None) -> float:
    """The SQNR for a comparison; None is infinite."""
    return math.inf if sqnr_db is None else sqnr_db


def gain(curve: Line, other: Line, longest: float = math.inf) -> float | None:
    """The area between two curves of SQNR over log(1 + kept ops), divided by that range: dB; None without a range.

    On that axis each doubling of a keep-list counts the same. On a linear axis the long lists would decide alone, and
    nobody keeps so many ops. The area is a sum of trapezoids. The range ends at the first point with infinite SQNR
    (all ops kept), at the end of the shorter curve, and at `longest`.
    """
    pairs = [
        (math.log1p(keep), mine - theirs)
        for (keep, mine), (_, theirs) in zip(curve, other, strict=False)
        if mine is not None and theirs is not None and keep <= longest
    ]
    if len(pairs) < 2:
        return None
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(pairs, pairs[1:], strict=False))
    return area / (pairs[-1][0] - pairs[0][0])
