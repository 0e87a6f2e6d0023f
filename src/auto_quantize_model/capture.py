"""The error of every planned op, by INC's unmodified helpers, batch for batch.

In: the model, the plan and the calibration batches. Out: the capture (deterministic) and a record of the run (times,
host: volatile).
"""

import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from auto_quantize_model.calibration import Batch, CalibrationLoader
from auto_quantize_model.files import InputError, digest_of
from auto_quantize_model.inc_pytorch_mse_patching import HelperCall, run_single_mse_v2_sensitivity_pass
from auto_quantize_model.plan import SensitivitySpec, build_plan, ops_to_keep, quant_config, versions


def capture_sensitivity(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: dict[str, Any],
    on_op: Callable[[int, str, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score every op of `plan` on each confidence batch.

    Args:
        model: FP32, eval mode, on the CPU; left as it was.
        batches: the calibration batches; the first `plan["confidence_batches"]` are scored.
        plan: as `plan.build_plan` returns it.
        on_op: called with batch, map and op before each score.

    Returns:
        (capture, run_record). The capture holds, for each batch, `reference_sum_of_squares` (of the FP32 output at the
        measured op) and `all_int8_mse_value`, the executions of each op, and the maps: op to its sum of squared errors
        per batch, null where the op did not run. INC gives such an op a plausible number, which means nothing.

    Raises:
        InputError: INC plans the model otherwise than `plan` says, or a score or the reference is not finite.
    """
    require_same_plan(model, batches, plan)
    spec = spec_of(plan)
    conf = quant_config(spec.confidence_batches, ops_to_keep(model, batches, spec))
    names = [op["op_name"] for op in plan["ops"]]
    capture: dict[str, Any] = {
        "engine": spec.engine,
        "device": "cpu",
        "model": plan["model"],
        "calibration": plan["calibration"],
        "plan_digest": digest_of(plan),
        "versions": versions(),
        "batches": [],
        "executions": {name: [] for name in names},
        "maps": {label: {name: [] for name in names} for label in spec.maps},
        "second_pass": [],
    }
    seconds = []
    for index in range(spec.confidence_batches):
        started = time.monotonic()
        counts, reference = count_executions(model, batches[index], names, plan["measured_op"])
        notify = None if on_op is None else lambda label, name, index=index: on_op(index, label, name)
        calls = run_single_mse_v2_sensitivity_pass(
            model,
            conf,
            CalibrationLoader([batches[index]]),
            measured_op=plan["measured_op"],
            maps=[*spec.maps, "all_int8"],
            on_op=notify,
        )
        modules = {op["inc_name"]: op["op_name"] for op in plan["ops"]}
        _record_batch(capture, index, calls, counts, reference, modules)
        seconds.append(round(time.monotonic() - started, 3))
    return capture, _run_record(seconds, len(names))


def require_same_plan(model: torch.nn.Module, batches: Sequence[Batch], plan: dict[str, Any]) -> None:
    """Refuse a plan that INC would not make today.

    Raises:
        InputError: the ops, what is excluded, or the measured op differ from those of the plan.
    """
    fresh = build_plan(model, batches, spec_of(plan))
    for key in ("ops", "excluded", "measured_op"):
        if fresh[key] != plan[key]:
            raise InputError(
                f"the plan's {key} are not what INC plans for this model now; make the plan again"
                " (snakemake --cores 1 --forcerun plan_quantization)"
            )


def spec_of(plan: dict[str, Any]) -> SensitivitySpec:
    """The sensitivity block that a plan was made from."""
    return SensitivitySpec(plan["engine"], plan["confidence_batches"], plan["maps"], **plan["keep"])


def describe_batches(capture: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
    """The capture with each batch's sample ids and token counts, as the calibration manifest lists them."""
    samples, size = calibration["samples"]["calibration"], calibration["batch_size"]
    batches = []
    for entry in capture["batches"]:
        members = samples[entry["batch"] * size : (entry["batch"] + 1) * size]
        counts = {key: sum(sample[key] for sample in members) for key in ("tokens", "image_tokens")}
        batches.append(entry | {"sample_ids": [sample["id"] for sample in members]} | counts)
    return capture | {"batches": batches}


def count_executions(
    model: torch.nn.Module, batch: Batch, names: Sequence[str], measured_op: str
) -> tuple[dict[str, int], float]:
    """How often each op runs in one FP32 forward of `batch`, and the sum of squares of the measured op's output.

    Raises:
        InputError: that output is not finite.
    """
    counts = dict.fromkeys(names, 0)
    reference: list[torch.Tensor] = []

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            if name in counts:
                counts[name] += 1
            if name == measured_op:
                reference.append(output)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(count(name)) for name in {*names, measured_op}]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    total = float(reference[-1].double().pow(2).sum())
    if not math.isfinite(total):
        raise InputError(f"the FP32 output at {measured_op} is not finite on a calibration batch; check the weights")
    return counts, total


def _record_batch(
    capture: dict[str, Any],
    index: int,
    calls: dict[str, HelperCall],
    counts: dict[str, int],
    reference: float,
    modules: dict[str, str],
) -> None:
    """Add one batch to the capture, its scores under the modules' names."""
    scores = {
        label: {modules[name]: value for (name, _), value in call.scores.items()} for label, call in calls.items()
    }
    for label, values in scores.items():
        for name, value in values.items():
            if counts[name] and not math.isfinite(value):
                raise InputError(
                    f"batch {index}, map {label}: the score of {name} is {value}; keep that op in FP32 with"
                    " sensitivity.op_name_dict, or check the weights"
                )
    for name, count in counts.items():
        capture["executions"][name].append(count)
        for label, per_op in capture["maps"].items():
            per_op[name].append(scores[label][name] if count else None)
    (all_int8,) = scores["all_int8"].values()
    capture["batches"].append({"batch": index, "reference_sum_of_squares": reference, "all_int8_mse_value": all_int8})
    second = calls["fallback"].second_pass if "fallback" in calls else {}
    capture["second_pass"].append({modules[name]: value for (name, _), value in second.items()})


def _run_record(seconds: list[float], ops: int) -> dict[str, Any]:
    """What differs from run to run: never an input of the report."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ops": ops,
        "seconds_per_batch": seconds,
    }
