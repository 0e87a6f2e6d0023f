"""What keeping ops in FP32 buys: the mixed-precision model itself, measured on held-out samples for growing keep-lists.

In: a model, its plan, the ranking of its capture, calibration and held-out batches. Out: a curve per order
of keeping: the ranking, its greedy refinement and, as controls, random orders, the ranking turned round, and the
largest weights first.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.journal import Journal
from auto_quantize_model.measure.metrics import Reference, decibels, require_finite
from auto_quantize_model.replay.model import Batch, Replay

RANDOM_SEEDS = 5
Progress = Callable[[int, int], None]  # done and total, in forwards
NO_NUMBER = "keep the ops that overflow in FP32 with sensitivity.op_name_dict, or check the weights"


def keep_sizes(ops: int, as_well: int = 0) -> list[int]:
    """How many ops the keep-lists hold: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and all, and `as_well`."""
    sizes, step = {0, 1, 2, 3, ops, as_well}, 4
    while step < ops:
        sizes |= {step, step * 3 // 2}
        step *= 2
    return sorted(size for size in sizes if size <= ops)


def orders(ranking: Sequence[str], weight_bytes: dict[str, int]) -> dict[str, list[str]]:
    """The orders in which ops are kept, by name; `ranking` is the most sensitive first.

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


def model_bytes(model: torch.nn.Module, ops: Sequence[str], kept: frozenset[str]) -> int:
    """Bytes of the weights with the ops of `ops` in INT8 but for those of `kept`.

    An INT8 weight takes a byte a value and a float32 scale for each row; all else takes float32. A parameter that is
    shared by modules in FP32 is counted once.
    """
    modules = dict(model.named_modules())
    weights = [modules[name].weight for name in ops if name not in kept]
    int8 = sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    quantized = {f"{name}.weight" for name in ops if name not in kept}
    named = model.named_parameters(remove_duplicate=False)
    in_fp32 = {id(parameter): parameter.numel() for name, parameter in named if name not in quantized}
    return int8 + 4 * sum(in_fp32.values())


@dataclass(frozen=True)
class Greedy:
    """The config's greedy refinement: `ops` are chosen one after another, each out of the next `candidates` of the
    ranking; 0 candidates choose none."""

    candidates: int = 0
    ops: int = 0

    def runs(self, ops: int) -> int:
        """How many forwards it takes with a ranking of so many ops."""
        return sum(min(self.candidates, ops - kept) for kept in range(min(self.ops, ops)))


def measure_tradeoff(
    model: torch.nn.Module,
    plan: dict[str, Any],
    ranking: Sequence[str],
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    journal: Journal,
    greedy: Greedy = Greedy(),  # noqa: B008  frozen
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every keep-list of every order on the held-out batches; scales come from the calibration batches.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: as `plan.build_plan` returns it.
        ranking: the ops that were measured, the most sensitive first.
        calibration: the batches that set every scale, all of them together.
        heldout: batches that nothing was calibrated on.
        answers: for each held-out batch, of each sample, the positions of its answer's tokens; None without an answer.
        journal: keeps each forward's record; what it holds already is not measured again.
        greedy: how far the ranking is refined; it chooses on the last calibration batch, so the held-out ones stay
            unseen.
        on_progress: called after each forward.

    Returns:
        {ops, calibration_batches, batches, answers, curves: {order: [point]}, random: [point], gains_db, losses,
        greedy_gain_db}. The curve `greedy`, where it was asked for, ends with its last chosen op. A point is {keep,
        added, weight_bytes, relative_error, sqnr_db, sqnr_db_lowest, kl_divergence, top1_agreement, accuracy}; `added`
        are the ops kept beyond the point before; `accuracy` is the share of answers whose every token is the most
        likely one, null without answers. A point of `random` has the mean and the standard deviation over its seeds.
        `gains_db` are the ranking's over each control, up to half of the ops, as `gain` returns them; `losses` are the
        lengths at which the control does better; `greedy_gain_db` is the greedy curve's gain over the ranking.
    """
    sizes = keep_sizes(len(ranking), greedy.ops if greedy.candidates else 0)
    modules = dict(model.named_modules())
    kept_by = orders(ranking, {name: 4 * modules[name].weight.numel() for name in ranking})
    asked = sum(span is not None for spans in answers for span in spans)
    first = greedy.runs(len(ranking))
    with Replay(model, plan["ops"], plan["measured_op"]) as replay:
        reference = Reference(replay.calibrate(*calibration), calibration[-1].get("mm_token_type_ids"))
        if first:
            kept_by["greedy"] = greedy_order(
                replay, reference, ranking, greedy, journal, lambda done: on_progress(done, first)
            )
        # Orders share states, those with no op and with all ops among them: each state is measured once.
        states = {
            frozenset(names[:size]): f"{order}/{size}"
            for order, names in kept_by.items()
            for size in sizes
            if size <= len(names)
        }
        records, references = _measure(
            replay,
            heldout,
            answers,
            frozenset(ranking),
            states,
            journal,
            lambda done: on_progress(first + done, first + len(states) * len(heldout)),
        )
    points = {
        kept: summary(found, references, asked) | {"weight_bytes": model_bytes(model, ranking, kept)}
        for kept, found in records.items()
    }
    curves = {
        order: [
            {"keep": size, "added": names[before:size], **points[frozenset(names[:size])]}
            for before, size in zip([0, *sizes], sizes, strict=False)
            if size <= len(names)
        ]
        for order, names in kept_by.items()
    }
    seeds = [curves[f"random_{seed}"] for seed in range(RANDOM_SEEDS)]
    averaged = [spread(list(of_one_length)) for of_one_length in zip(*seeds, strict=True)]
    controls = {"random": averaged, "inverse": curves["inverse"], "weight_bytes": curves["weight_bytes"]}
    half = len(ranking) / 2
    return {
        "ops": len(ranking),
        "calibration_batches": len(calibration),
        "batches": len(heldout),
        "answers": asked,
        "curves": curves,
        "random": averaged,
        "gains_db": {name: gain(curves["ranking"], control, half) for name, control in controls.items()},
        "losses": {name: losses(curves["ranking"], control) for name, control in controls.items()},
        "greedy_gain_db": gain(curves["greedy"], curves["ranking"]) if first else None,
    }


def greedy_order(
    replay: Replay,
    reference: Reference,
    ranking: Sequence[str],
    greedy: Greedy,
    journal: Journal,
    on_step: Callable[[int], None],
) -> list[str]:
    """Ops to keep, each the one whose keeping leaves the least error beside those chosen before it.

    Args:
        replay: of the batch that `reference` is the FP32 output of.
        ranking: op names, the most sensitive first; the next ones not chosen yet are the candidates.
    """
    kept: list[str] = []
    left, done = list(ranking), 0
    while left and len(kept) < greedy.ops:
        errors = {}
        for name in left[: greedy.candidates]:
            key = f"greedy/{len(kept)}/{name}"
            if key not in journal.records:
                record = reference.compare(replay.run(frozenset(ranking) - {*kept, name}))
                journal.add(key, require_finite(record, "greedy refinement", in_words([*kept, name]), NO_NUMBER))
            errors[name] = journal.records[key]["mse_value"]
            done += 1
            on_step(done)
        kept.append(min(errors, key=errors.__getitem__))
        left.remove(kept[-1])
    return kept


def _measure(
    replay: Replay,
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    ops: frozenset[str],
    states: dict[frozenset[str], str],
    journal: Journal,
    on_step: Callable[[int], None],
) -> tuple[dict[frozenset[str], list[dict[str, Any]]], list[float]]:
    """The records of each keep-list, one for each batch, and the sum of squares of each batch's FP32 output."""
    records: dict[frozenset[str], list[dict[str, Any]]] = {kept: [] for kept in states}
    references, done = [], 0
    for index, batch in enumerate(heldout):
        reference = Reference(replay.take_up(batch), batch.get("mm_token_type_ids"))
        references.append(sum_of_squares(reference, index))
        for kept, name in states.items():
            key = f"{index}/{name}"
            if key not in journal.records:
                output = replay.run(ops - kept)
                record = require_finite(
                    reference.compare(output), f"held-out batch {index}, list {name}", in_words(sorted(kept)), NO_NUMBER
                )
                journal.add(key, record | {"right": right_answers(output, batch, answers[index])})
            records[kept].append(journal.records[key])
            done += 1
            on_step(done)
    return records, references


def in_words(kept: Sequence[str]) -> str:
    """The model with some ops in FP32 and all others in INT8."""
    named = ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
    return f"the model with {named} in FP32" if kept else "the model with every op in INT8"


def sum_of_squares(reference: Reference, index: int) -> float:
    """The sum of squares of the FP32 output on a held-out batch, by which every error is divided.

    Raises:
        InputError: it is 0 or no number.
    """
    squares = reference.totals()["all"]
    if not 0 < squares < math.inf:
        raise InputError(
            f"held-out batch {index}: the sum of squares of the FP32 output is {squares}, so no error can be compared"
            " with it; check the weights, or set tradeoff.heldout_batches to 0"
        )
    return squares


def right_answers(output: torch.Tensor, batch: Batch, spans: Sequence[range | None]) -> int:
    """How many samples of a batch have every token of their answer as the most likely one, given those before it.

    Args:
        output: (samples, tokens, vocabulary) logits.
        batch: its `input_ids`, int64 (samples, tokens).
        spans: of each sample, the positions of its answer's tokens.
    """
    right = 0
    for row, span in enumerate(spans):
        if span is not None:
            expected = batch["input_ids"][row, span.start : span.stop].to(output.device)
            predicted = output[row, span.start - 1 : span.stop - 1].argmax(-1)
            right += bool(torch.equal(predicted, expected))
    return right


def summary(records: list[dict[str, Any]], references: list[float], asked: int) -> dict[str, float | None]:
    """A keep-list's point: sums of errors over the sums of squares of the FP32 output, means over batches.

    `sqnr_db_lowest` is the SQNR of the one batch with the most error.
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


def spread(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, of keep-lists of one length."""
    found: dict[str, Any] = {"keep": points[0]["keep"]}
    for name in ("weight_bytes", "sqnr_db", "kl_divergence", "top1_agreement", "accuracy"):
        values = [point[name] for point in points]
        known = None not in values
        found[name] = statistics.fmean(values) if known else None
        found[f"{name}_std"] = statistics.stdev(values) if known else None
    return found


def losses(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[int]:
    """The lengths at which a curve's SQNR is below another's."""
    pairs = zip(curve, other, strict=True)
    return [mine["keep"] for mine, theirs in pairs if _number(mine["sqnr_db"]) < _number(theirs["sqnr_db"])]


def _number(sqnr_db: float | None) -> float:
    """An SQNR to compare; null is an infinite one."""
    return math.inf if sqnr_db is None else sqnr_db


def gain(curve: list[dict[str, Any]], other: list[dict[str, Any]], longest: float = math.inf) -> float | None:
    """The area between two curves of SQNR over log(1 + kept ops), divided by that range: dB; None without one.

    On that axis each doubling of a keep-list counts the same; on a linear one the long lists, which nobody keeps, would
    decide alone. Trapezoids; points whose SQNR is infinite (all ops kept) end the range, as do the end of the shorter
    curve and `longest`.
    """
    pairs = [
        (math.log1p(mine["keep"]), mine["sqnr_db"] - theirs["sqnr_db"])
        for mine, theirs in zip(curve, other, strict=False)
        if mine["sqnr_db"] is not None and theirs["sqnr_db"] is not None and mine["keep"] <= longest
    ]
    if len(pairs) < 2:
        return None
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(pairs, pairs[1:], strict=False))
    return area / (pairs[-1][0] - pairs[0][0])
