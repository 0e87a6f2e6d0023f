"""The audit: INC's unmodified helpers measure a sample of ops again, and the values are compared with the capture.

In: the model, one calibration batch, the plan and the capture. Out: what was compared, and the result. On the CPU any
difference is an error, whatever its size. Where INC cannot measure the model, torch's own quantized modules measure.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from auto_quantize_model.files import InputError
from auto_quantize_model.inc.engine import inc_scores, spec_of
from auto_quantize_model.inc.plan import config_of_inc
from auto_quantize_model.inc.torch_modules import torch_scores
from auto_quantize_model.inc_pytorch_mse_patching import activations_reduced
from auto_quantize_model.machine import any_algorithm, with_threads
from auto_quantize_model.measure.metrics import squared_error
from auto_quantize_model.measure.parts import WHOLE, Place, cut
from auto_quantize_model.measure.states import ALL
from auto_quantize_model.records import Audit, Capture, Plan, Scales, Score, digest_of_record
from auto_quantize_model.replay.devices import check_sites
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.scheme import INC_INT8

# `requantize` is a running total: INC starts from the state before the op, and does not measure all ops before it.
HELPER_OF = {"isolated": "isolated", "fallback": "fallback", "requantize": "requantize_at"}
AUDITORS = {"inc": "INC", "torch": "torch's own quantized modules"}


def sample_ops(plan: Plan, capture: Capture, batch: int, count: int) -> list[str]:
    """The least and the most sensitive op of a batch, and others drawn by the plan's digest, in the plan's order.

    The ops are those with a score on the batch, or with an estimate where no score of an op alone was measured.
    """
    values = sensitivities(plan, capture, batch)
    ranked = sorted(values, key=values.__getitem__)
    extremes = [ranked[-1], ranked[0]][:count] if len(ranked) > 1 else ranked[:count]
    others = [name for name in ranked if name not in extremes]
    generator = np.random.default_rng(int(capture.plan_digest[:16], 16))
    drawn = generator.permutation(len(others))[: max(0, count - len(extremes))]
    chosen = {*extremes, *(others[index] for index in drawn)}
    return [name for name in values if name in chosen]


def sensitivities(plan: Plan, capture: Capture, batch: int) -> dict[str, float]:
    """A number for each op on a batch that orders the ops by their sensitivity."""
    of_batch = [
        score for score in capture.scores if score.batch == batch and score.scheme == INC_INT8 and score.map != ALL
    ]
    maps = {score.map for score in of_batch}
    label = "isolated" if "isolated" in maps else next((name for name in plan.maps if name in maps), "")
    if label != "isolated" and capture.estimates:
        estimates = capture.estimates_of(INC_INT8)
        ran = [op.op_name for op in plan.ops if op.executions[batch]]
        return {name: estimates[name].divergence for name in ran if name in estimates}
    return {score.op_name: score.mse_value for score in of_batch if score.map == label}


def audited_batch(capture: Capture) -> int:
    """The batch that is audited, drawn by the plan's digest."""
    return int(capture.plan_digest[16:32], 16) % len(capture.batches)


def auditor(plan: Plan) -> str:
    """The auditor: `inc`, or `torch` where INC cannot measure the model."""
    return "torch" if plan.inc_check["status"] == "cannot" else "inc"


def announce(plan: Plan, capture: Capture, count: int) -> str:
    """What an audit of `count` ops will do, in one line. The progress bar shows the time that it takes."""
    if capture.engine == "inc":
        return "audit: not needed, INC itself measured every op"
    if INC_INT8 not in plan.schemes:
        return f"audit: {INC_INT8} is not measured, so INC measures nothing again"
    names = sample_ops(plan, capture, audited_batch(capture), count)
    count_of_values = len(names) * len(plan.maps)
    more = f" (sensitivity.audit_ops asks for {count}; no more ran)" if count > len(names) else ""
    return (
        f"audit: {len(names)} of {len(plan.ops)} ops{more} on batch {audited_batch(capture)},"
        f" {count_of_values} value{'s' * (count_of_values != 1)} by {AUDITORS[auditor(plan)]}"
    )


def audit_capture(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    capture: Capture,
    count: int,
    scales: Sequence[Scales] | None = None,
    on_op: Callable[[int, int], None] = lambda done, total: None,
    place: Place = WHOLE,
) -> Audit:
    """Compare `count` ops of one batch, in every map, with INC's unmodified helpers, or with torch where INC cannot.

    Args:
        model: FP32, eval mode, on the CPU.
        batches: the calibration batches.
        plan: the plan that the capture was made from.
        capture: the scores to audit.
        count: ops to compare, at most those that ran; batch and ops are drawn by the plan's digest.
        scales: of each scored batch, used to compare a GPU's ops with the CPU's; None calibrates here.
        on_op: called with the number done and the total, before the first score and after each.
        place: which part of how many; a part compares its share of the ops.

    Returns:
        `status` is `bit_identical`, `not_needed` where INC itself was the engine, or `not_measured` where `inc_int8`
        is not among the schemes. On CUDA it is
        `sites_bit_identical`, with `rank_agreement` (Spearman's, per map, over the ops compared). `by` is `inc` or
        `torch`.

    Raises:
        InputError: a value differs. The message names op, map, batch and both values.
    """
    if capture.plan_digest != digest_of_record(plan):
        raise InputError("the capture was made from another plan; run the capture rule again (--forcerun)")
    by = auditor(plan)
    if capture.engine == "inc":
        return Audit("not_needed", by, None, (), (), 0, {})
    if INC_INT8 not in plan.schemes:
        return Audit("not_measured", by, None, (), (), 0, {})
    batch = audited_batch(capture)
    sample = sample_ops(plan, capture, batch, count)
    names = [sample[position] for position in cut([1.0] * len(sample), place.parts)[place.number - 1]]
    found = {label: values_of(capture.of_map(label), names, batch) for label in plan.maps}
    missing = [name for name in names if name not in found.get("isolated", names)]
    measure = _by_inc if by == "inc" else _by_torch
    total = len(names) * len(plan.maps)
    with incs_surroundings(capture.arithmetic.threads, plan.reduce_range):
        if missing:
            found["isolated"] |= replayed(model, batches[batch], plan, missing)
        expected = measure(model, batches, batch, plan, names, _counted(on_op, total)) if names else {}
        gc.collect()  # INC's models hold themselves in circles, and the audit of other schemes needs the memory
    on_op(total, total)
    compared = by, batch, tuple(names), plan.maps, total
    device = capture.arithmetic.device
    if device == "cpu":
        require_equal(found, expected, batch, AUDITORS[by])
        return Audit("bit_identical", *compared, {})
    check_sites(model, batches[batch], plan, names, torch.device(device), scales[batch] if scales else None)
    # What was replayed here, on the CPU, says nothing of the GPU.
    captured = [label for label in plan.maps if label != "isolated" or not missing]
    agreement = {label: rank_agreement(found[label], expected[label]) for label in captured}
    return Audit("sites_bit_identical", *compared, agreement)


def joined(parts: Sequence[Audit]) -> Audit:
    """The audit of all parts, in their order; of a capture on the CPU, because ranks on a GPU need all ops together."""
    served = {scheme: sum(part.served[scheme] for part in parts) for scheme in parts[0].served}
    ops = tuple(name for part in parts for name in part.ops)
    return replace(parts[0], ops=ops, compared=sum(part.compared for part in parts), served=served)


def values_of(scores: Mapping[str, Sequence[Score | None]], names: Sequence[str], batch: int) -> dict[str, float]:
    """The captured values of the named ops, which ran on that batch."""
    return {name: score.mse_value for name in names if name in scores and (score := scores[name][batch])}


def replayed(model: torch.nn.Module, batch: Batch, plan: Plan, names: Sequence[str]) -> dict[str, float]:
    """The scores of ops alone by the replay, for ops that the capture only estimates."""
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batch)
        reference = replay.begin(batch)
        return {name: squared_error(reference, replay.run({name: INC_INT8})) for name in names}


def require_equal(
    found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]], batch: int, reference: str
) -> None:
    """Refuse captured values that differ from the expected ones in any bit.

    Raises:
        InputError: the message names op, map, batch and both values.
    """
    for label, values in expected.items():
        for name, value in values.items():
            if found[label][name] != value:
                raise InputError(
                    f"audit: batch {batch}, map {label}, {name}: the capture has {found[label][name]!r}, and"
                    f" {reference} gives {value!r}. Do not use this capture, and report the difference with the plan"
                )


def _counted(on_op: Callable[[int, int], None], total: int) -> Callable[..., None]:
    """A callback that reports to `on_op`. INC calls it before each score, so the first call reports 0 done."""
    done = -1

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        on_op(done, total)

    return count


def rank_agreement(found: dict[str, float], expected: dict[str, float]) -> float | None:
    """Spearman's rank correlation over the ops of `found`; None where all values of one side are equal."""
    statistic = float(spearmanr(list(found.values()), [expected[name] for name in found]).statistic)
    return None if math.isnan(statistic) else statistic


@contextmanager
def incs_surroundings(threads: int, reduce_range: bool) -> Iterator[None]:
    """Set the capture's number of threads and the plan's `reduce_range`, and allow all of INC's kernels.

    A run on a GPU may have restricted torch to deterministic kernels.
    """
    with with_threads(threads), any_algorithm(), activations_reduced(reduce_range):
        yield


def _by_inc(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    batch: int,
    plan: Plan,
    names: Sequence[str],
    on_op: Callable[..., None],
) -> dict[str, dict[str, float]]:
    """INC's values of the named ops on one batch: {map: {op: value}}."""
    spec = spec_of(plan)
    conf = config_of_inc(model, batches, spec)
    modules = plan.by_inc_name
    values = {}
    for label in plan.maps:
        scores, _ = inc_scores(model, conf, batches[batch], plan.measured_op, HELPER_OF[label], names, on_op)
        values[label] = {modules[inc_name]: value for inc_name, value in scores.items()}
    return values


def _by_torch(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    batch: int,
    plan: Plan,
    names: Sequence[str],
    on_op: Callable[..., None],
) -> dict[str, dict[str, float]]:
    """The same values from torch's own quantized modules in the FP32 model."""
    return torch_scores(model, batches[batch], plan, names, on_op)
