"""Measure units alone, in their scheme and with one thing altered.

In: a model, its plan and scales, batches, and states. Out: for each state a record of each batch, kept in the score
store, and what a set of records says.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from auto_quantize_model.code import code_digest_of_modules
from auto_quantize_model.files import digest_of
from auto_quantize_model.measure.aggregate import decibels, interval, weighted
from auto_quantize_model.measure.capture import context, digest_of_batch
from auto_quantize_model.measure.metrics import Reference, require_finite
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Distance, Plan, Scales
from auto_quantize_model.replay.altered import Alteration, add_altered
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.replay.scales import digest_of_scales
from auto_quantize_model.replay.served import Kept
from auto_quantize_model.schemes.scheme import Assignment

CODE = code_digest_of_modules(["auto_quantize_model.replay.altered"])
ADVICE = "keep the unit unquantized with decide.fixed, or check the weights"
Records = Sequence[Mapping[str, Any]]  # one for each batch


class Alone:
    """One model under replay, whose units also have altered schemes. As a context manager, it restores the model.

    Args:
        model: FP32, eval mode, on its device.
        plan: as `inc.plan.build_plan` returns it.
        scales: of all calibration batches together.
        store: keeps the record of each forward; a record in the store is not measured again.
        on_forward: called after each forward.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        scales: Scales,
        store: ScoreStore,
        on_forward: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.store, self.on_forward = plan, store, on_forward
        self.schemes = schemes_of(plan.schemes, model)
        of = {"scales": digest_of_scales(scales), "ranges": digest_of(ranges_of(scales)), "altered": CODE}
        self.base = context(model, plan, plan.ops) | of
        self.replay = Replay(model, plan.ops, plan.measured_op, schemes=self.schemes)
        self.replay.set_scales(scales)
        self.kept = Kept()
        self.keys: dict[tuple[str, str], Any] = {}  # of altered schemes, by op and name

    def __enter__(self) -> "Alone":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.replay.__exit__(kind, error, trace)

    def add(self, ops: Sequence[str], alterations: Mapping[str, Alteration]) -> None:
        """Give the ops of a unit altered schemes, by names that no scheme of the plan has."""
        add_altered(self.replay, ops, alterations, self.kept)
        for name, alteration in alterations.items():
            self.keys |= {(op, name): alteration.key for op in ops}

    def measure(self, batches: Sequence[Batch], states: Mapping[str, Assignment]) -> dict[str, Records]:
        """The records of each state: {mse_value, square, divergences, positions} of each batch.

        Raises:
            InputError: a number is not finite.
        """
        found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in states}
        keys = {name: self.key(state) for name, state in states.items()}
        for index, batch in enumerate(batches):
            reference = Reference.of(self.replay.begin(batch), batch, self.replay.measured_op)
            square = reference.totals()["all"]
            with self.store.shelf(self.base | {"batch": digest_of_batch(batch)}) as shelf:
                # The ops that run last come first, so that each run shares most blocks with the run before.
                order = sorted(states, key=lambda name: min(map(self.replay.cost, states[name]), default=0))
                missing = {keys[name]: states[name] for name in order if shelf.get(keys[name]) is None}
                outputs = self.replay.run_each(list(missing.values()))
                for name in order:
                    if (record := shelf.get(keys[name])) is None:
                        compared, divergences = reference.compare_samples(next(outputs))
                        require_finite(compared, f"batch {index}", name, ADVICE)
                        positions = reference.output.shape[:-1].numel()
                        record = {"mse_value": compared["mse_value"], "square": square, "positions": positions}
                        shelf.add(keys[name], record := {**record, "divergences": divergences})
                    found[name].append(record)
                    self.on_forward()
        return dict(found)

    def key(self, state: Assignment) -> str:
        """A state's key on a shelf: each op with its scheme's fields, or with its alteration."""
        return digest_of(
            [[op, name, self.keys.get((op, name), self.plan.schemes.get(name))] for op, name in state.items()]
        )


def ranges_of(scales: Scales) -> dict[str, Any]:
    """The range of each op's inputs, which static schemes take."""
    return {name: [found.input.minimum, found.input.maximum] for name, found in scales.items() if found.input}


def distance_of(records: Records) -> Distance:
    """How far a state is from the unquantized model over all batches."""
    relative = math.fsum(record["mse_value"] for record in records) / math.fsum(record["square"] for record in records)
    return Distance(weighted(*by_sample(records)), decibels(relative))


def by_sample(records: Records) -> tuple[list[float], list[float]]:
    """The mean divergence of each sample, and its number of positions."""
    values = [value for record in records for value in record["divergences"]]
    counts = [record["positions"] / len(record["divergences"]) for record in records for _ in record["divergences"]]
    return values, counts


def regained(before: Records, after: Records) -> tuple[float, float, float]:
    """How many nats the second state is nearer to the unquantized model, and the 95 % interval of that over samples."""
    (values, weights), (others, _) = by_sample(before), by_sample(after)
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return weighted(differences, weights), *interval(differences, weights)
