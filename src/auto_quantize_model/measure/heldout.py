"""Measure states of the model on held-out samples: how far the output is from that of the unquantized model.

In: a model, its plan, the scales of the calibration, held-out batches, and assignments. Out: a record for each state
and batch, kept in the score store, and their summary.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import instruction_set
from auto_quantize_model.measure.aggregate import decibels, interval, weighted
from auto_quantize_model.measure.capture import context, digest_of_batch, state_key
from auto_quantize_model.measure.metrics import Reference, next_token_loss, require_finite, right_answers
from auto_quantize_model.measure.store import ScoreStore, Shelf
from auto_quantize_model.records import Frontier, HeldOutRecord, Plan, Profile, Scales
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.replay.scales import digest_of_scales
from auto_quantize_model.schemes.scheme import Assignment

ADVICE = "keep the ops that overflow unquantized with sensitivity.op_name_dict, or check the weights"
Record = Mapping[str, Any]


class HeldOut:
    """The held-out batches of one model, on which states are measured. As a context manager, it restores the model.

    Args:
        model: FP32, eval mode, on its device.
        plan: as `inc.plan.build_plan` returns it.
        scales: of all calibration batches together.
        batches: that no calibration has used.
        answers: for each sample of each batch, the positions of its answer's tokens; None without an answer.
        store: keeps the record of each forward; a record in the store is not measured again.
        on_forward: called after each forward.
        known: records that other jobs have measured, which are not measured again.
        part: of several jobs, with a shelf of its own; empty for one job.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        scales: Scales,
        batches: Sequence[Batch],
        answers: Sequence[list[range | None]],
        store: ScoreStore,
        on_forward: Callable[[], None] = lambda: None,
        known: Sequence[HeldOutRecord] = (),
        part: str = "",
    ) -> None:
        self.known = {(found.batch, found.key): found.record for found in known}
        self.plan, self.scales, self.batches, self.answers = plan, scales, batches, answers
        self.store, self.on_forward = store, on_forward
        self.base = (
            context(model, plan, plan.ops) | {"scales": digest_of_scales(scales)} | ({"part": part} if part else {})
        )
        self.replay = Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(plan.schemes, model))
        self.replay.set_scales(scales)
        self.asked = sum(span is not None for spans in answers for span in spans)
        self.totals: list[dict[str, float]] = []

    def __enter__(self) -> "HeldOut":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.replay.__exit__(kind, error, trace)

    def measure(self, states: Sequence[Assignment]) -> list[dict[str, Any]]:
        """The summary of each state over all batches.

        Raises:
            InputError: a number is not finite.
        """
        records: list[list[Record]] = [[] for _ in states]
        self.totals = []
        for index in range(len(self.batches)):
            for of_state, record in zip(records, self._on_batch(index, states), strict=True):
                of_state.append(record)
        return [summary(of_state, self.totals, self.asked) for of_state in records]

    def measure_part(self, states: Sequence[Assignment], share: range) -> list[HeldOutRecord]:
        """The records of a share of the pairs of batch and state, batch by batch.

        Raises:
            InputError: a number is not finite.
        """
        pairs = [divmod(position, len(states)) for position in share]
        found = []
        for index, of_batch in itertools.groupby(pairs, lambda pair: pair[0]):
            own = [states[position] for _, position in of_batch]
            records = self._on_batch(index, own)
            found += [
                HeldOutRecord(index, self._key(state), dict(record)) for state, record in zip(own, records, strict=True)
            ]
        return found

    def _on_batch(self, index: int, states: Sequence[Assignment]) -> list[Record]:
        """The records of states on a batch."""
        batch, found = self.batches[index], []
        reference = Reference.of(self.replay.begin(batch), batch, self.plan.measured_op)
        self.totals.append(totals(reference, index))
        of = self.base | {"batch": digest_of_batch(batch), "answers": _spans(self.answers[index])}
        with self.store.shelf(of) as shelf:
            keys = [self._key(state) for state in states]
            missing = {
                key: state for key, state in zip(keys, states, strict=True) if not self._known(index, key, shelf)
            }
            outputs = self.replay.run_each(list(missing.values()))
            for key, state in zip(keys, states, strict=True):
                if (record := self._known(index, key, shelf)) is None:
                    record = self._record(index, reference, next(outputs), state)
                    shelf.add(key, record)
                found.append(record)
                self.on_forward()
        return found

    def _key(self, state: Assignment) -> str:
        return state_key(state, self.plan.schemes, self.scales)

    def _known(self, index: int, key: str, shelf: Shelf) -> Record | None:
        """The record of a state that another job or an earlier run has measured."""
        return self.known.get((index, key)) or shelf.get(key)

    def _record(self, index: int, reference: Reference, output: torch.Tensor, state: Assignment) -> dict[str, Any]:
        """The record of a state that the replay ran last."""
        record = record_of(output, reference, self.batches[index], self.answers[index])
        if (agreement := self.replay.routing_agreement()) is not None:
            record["router_agreement"] = agreement
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        require_finite(numbers, f"held-out batch {index}", in_words(state), ADVICE)
        return record


def record_of(
    output: torch.Tensor, reference: Reference, batch: Batch, answers: Sequence[range | None]
) -> dict[str, Any]:
    """What one state gave on one batch.

    Returns:
        The metrics of `Reference.compare`, `divergences` (the mean of each sample), `next_token_loss` (the sum in nats
        over `next_tokens` tokens), `right` (how many answers are right), and `lost` (how many are wrong here, and right
        in the reference).
    """
    record, divergences = reference.compare_samples(output)
    loss, tokens = next_token_loss(output, batch, answers)
    right, before = (right_answers(logits, batch, answers) for logits in (output, reference.output))
    return {
        **record,
        "divergences": divergences,
        "next_token_loss": loss,
        "next_tokens": tokens,
        "right": sum(right),
        "lost": sum(was and not now for was, now in zip(before, right, strict=True)),
    }


def totals(reference: Reference, index: int) -> dict[str, float]:
    """What the sums of a held-out batch are divided by.

    Raises:
        InputError: the sum of squares of the FP32 output is 0 or not finite.
    """
    found = reference.totals()
    if not 0 < found["all"] < math.inf:
        raise InputError(
            f"held-out batch {index}: the FP32 output has a sum of squares of {found['all']}, so no error can be"
            " related to it; check the weights"
        )
    return found


def summary(records: Sequence[Record], totals: Sequence[Mapping[str, float]], asked: int) -> dict[str, Any]:
    """The metrics of a state over all batches, as the fields of a `Point`.

    Args:
        records: of `record_of`, one for each batch.
        totals: of each batch.
        asked: how many samples have an answer.
    """
    positions = [of_batch["image_positions"] + of_batch["text_positions"] for of_batch in totals]
    by_sample = [value for record in records for value in record["divergences"]]
    weights = [count / len(record["divergences"]) for record, count in zip(records, positions, strict=True)]
    of_sample = [weight for record, weight in zip(records, weights, strict=True) for _ in record["divergences"]]
    low, high = interval(by_sample, of_sample)
    squares = [of_batch["all"] for of_batch in totals]
    relative = math.fsum(record["mse_value"] for record in records) / math.fsum(squares)
    worst = max(record["mse_value"] / square for record, square in zip(records, squares, strict=True))
    agreement = _share(records, positions, "router_agreement")
    tokens = sum(record["next_tokens"] for record in records)
    loss = math.fsum(record["next_token_loss"] for record in records)
    return {
        "divergence": weighted(by_sample, of_sample),
        "divergence_low": low,
        "divergence_high": high,
        "image_divergence": _at(records, totals, "image"),
        "text_divergence": _at(records, totals, "text"),
        "divergence_by_sample": tuple(by_sample),
        "top1_agreement": _share(records, positions, "top1_agreement"),
        "perplexity": math.exp(loss / tokens) if tokens else None,
        "accuracy": sum(record["right"] for record in records) / asked if asked else None,
        "answers_lost": sum(record["lost"] for record in records) if asked else None,
        "relative_error": relative,
        "sqnr_db": decibels(relative),
        "sqnr_db_lowest": decibels(worst),
        **({"router_agreement": agreement} if agreement is not None else {}),
    }


def _at(records: Sequence[Record], totals: Sequence[Mapping[str, float]], part: str) -> float | None:
    """The mean divergence at the positions of a part, `image` or `text`; None without such positions."""
    positions = math.fsum(of_batch[f"{part}_positions"] for of_batch in totals)
    return math.fsum(record[f"{part}_divergence"] for record in records) / positions if positions else None


def _share(records: Sequence[Record], positions: Sequence[float], name: str) -> float | None:
    """The mean of a share over all positions; None where the records do not have it."""
    shares = [record[name] for record in records if name in record]
    return weighted(shares, positions) if shares else None


def _spans(answers: Sequence[range | None]) -> list[list[int] | None]:
    """The positions of a batch's answers, as JSON."""
    return [None if span is None else [span.start, span.stop] for span in answers]


def in_words(state: Assignment) -> str:
    """A state in words: how many ops each scheme has."""
    counts = {scheme: list(state.values()).count(scheme) for scheme in dict.fromkeys(state.values())}
    parts = [f"{count} op{'s' * (count != 1)} in {scheme}" for scheme, count in counts.items()]
    return f"the model with {' and '.join(parts)}" if parts else "the unquantized model"


def compared(name: str, profile: Profile, found: Mapping[str, Any], frontier: Frontier) -> dict[str, Any]:
    """The metrics of a quantized model that was loaded back, compared with those that its profile promised.

    Args:
        name: the profile's name.
        profile: as `profiles.build_profiles` returns it.
        found: as `summary` returns it.
        frontier: where the profile was measured; its `device` and `instruction_set` say on which machine.

    Returns:
        {profile, status, measured_device, measured_instruction_set, promised, found}. `status` is `bit_identical`, or
        `measured_elsewhere` if a number differs that was measured on a GPU or on a CPU with other vector instructions.
        Sums and INT8 products there differ from those of this CPU.

    Raises:
        InputError: the profile was measured on such a CPU as this one, and a number differs.
    """
    promised = {field: getattr(profile.point, field) for field in found}
    different = [field for field, value in found.items() if value != promised[field]]
    if different and frontier.device == "cpu" and frontier.instruction_set == instruction_set():
        field = different[0]
        raise InputError(
            f"profile {name}: {field} was measured as {promised[field]!r}, and the quantized model gives"
            f" {found[field]!r}; do not use this profile, and report the difference with the plan"
        )
    return {
        "profile": name,
        "status": "measured_elsewhere" if different else "bit_identical",
        "measured_device": frontier.device,
        "measured_instruction_set": frontier.instruction_set,
        "promised": promised,
        "found": dict(found),
    }
