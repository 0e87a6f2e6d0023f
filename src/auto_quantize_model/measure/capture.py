"""Measure the error of every planned op on each batch, by the engine that the plan names.

In: the model, the plan, the scales and the calibration batches. Out: the capture (deterministic), and a record of the
run (times and host, which vary). The replay needs torch alone. Callers pass in any other engine.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from types import MappingProxyType
from typing import Any

import torch

from auto_quantize_model.code import code_digest_of_modules
from auto_quantize_model.files import InputError, digest_of, sha256_bytes
from auto_quantize_model.machine import instruction_set, usage
from auto_quantize_model.measure import metrics
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.states import ALL, states
from auto_quantize_model.measure.store import ScoreStore, Shelf
from auto_quantize_model.records import (
    METRICS,
    Arithmetic,
    CalibrationManifest,
    Capture,
    Plan,
    Scales,
    Score,
    ScoredBatch,
    digest_of_record,
)
from auto_quantize_model.replay.model import Batch, OtherOrder, Replay, refusals
from auto_quantize_model.replay.scales import digest_of_scales
from auto_quantize_model.schemes.by_name import schemes_of
from auto_quantize_model.schemes.inc_int8 import cpu_kernel
from auto_quantize_model.schemes.scheme import INC_INT8, Assignment

# Digest of the code that a score depends on, taken at import: files may change during a long run.
CODE = code_digest_of_modules(
    f"auto_quantize_model.{name}" for name in ("replay.model", "measure.metrics", "models.snapshot")
)
Progress = Callable[[int, int], None]  # done and total: block runs (replay) or ops (INC)
Share = dict[str, list[str]]  # {map: ops}


@dataclass
class Work:
    """What an engine measures, and where it puts the scores.

    Attributes:
        batches: the scored batches.
        scores: {(batch, scheme, map, op_name): record}, for all scores that are known already.
        references: for each batch, the sums of squares of the FP32 output.
        second_pass: for each batch, the scores of INC's second pass: {op_name: mse_value}.
        found: how many records the store already had.
        dropped: how many of the store's records were damaged.
    """

    model: torch.nn.Module
    batches: Sequence[Batch]
    plan: Plan
    store: ScoreStore
    scores: dict[tuple[int, str, str, str], Mapping[str, float]]
    references: dict[int, dict[str, float]]
    second_pass: dict[int, dict[str, float]]
    found: int = 0
    dropped: int = 0

    def shelf(self, of: dict[str, Any]) -> Shelf:
        """The scores that the store keeps for one context."""
        shelf = self.store.shelf(of)
        self.found += shelf.found
        self.dropped += shelf.dropped
        return shelf


# Measures a share of the maps: `inc.engine.measure_by_inc`.
Engine = Callable[[Work, Share, Progress], None]


def capture_sensitivity(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    store: ScoreStore,
    scales: Sequence[Scales] | None = None,
    on_progress: Progress = lambda done, total: None,
    by_inc: Engine | None = None,
    of_all: Scales | None = None,
) -> tuple[Capture, dict[str, Any]]:
    """Score every op of `plan` on each confidence batch.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        batches: the calibration batches; the first `plan.confidence_batches` are scored.
        plan: as `inc.plan.build_plan` returns it.
        store: keeps each score; a score in the store is not measured again.
        scales: of each scored batch, from that batch alone, as INC calibrates; None calibrates here.
        on_progress: called after each score.
        by_inc: the engine for scores that the replay cannot measure; None if INC is not available.
        of_all: the scales of all calibration batches together, whose input ranges the schemes of compressed-tensors
            take; None takes those of each batch.

    Returns:
        (capture, run_record).

    Raises:
        InputError: a score or the reference is not finite, or INC plans the model differently than `plan` says. Or the
            engine does not cover an op.
    """
    if len(batches) < plan.confidence_batches:
        raise InputError(f"the plan asks for {plan.confidence_batches} batches, the calibration set has {len(batches)}")
    started = time.monotonic()
    work = Work(model, batches[: plan.confidence_batches], plan, store, {}, {}, {})
    of_replay, of_inc = share_of_engines(model, plan)
    if of_inc and by_inc is None:
        raise InputError("the plan asks for INC, and INC is not available here; set sensitivity.engine to replay")
    record: dict[str, Any] = {}
    if of_replay:
        try:
            record |= measure_by_replay(work, of_replay, on_progress, scales, of_all)
        except OtherOrder as error:
            raise InputError(f"{error}; {without_replay(plan)}") from None
    if of_inc and by_inc:
        by_inc(work, of_inc, on_progress)
    record |= {"resumed_scores": work.found, "dropped_scores": work.dropped}
    record["seconds"] = round(time.monotonic() - started, 3)
    device = next(model.parameters()).device
    return assembled(work, device), record | usage(device)


def news(record: Mapping[str, Any]) -> str:
    """The run record's counts of stored scores, in words."""
    found, dropped = record["resumed_scores"], record["dropped_scores"]
    damaged = f"; {dropped} damaged scores were measured again" if dropped else ""
    return f"{found} scores came from the store, all others were measured now{damaged}"


def share_of_engines(model: torch.nn.Module, plan: Plan) -> tuple[Share, Share]:
    """The ops of each map that the replay measures, and those that INC measures: {map: ops}, with `all` among the maps.

    With `auto`, an op that no site reproduces goes to INC. Every map that quantizes other ops together with that op
    goes to INC too, because every state of such a map contains the op.
    """
    names = plan.op_names
    everything = {label: names for label in [*plan.maps, ALL]}
    uncovered = refusals(model, plan.ops) if plan.engine == "auto" else {}
    if uncovered and len(plan.schemes) > 1:
        raise InputError(
            f"{len(uncovered)} ops, such as {min(uncovered)}, cannot be replayed, so sensitivity.schemes can hold"
            " inc_int8 alone; remove the others, or keep these ops in FP32 with sensitivity.op_name_dict"
        )
    if plan.engine == "inc":
        return {}, everything
    if not uncovered:
        return everything, {}
    covered = {"isolated": [name for name in names if name not in uncovered]} if "isolated" in plan.maps else {}
    return covered, everything | ({"isolated": list(uncovered)} if covered else {})


def maps_of(scheme: str, maps: Iterable[str]) -> list[str]:
    """The maps that are measured in a scheme: INC defines `fallback` and `requantize` for its own scheme alone."""
    return [label for label in maps if scheme == INC_INT8 or label in ("isolated", ALL)]


def measure_by_replay(
    work: Work, share: Share, on_progress: Progress, scales: Sequence[Scales] | None, of_all: Scales | None
) -> dict[str, Any]:
    """Measure a share of the maps by replay, and return the entries for the run record."""
    plan = work.plan
    ops = {op.op_name: op for op in plan.ops if op.op_name in next(iter(share.values()))}
    base = context(work.model, plan, list(ops.values()))
    done, seconds, cached = 0, [], 0
    with Replay(work.model, list(ops.values()), plan.measured_op, schemes=schemes_of(plan.schemes)) as replay:
        for index, batch in enumerate(work.batches):
            started = time.monotonic()
            of_batch = scales[index] if scales else replay.calibrate(batch)
            replay.set_scales(of_batch, of_all)
            reference = Reference(replay.begin(batch), batch.get("mm_token_type_ids"))
            require_executions(plan, index, replay.executions)
            totals = require_finite(reference.totals(), index, "reference", "")
            work.references[index] = totals
            planned = [
                (scheme, *state)
                for scheme in plan.schemes
                for state in states(
                    [name for name in replay.order if scheme in ops[name].schemes],
                    list(ops),
                    maps_of(scheme, share),
                    scheme,
                )
            ]
            costs = [replay.cost(name) for _, _, name, _ in planned]
            of = base | {"batch": digest_of_batch(batch), "scales": digest_of_scales(of_batch)}
            with work.shelf(of) as shelf:
                for cost, (scheme, label, name, assignment) in zip(costs, planned, strict=True):
                    key = state_key(assignment, plan.schemes, of_all or of_batch)
                    if (record := shelf.get(key)) is None:
                        record = require_finite(reference.compare(replay.run(assignment)), index, label, name)
                        shelf.add(key, record)
                    work.scores[index, scheme, label, name] = record
                    done += cost
                    on_progress(done, sum(costs) * len(work.batches))
            seconds.append(round(time.monotonic() - started, 3))
            cached = max(cached, replay.cached_bytes)
    return {"seconds_per_batch": seconds, "cached_bytes": cached}


def require_executions(plan: Plan, index: int, executions: Mapping[str, int]) -> None:
    """Refuse a batch on which an op runs more or less often than the plan says.

    Raises:
        InputError: the message names the op.
    """
    planned = {op.op_name: op.executions[index] for op in plan.ops}
    for name, count in executions.items():
        if count != planned[name]:
            raise InputError(
                f"{name} runs {count} times on batch {index}, and the plan says {planned[name]}; make the plan again"
                " (snakemake --cores 1 --forcerun plan_quantization)"
            )


def without_replay(plan: Plan) -> str:
    """What the user can do about a model that the replay cannot measure."""
    if plan.inc_check["status"] == "reproduces_fp32":
        return "set sensitivity.engine to inc"
    return "INC cannot measure this model either, so choose another model.path"


def require_finite(record: dict[str, float], index: int, label: str, name: str) -> dict[str, float]:
    """The record of an op, after a check that all its numbers are finite.

    Raises:
        InputError: the message names op, map and batch.
    """
    advice = "keep that op in FP32 with sensitivity.op_name_dict, or check the weights"
    return metrics.require_finite(record, f"batch {index}, map {label}", name or "all ops", advice)


def assembled(work: Work, device: torch.device) -> Capture:
    """All scores as one capture: rows by batch, map and the plan's order."""
    plan = work.plan
    return Capture(
        engine=plan.engine,
        arithmetic=arithmetic(device),
        tf32=device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        model=plan.model,
        calibration=plan.calibration,
        plan_digest=digest_of_record(plan),
        versions=plan.versions,
        batches=tuple(ScoredBatch(index, work.references[index]) for index in range(len(work.batches))),
        second_pass=tuple(work.second_pass.get(index, {}) for index in range(len(work.batches))),
        scores=tuple(rows(work)),
    )


def rows(work: Work) -> Iterator[Score]:
    """The scores in order; an op has no score on a batch where it did not run."""
    for index, scheme in product(range(len(work.batches)), work.plan.schemes):
        ran = [op.op_name for op in work.plan.ops if op.executions[index] and scheme in op.schemes]
        for label in maps_of(scheme, (*work.plan.maps, ALL)):
            for name in ran if label != ALL else [""]:
                record = work.scores[index, scheme, label, name]
                yield Score(index, label, scheme, name, **{key: record.get(key) for key in METRICS})  # type: ignore[arg-type]


def arithmetic(device: torch.device) -> Arithmetic:
    """Properties of this machine that the bits of a score depend on."""
    # The number of threads counts, because sums of float32 depend on it.
    return Arithmetic(device.type, torch.get_num_threads(), instruction_set(), cpu_kernel())


def context(model: torch.nn.Module, plan: Plan, ops: Sequence[Any], engine: str = "replay") -> dict[str, Any]:
    """What a score depends on, apart from batch, scales and state; the store separates the scores of each context."""
    device = next(model.parameters()).device
    return {
        "engine": engine,
        "model": plan.model_digest,
        "ops": digest_of([[op.op_name, op.op_type, asdict(op.inc_int8)] for op in ops]),
        "measured_op": plan.measured_op,
        "reduce_range": plan.reduce_range,
        "versions": plan.versions,
        "torch": torch.__version__,
        "transformers": version("transformers"),  # of this process; the plan's may be older
        "gpu": None if device.type == "cpu" else torch.cuda.get_device_name(device),
        **asdict(arithmetic(device)),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "code": CODE,
    }


def state_key(
    assignment: Assignment,
    schemes: Mapping[str, Any] = MappingProxyType({}),
    seen: Scales = MappingProxyType({}),
) -> str:
    """A state's key on a shelf.

    Args:
        assignment: the state.
        schemes: the plan's; the fields of those that the state uses count.
        seen: whose input ranges schemes of compressed-tensors take; those of the ops in such schemes count.
    """
    used = {name: schemes[name] for name in sorted(set(assignment.values()) - {INC_INT8})}
    if not used:
        return digest_of(dict(assignment))
    ranges = {
        name: [found.minimum, found.maximum]
        for name, scheme in assignment.items()
        if scheme in used and name in seen and (found := seen[name].input)
    }
    return digest_of([dict(assignment), used, ranges])


def digest_of_batch(batch: Batch) -> str:
    """SHA-256 of a batch's tensors."""
    return digest_of(
        {name: [str(tensor.dtype), list(tensor.shape), tensor_digest(tensor)] for name, tensor in batch.items()}
    )


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return sha256_bytes(tensor.detach().cpu().contiguous().numpy().tobytes())


def described(capture: Capture, calibration: CalibrationManifest) -> Capture:
    """The capture with each batch's sample ids and token counts from the calibration manifest."""
    samples, size = calibration.samples["calibration"], calibration.batch_size
    batches = []
    for entry in capture.batches:
        members = samples[entry.batch * size : (entry.batch + 1) * size]
        batches.append(
            replace(
                entry,
                sample_ids=tuple(sample.id for sample in members),
                tokens=sum(sample.tokens for sample in members),
                image_tokens=sum(sample.image_tokens for sample in members),
            )
        )
    return replace(capture, batches=tuple(batches))
