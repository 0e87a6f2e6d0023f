"""The error of every planned op, batch for batch, by the engine that the plan names.

In: the model, the plan and the calibration batches. Out: the capture (deterministic) and a record of the run (times,
host: volatile). The replay needs torch alone; who asks for another engine hands it over.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_quantize_model.files import InputError, digest_of, sha256_file
from auto_quantize_model.machine import instruction_set, usage
from auto_quantize_model.measure import metrics
from auto_quantize_model.measure.journal import Journal
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.states import states
from auto_quantize_model.replay.model import Batch, OtherOrder, Replay, refusals
from auto_quantize_model.replay.ops import cpu_kernel

Progress = Callable[[int, int], None]  # done and total, in runs of a block (replay) or ops (INC)
# Measures a share of the maps, {map: ops}, into the journal: `inc.engine.measure_by_inc`.
Engine = Callable[[torch.nn.Module, Sequence[Batch], dict[str, Any], dict[str, list[str]], Journal, Progress], None]


def capture_sensitivity(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: dict[str, Any],
    journal: Journal,
    on_progress: Progress = lambda done, total: None,
    by_inc: Engine | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score every op of `plan` on each confidence batch.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        batches: the calibration batches; the first `plan["confidence_batches"]` are scored.
        plan: as `plan.build_plan` returns it.
        journal: keeps each score; those that it holds already are not measured again.
        on_progress: called after each score.
        by_inc: the engine that measures what the replay does not; None where INC is not at hand.

    Returns:
        (capture, run_record). The capture holds, for each batch, `reference` (sums of squares of the FP32 output at
        the measured op) and `all_int8` (the record with every op in INT8), the executions of each op, and the maps: op
        to its record per batch, null where the op did not run. A record is what `metrics.Reference.compare` returns,
        or `mse_value` alone where INC measured.

    Raises:
        InputError: a score or the reference is not finite, INC plans the model otherwise than `plan` says, or an op is
            not covered by the engine.
    """
    device = next(model.parameters()).device
    if len(batches) < plan["confidence_batches"]:
        raise InputError(
            f"the plan asks for {plan['confidence_batches']} batches, the calibration set has {len(batches)}"
        )
    started = time.monotonic()
    batches = batches[: plan["confidence_batches"]]
    of_replay, of_inc = share_of_engines(model, plan)
    if of_inc and by_inc is None:
        raise InputError("the plan has INC measure, and INC is not at hand here; set sensitivity.engine to replay")
    record: dict[str, Any] = {"resumed_scores": journal.found}
    if of_replay:
        try:
            record |= _measure_by_replay(model, batches, plan, of_replay, journal, on_progress)
        except OtherOrder as error:
            raise InputError(f"{error}; {without_replay(plan)}") from None
    if of_inc and by_inc:
        by_inc(model, batches, plan, of_inc, journal, on_progress)
    record["seconds"] = round(time.monotonic() - started, 3)
    return _assemble(plan, journal.records, device), record | usage(device)


def share_of_engines(model: torch.nn.Module, plan: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Which ops of which map replay measures, and which INC: {map: ops}, `all_int8` among the maps.

    With `auto`, an op that no site reproduces goes to INC, and so does every map in which other ops are in INT8 beside
    it, since no state of such a map is without it.
    """
    names = [op["op_name"] for op in plan["ops"]]
    everything = {label: names for label in [*plan["maps"], "all_int8"]}
    uncovered = refusals(model, plan["ops"]) if plan["engine"] == "auto" else {}
    if plan["engine"] == "inc":
        return {}, everything
    if not uncovered:
        return everything, {}
    covered = {"isolated": [name for name in names if name not in uncovered]} if "isolated" in plan["maps"] else {}
    return covered, everything | ({"isolated": list(uncovered)} if covered else {})


def _measure_by_replay(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: dict[str, Any],
    share: dict[str, list[str]],
    journal: Journal,
    on_progress: Progress,
) -> dict[str, Any]:
    """Measure a share of the maps by replay, into the journal; what there is to say of it for the run record."""
    ops = [op for op in plan["ops"] if op["op_name"] in next(iter(share.values()))]
    done, seconds, cached = 0, [], 0
    with Replay(model, ops, plan["measured_op"]) as replay:
        for index, batch in enumerate(batches):
            started = time.monotonic()
            reference = Reference(replay.calibrate(batch), batch.get("mm_token_type_ids"))
            note_batch(journal, index, reference.totals(), replay.executions)
            work = list(states(replay.order, [op["op_name"] for op in ops], share))
            costs = [replay.cost(changed) for _, changed, _ in work]
            for cost, (label, name, state) in zip(costs, work, strict=True):
                key = f"{index}/{label}/{name}"
                if key not in journal.records:
                    journal.add(key, require_finite(reference.compare(replay.run(state)), index, label, name))
                done += cost
                on_progress(done, sum(costs) * len(batches))
            seconds.append(round(time.monotonic() - started, 3))
            cached = max(cached, replay.cached_bytes)
    return {"seconds_per_batch": seconds, "cached_bytes": cached}


def without_replay(plan: dict[str, Any]) -> str:
    """What a user can do about a model that the replay cannot measure."""
    if plan["inc_check"]["status"] == "reproduces_fp32":
        return "set sensitivity.engine to inc"
    return "INC cannot measure this model either, so choose another model.path"


def note_batch(journal: Journal, index: int, totals: dict[str, float], executions: dict[str, int]) -> None:
    """Put on record what a batch's FP32 run shows; where two engines share the work, each its ops."""
    journal.add(f"{index}/reference", totals)
    journal.add(f"{index}/executions", journal.records.get(f"{index}/executions", {}) | executions)


def require_finite(record: dict[str, float], index: int, label: str, name: str) -> dict[str, float]:
    """The record of an op, if each of its numbers is one.

    Raises:
        InputError: naming op, map and batch.
    """
    advice = "keep that op in FP32 with sensitivity.op_name_dict, or check the weights"
    return metrics.require_finite(record, f"batch {index}, map {label}", name or "all ops", advice)


def _assemble(plan: dict[str, Any], records: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The journal's records as a capture."""
    names = [op["op_name"] for op in plan["ops"]]
    batches = range(plan["confidence_batches"])
    executions = {name: [records[f"{index}/executions"][name] for index in batches] for name in names}
    maps = {
        label: {
            name: [records[f"{index}/{label}/{name}"] if executions[name][index] else None for index in batches]
            for name in names
        }
        for label in plan["maps"]
    }
    return {
        "engine": plan["engine"],
        "device": device.type,
        **arithmetic(),
        "tf32": device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "model": plan["model"],
        "calibration": plan["calibration"],
        "plan_digest": digest_of(plan),
        "versions": plan["versions"],
        "batches": [
            {"batch": index, "reference": records[f"{index}/reference"], "all_int8": records[f"{index}/all_int8/"]}
            for index in batches
        ],
        "executions": executions,
        "maps": maps,
        "second_pass": [records.get(f"{index}/second_pass", {}) for index in batches],
    }


def arithmetic() -> dict[str, Any]:
    """What of this machine the bits of a score depend on: {threads, instruction_set, int8_kernel}."""
    # Sums of float32 depend on how many threads share them.
    threads = torch.get_num_threads()
    return {"threads": threads, "instruction_set": instruction_set(), "int8_kernel": cpu_kernel()}


def fingerprint(plan: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the scores of a capture depend on: a journal made under another one is of no use."""
    library = sorted(Path(__file__).parents[1].rglob("*.py"))
    return {
        "plan": digest_of(plan),
        "model": plan["model_digest"],
        "calibration": plan["calibration_digest"],
        "versions": plan["versions"],
        "torch": torch.__version__,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        **arithmetic(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "code": digest_of([sha256_file(path) for path in library]),
    }


def describe_batches(capture: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
    """The capture with each batch's sample ids and token counts, as the calibration manifest lists them."""
    samples, size = calibration["samples"]["calibration"], calibration["batch_size"]
    batches = []
    for entry in capture["batches"]:
        members = samples[entry["batch"] * size : (entry["batch"] + 1) * size]
        counts = {key: sum(sample[key] for sample in members) for key in ("tokens", "image_tokens")}
        batches.append(entry | {"sample_ids": [sample["id"] for sample in members]} | counts)
    return capture | {"batches": batches}
