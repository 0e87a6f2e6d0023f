"""Measure the error of every planned op on each batch, by the engine that the plan names.

In: the model, the plan, the scales and the calibration batches. Out: the capture (deterministic), and a record of the
run (times and host, which vary). The replay needs torch alone. Callers pass in any other engine.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from auto_quantize_model.code import code_digest_of_modules
from auto_quantize_model.files import InputError, digest_of, sha256_bytes
from auto_quantize_model.machine import instruction_set, usage
from auto_quantize_model.measure import metrics
from auto_quantize_model.measure.effort import Costs, chosen, described_effort, selected
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.probes import Values, Wanted, estimates, probe
from auto_quantize_model.measure.states import ALL, ALONE, UNITS, maps_of, states
from auto_quantize_model.measure.store import ScoreStore, Shelf
from auto_quantize_model.records import (
    METRICS,
    Arithmetic,
    CalibrationManifest,
    Capture,
    Effort,
    Estimate,
    Op,
    Plan,
    Scales,
    Score,
    ScoredBatch,
    digest_of_record,
)
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Batch, OtherOrder, Replay, refusals
from auto_quantize_model.replay.scales import digest_of_scales
from auto_quantize_model.schemes.inc_int8 import cpu_kernel
from auto_quantize_model.schemes.scheme import INC_INT8, Assignment, without_places

# Digest of the code that a score depends on, taken at import: files may change during a long run.
CODE = code_digest_of_modules(
    f"auto_quantize_model.{name}" for name in ("replay.model", "measure.metrics", "measure.probes", "models.snapshot")
)
Progress = Callable[[int, int], None]  # done and total: block runs (replay) or ops (INC)
Share = dict[str, list[str]]  # {map: ops}


@dataclass(kw_only=True)
class Measured:
    """What was measured of a plan.

    Attributes:
        scores: {(batch, scheme, map, op_name): record}, for all scores that are known already.
        references: for each batch, the sums of squares of the FP32 output.
        second_pass: for each batch, the scores of INC's second pass: {op_name: mse_value}.
        candidates: the schemes of compressed-tensors in which units of several ops are measured as well.
        tied: whether ops with one weight are measured together in `inc_int8` too, because a decision is about both.
            INC as the engine measures each op alone.
        effort: which scores of the isolated map are measured.
        estimates: of every op, unit and scheme, where not all scores are measured.
        selected: {scheme: ops and units whose scores alone are measured}; None for all.
    """

    plan: Plan
    scores: dict[tuple[int, str, str, str], Mapping[str, float]] = field(default_factory=dict)
    references: dict[int, dict[str, float]] = field(default_factory=dict)
    second_pass: dict[int, dict[str, float]] = field(default_factory=dict)
    candidates: Sequence[str] = ()
    tied: bool = True
    effort: Effort = Effort()
    estimates: Sequence[Estimate] = ()
    selected: Mapping[str, set[str]] | None = None

    def estimate(self, values: Sequence[Sequence[Values]]) -> None:
        """Take the estimates from the values of each probe on each batch, and choose the scores to measure."""
        self.estimates = estimates(values)
        found: dict[str, set[str]] = {}
        ops = set(self.plan.op_names)
        for of_ops in (True, False):
            part = [made for made in self.estimates if (made.op_name in ops) == of_ops]
            for scheme, names in selected(self.effort, part).items():
                found[scheme] = found.get(scheme, set()) | names
        self.selected = found

    def is_measured(self, scheme: str, label: str, name: str) -> bool:
        """Whether the score of a state is measured, and not only estimated."""
        return label not in ALONE or self.selected is None or name in self.selected.get(scheme, ())

    def units(self, scheme: str) -> dict[str, tuple[str, ...]]:
        """{unit: its ops} for the units of several ops that are measured in a scheme."""
        several = [unit for unit in self.plan.units if len(unit.ops) > 1]
        if scheme == INC_INT8:  # INC holds each op as a matrix of its own
            return {"+".join(unit.ops): unit.ops for unit in several if unit.tied and self.tied}
        return {unit.name: unit.ops for unit in several if scheme in unit.schemes and scheme in self.candidates}


@dataclass(kw_only=True)
class Work(Measured):
    """What an engine measures, and where it puts the scores.

    Attributes:
        batches: the scored batches.
        opened: the shelves that were opened.
        found: how many records the store already had.
        dropped: how many of the store's records were damaged.
    """

    model: torch.nn.Module
    batches: Sequence[Batch]
    store: ScoreStore
    opened: set[Path] = field(default_factory=set)
    found: int = 0
    dropped: int = 0

    def shelf(self, of: dict[str, Any]) -> Shelf:
        """The scores that the store keeps for one context."""
        shelf = self.store.shelf(of)
        if shelf.path not in self.opened:
            self.opened.add(shelf.path)
            self.found += shelf.found
            self.dropped += shelf.dropped
        return shelf

    def record(self, started: float) -> dict[str, Any]:
        """What the run record says of the work since a time of the monotonic clock, and of the machine."""
        found = {"resumed_scores": self.found, "dropped_scores": self.dropped}
        device = next(self.model.parameters()).device
        return found | {"seconds": round(time.monotonic() - started, 3)} | usage(device)


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
    exact: str = "all",
    time_budget: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    candidates: Sequence[str] = (),
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
        exact: which scores of the isolated map the replay measures, as `sensitivity.exact`; the others are estimated.
        time_budget: as `sensitivity.time_budget`.
        say: called once before the long work, with a line that says what will be measured and how long that takes.
        candidates: schemes of compressed-tensors in which each unit of several ops is measured as well.

    Returns:
        (capture, run_record).

    Raises:
        InputError: a score or the reference is not finite, or INC plans the model differently than `plan` says. Or the
            engine does not cover an op.
    """
    if len(batches) < plan.confidence_batches:
        raise InputError(f"the plan asks for {plan.confidence_batches} batches, the calibration set has {len(batches)}")
    started = time.monotonic()
    if plan.engine != "replay":
        if exact not in ("auto", "all") or time_budget:
            raise InputError(
                f"the plan's engine is {plan.engine}, and estimates need the replay alone; set sensitivity.exact to all"
                " and no sensitivity.time_budget, or set sensitivity.engine to replay"
            )
        exact = "all"
    work = Work(model=model, batches=batches[: plan.confidence_batches], plan=plan, store=store, candidates=candidates)
    of_replay, of_inc = share_of_engines(model, plan)
    if of_inc and by_inc is None:
        raise InputError("the plan asks for INC, and INC is not available here; set sensitivity.engine to replay")
    work.tied = not of_inc
    record: dict[str, Any] = {}
    if of_replay:
        try:
            record |= measure_by_replay(work, of_replay, on_progress, scales, of_all, exact, time_budget, say)
        except OtherOrder as error:
            raise InputError(f"{error}; {without_replay(plan)}") from None
    if of_inc and by_inc:
        by_inc(work, of_inc, on_progress)
    return assembled(work, *arithmetic_of(model)), record | work.record(started)


def news(record: Mapping[str, Any]) -> str:
    """The run record's counts of stored scores and probes, in words."""
    found, dropped = record["resumed_scores"], record["dropped_scores"]
    damaged = f"; {dropped} damaged scores were measured again" if dropped else ""
    return f"{found} results came from the store, all others were measured now{damaged}"


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


def measure_by_replay(
    work: Work,
    share: Share,
    on_progress: Progress,
    scales: Sequence[Scales] | None,
    of_all: Scales | None,
    exact: str,
    time_budget: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a share of the maps by replay, and return the entries for the run record."""
    plan, seconds, cached = work.plan, [], 0
    ops = [op for op in plan.ops if op.op_name in next(iter(share.values()))]
    indices = range(len(work.batches))
    with Replay(work.model, ops, plan.measured_op, schemes=schemes_of(plan.schemes, work.model)) as replay:
        by_replay = ByReplay(work, list(share), ops, replay, scales, of_all, on_progress)
        costs, multiply_adds = by_replay.costs()
        work.effort = chosen(exact, time_budget, costs, len(ops), multiply_adds, replay.device.type)
        say(described_effort(work.effort, costs, len(ops)))
        if probes := work.effort.probes:
            runs = len(replay.sequence) * costs.forwards_of_probes(probes)
            by_replay.expect(len(indices) * runs)
            work.estimate([by_replay.probed(index, range(probes), runs) for index in indices])
        by_replay.expect(sum(cost for cost, _ in by_replay.states()) * len(indices))
        for index in indices:
            started = time.monotonic()
            by_replay.measure(index)
            seconds.append(round(time.monotonic() - started, 3))
            cached = max(cached, replay.cached_bytes)
    return {"seconds_per_batch": seconds, "cached_bytes": cached}


class ByReplay:
    """The measurement of one model by replay, batch by batch.

    Args:
        maps: of the plan, with `all`.
        ops: those that the replay measures.
        scales: of each batch; None calibrates.
        of_all: whose input ranges schemes of compressed-tensors take; None takes those of each batch.
        on_progress: called with the number of block runs done and the total.
    """

    def __init__(
        self,
        work: Work,
        maps: Sequence[str],
        ops: Sequence[Op],
        replay: Replay,
        scales: Sequence[Scales] | None,
        of_all: Scales | None,
        on_progress: Progress,
    ) -> None:
        self.work, self.plan, self.maps, self.replay = work, work.plan, maps, replay
        self.ops = {op.op_name: op for op in ops}
        self.scales, self.of_all, self.on_progress = scales, of_all, on_progress
        self.known: dict[int, Scales] = {}
        self.base = context(work.model, work.plan, ops)
        self.done = self.total = 0.0

    def begin(self, index: int) -> Reference:
        """Begin a batch with its scales."""
        batch = self.work.batches[index]
        if index not in self.known:  # a batch is begun for its cost, for probes and for scores
            self.known[index] = self.scales[index] if self.scales else self.replay.calibrate(batch)
        of_batch = self.known[index]
        self.replay.set_scales(of_batch, self.of_all)
        self.seen = self.of_all or of_batch
        self.of = self.base | {"batch": digest_of_batch(batch), "scales": digest_of_scales(of_batch)}
        reference = Reference.of(self.replay.begin(batch), batch, self.plan.measured_op)
        require_executions(self.plan, index, self.replay.executions)
        self.work.references[index] = require_finite(reference.totals(), index, "reference", "")
        return reference

    def states(self) -> list[tuple[int, tuple[str, str, str, Assignment]]]:
        """The states to measure on the batch that was begun: how many blocks each runs, scheme, map, op, assignment."""
        return [
            (self.replay.cost(next(iter(assignment)) if label == UNITS else name), (scheme, label, name, assignment))
            for scheme in self.plan.schemes
            for label, name, assignment in states(
                [name for name in self.replay.order if scheme in self.ops[name].schemes],
                list(self.ops),
                maps_of(self.plan, scheme, (*self.maps, UNITS)),
                scheme,
                self.work.units(scheme),
                [
                    name
                    for name in self.replay.first_visit
                    if name not in self.replay.order and scheme in self.ops[name].schemes
                ],
            )
            if self.work.is_measured(scheme, label, name)
        ]

    def costs(self) -> tuple[Costs, float]:
        """What the plan costs, by a timed forward of the first batch, and the multiply-adds of the isolated map."""
        reference = self.begin(0)
        # The first call of each takes longer than the others.
        forward = timed(lambda: self.replay.begin(self.work.batches[0]))
        reference.compare(reference.output)
        comparison = timed(lambda: reference.compare(reference.output))
        blocks = max(1, len(self.replay.sequence))
        isolated = [cost / blocks for cost, (_, label, _, _) in self.states() if label in ALONE]
        others = [cost / blocks for cost, (_, label, _, _) in self.states() if label not in ALONE]
        batches = range(len(self.work.batches))
        # Other batches may run other ops, whose states take as long as those of this batch in the mean.
        states = sum(len(op.schemes) for op in self.ops.values() for index in batches if op.executions[index])
        states += len(batches) * sum(len(self.work.units(scheme)) for scheme in self.plan.schemes)
        mean = math.fsum(isolated) / len(isolated) if isolated else 1.0
        found = Costs(
            batches=len(batches),
            forward=forward,
            comparison=comparison,
            isolated=states,
            isolated_forwards=states * mean,
            others=len(batches) * len(others),
            other_forwards=len(batches) * math.fsum(others),
            schemes=len(self.plan.schemes),
        )
        weights = sum(math.prod(op.shape) for op in self.ops.values())
        positions = reference.output.shape[:-1].numel()
        return found, found.isolated_forwards * weights * positions

    def probed(self, index: int, probes: Sequence[int], runs: float) -> list[Values]:
        """The values of probes on a batch, from the store as far as it has them.

        Args:
            probes: their numbers.
            runs: how many block runs they cost.
        """
        self.begin(index)
        wanted = self.wanted()
        alone = [self.key(dict.fromkeys(ops, scheme)) for ops, schemes in wanted.values() for scheme in schemes]
        keys = [digest_of(["probe", number, alone]) for number in probes]
        seeds = {
            key: int(digest_of([self.of["batch"], number])[:15], 16) for number, key in zip(probes, keys, strict=True)
        }
        before = self.done
        with self.work.shelf(self.of) as shelf:
            missing = [key for key in keys if shelf.get(key) is None]
            if missing:
                on_block = lambda done, total: self.step(before + runs * done / total - self.done)  # noqa: E731
                found = probe(self.replay, wanted, [seeds[key] for key in missing], on_block)
                for key, values in zip(missing, found, strict=True):
                    for scheme, estimated in values.items():
                        for name, pair in estimated.items():
                            require_finite({"estimated divergence": pair[0]}, index, "isolated", name, scheme)
                    shelf.add(key, values)
            self.step(before + runs - self.done)
            return [shelf.records[key] for key in keys]

    def wanted(self) -> dict[str, Wanted]:
        """What is estimated on the batch that was begun: each op that runs, and each unit of several ops."""
        found: dict[str, Wanted] = {name: ([name], self.ops[name].schemes) for name in self.replay.order}
        units: dict[str, tuple[list[str], list[str]]] = {}
        for scheme in self.plan.schemes:
            for unit, ops in self.work.units(scheme).items():
                if ran := [name for name in ops if name in self.replay.order]:
                    units.setdefault(unit, (ran, []))[1].append(scheme)
        return found | units

    def measure(self, index: int, share: slice = slice(None)) -> None:
        """Measure the states of a batch, or a share of them, as far as the store does not have them."""
        reference = self.begin(index)
        with self.work.shelf(self.of) as shelf:
            work = [(self.key(state[-1]), cost, state) for cost, state in self.states()[share]]
            missing = {key: state[-1] for key, _, state in work if shelf.get(key) is None}
            outputs = self.replay.run_each(list(missing.values()))
            for key, cost, (scheme, label, name, _) in work:
                if (record := shelf.get(key)) is None:
                    record = require_finite(reference.compare(next(outputs)), index, label, name, scheme)
                    if (agreement := self.replay.routing_agreement()) is not None:
                        record = record | {"router_agreement": agreement}
                    shelf.add(key, record)
                self.work.scores[index, scheme, label, name] = record
                self.step(cost)

    def key(self, assignment: Assignment) -> str:
        """A state's key on the batch's shelf."""
        return state_key(assignment, self.plan.schemes, self.seen)

    @property
    def blocks(self) -> int:
        """How many blocks a forward of the batch that was begun runs."""
        return len(self.replay.sequence)

    def expect(self, runs: float) -> None:
        """More block runs will follow."""
        self.total += runs

    def step(self, runs: float) -> None:
        """Count block runs that are done."""
        self.done += runs
        self.on_progress(round(self.done), round(self.total))


def timed(run: Callable[[], object]) -> float:
    """The seconds that a function takes."""
    started = time.monotonic()
    run()
    return time.monotonic() - started


def require_executions(plan: Plan, index: int, executions: Mapping[str, int]) -> None:
    """Refuse a batch on which an op runs more or less often than the plan says.

    Raises:
        InputError: the message names the op.
    """
    planned = {op.op_name: op for op in plan.ops}
    for name, count in executions.items():
        expected = planned[name].executions[index]
        if count != expected:
            again = "make the plan again (snakemake --cores 1 --forcerun plan_quantization)"
            # The sums of another device have other last bits, and a router's choice can hang on one.
            elsewhere = "the router chooses otherwise on this device; set sensitivity.device to cpu, or "
            raise InputError(
                f"{name} runs {count} times on batch {index}, and the plan says {expected};"
                f" {elsewhere if planned[name].expert else ''}{again}"
            )


def without_replay(plan: Plan) -> str:
    """What the user can do about a model that the replay cannot measure."""
    if plan.inc_check["status"] in ("reproduces_fp32", "not_asked"):
        return "set sensitivity.engine to inc"
    return "INC cannot measure this model either, so choose another model.path"


def require_finite(
    record: dict[str, float], index: int, label: str, name: str, scheme: str = INC_INT8
) -> dict[str, float]:
    """The record of an op, after a check that all its numbers are finite.

    Raises:
        InputError: the message names op, map and batch, and the scheme unless it is INC's.
    """
    place = f"batch {index}, map {label}" + (f", scheme {scheme}" if scheme != INC_INT8 else "")
    advice = "keep that op in FP32 with sensitivity.op_name_dict, or check the weights"
    return metrics.require_finite(record, place, name or "all ops", advice)


def assembled(work: Measured, by: Arithmetic, tf32: bool) -> Capture:
    """All scores as one capture: rows by batch, map and the plan's order."""
    plan, batches = work.plan, range(work.plan.confidence_batches)
    return Capture(
        engine=plan.engine,
        arithmetic=by,
        tf32=tf32,
        model=plan.model,
        calibration=plan.calibration,
        plan_digest=digest_of_record(plan),
        versions=plan.versions,
        batches=tuple(ScoredBatch(index, work.references[index]) for index in batches),
        second_pass=tuple(work.second_pass.get(index, {}) for index in batches),
        scores=tuple(rows(work)),
        effort=work.effort,
        estimates=tuple(work.estimates),
        candidates=tuple(work.candidates),
    )


def rows(work: Measured) -> Iterator[Score]:
    """The scores in order; an op has no score on a batch where it did not run."""
    for index, scheme in product(range(work.plan.confidence_batches), work.plan.schemes):
        ran = [op.op_name for op in work.plan.ops if op.executions[index] and scheme in op.schemes]
        units = [name for name, ops in work.units(scheme).items() if not set(ran).isdisjoint(ops)]
        of_map = {ALL: [""], UNITS: units}
        for label in maps_of(work.plan, scheme, (*work.plan.maps, UNITS, ALL)):
            for name in of_map.get(label, ran):
                if work.is_measured(scheme, label, name):
                    record = work.scores[index, scheme, label, name]
                    yield Score(index, label, scheme, name, **{key: record.get(key) for key in METRICS})  # type: ignore[arg-type]


def arithmetic_of(model: torch.nn.Module) -> tuple[Arithmetic, bool]:
    """By which arithmetic a model is measured on its device, and whether a GPU may round products to TF32."""
    device = next(model.parameters()).device
    return arithmetic(device), device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


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
        "ops": digest_of([[op.op_name, op.op_type, op.unit, op.inc_int8 and asdict(op.inc_int8)] for op in ops]),
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
    used = {name: without_places(schemes[name]) for name in sorted(set(assignment.values()) - {INC_INT8})}
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
