"""The reference engine: every score by INC's unmodified helpers, on the CPU, one rebuilt model per op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import SensitivitySpec, ops_to_keep, plan_ops, quant_config
from auto_quantize_model.inc_pytorch_mse_patching import activations_reduced, run_single_mse_v2_sensitivity_pass
from auto_quantize_model.measure.capture import Progress, note_batch, require_finite
from auto_quantize_model.measure.journal import Journal
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.replay.model import Batch


def measure_by_inc(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    plan: dict[str, Any],
    share: dict[str, list[str]],
    journal: Journal,
    on_progress: Progress,
) -> None:
    """Measure a share of the maps, {map: ops}, with INC, into the journal.

    A map is on record once it is whole: INC runs it in one call.

    Raises:
        InputError: the model is not on the CPU, INC plans it otherwise than `plan` says, or a number is not finite.
    """
    if next(model.parameters()).device.type != "cpu":
        raise InputError("INC's quantized kernels run on the CPU only; set sensitivity.device to cpu")
    require_same_plan(model, batches, plan)
    spec = spec_of(plan)
    conf = quant_config(spec.confidence_batches, ops_to_keep(model, batches, spec))
    modules = {op["inc_name"]: op["op_name"] for op in plan["ops"]}
    per_batch = sum(len(names) for label, names in share.items() if label != "all_int8") + 1
    done = 0
    for index, batch in enumerate(batches):
        executions, output = run_in_fp32(model, batch, list(modules.values()), plan["measured_op"])
        note_batch(journal, index, Reference(output, batch.get("mm_token_type_ids")).totals(), executions)
        for label, names in share.items():

            def count(*_: Any) -> None:
                nonlocal done
                done += 1
                on_progress(done, per_batch * len(batches))

            ran = [""] if label == "all_int8" else [name for name in names if executions[name]]
            if all(f"{index}/{label}/{name}" in journal.records for name in ran):
                done += len(names) if label != "all_int8" else 1
                continue
            with activations_reduced(plan["reduce_range"]):
                scores, second_pass = inc_scores(model, conf, batch, plan["measured_op"], label, names, count)
            for inc_name, value in scores.items():
                name = "" if label == "all_int8" else modules[inc_name]
                if name in ran:
                    record = require_finite({"mse_value": value}, index, label, name)
                    journal.add(f"{index}/{label}/{name}", record)
            if label == "fallback":
                rescored = {modules[name]: value for name, value in second_pass.items()}
                journal.add(f"{index}/second_pass", require_finite(rescored, index, "fallback, second pass", ""))


def inc_scores(
    model: torch.nn.Module,
    conf: Any,
    batch: Batch,
    measured_op: str,
    label: str,
    names: Sequence[str],
    on_op: Callable[[str, str], None] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """INC's scores of the named ops in one map, and those of its second pass, by INC's names of the ops."""
    calls = run_single_mse_v2_sensitivity_pass(
        model, conf, CalibrationLoader([batch]), measured_op=measured_op, maps=[label], only=names, on_op=on_op
    )
    call = calls[label]
    return {name: value for (name, _), value in call.scores.items()}, {
        name: value for (name, _), value in call.second_pass.items()
    }


def require_same_plan(model: torch.nn.Module, batches: Sequence[Batch], plan: dict[str, Any]) -> None:
    """Refuse a plan that INC would not make today.

    Raises:
        InputError: the ops, what is excluded, or the measured op differ from those of the plan.
    """
    with activations_reduced(plan["reduce_range"]):
        fresh = plan_ops(model, batches, spec_of(plan))
    for key in ("ops", "excluded", "measured_op"):
        if getattr(fresh, key) != plan[key]:
            raise InputError(
                f"the plan's {key} are not what INC plans for this model now; make the plan again"
                " (snakemake --cores 1 --forcerun plan_quantization)"
            )


def require_inc(plan: dict[str, Any]) -> None:
    """Refuse to have INC quantize a model that it cannot convert.

    Raises:
        InputError: with the reason.
    """
    if plan["inc_check"]["status"] == "cannot":
        raise InputError(
            f"INC cannot quantize this model: {plan['inc_check']['reason']}; apply the profile with another tool, its"
            " files lie in the folder of exports"
        )


def spec_of(plan: dict[str, Any]) -> SensitivitySpec:
    """The sensitivity block that a plan was made from."""
    return SensitivitySpec(
        plan["engine"], plan["confidence_batches"], plan["maps"], **plan["keep"], reduce_range=plan["reduce_range"]
    )


def run_in_fp32(
    model: torch.nn.Module, batch: Batch, names: Sequence[str], measured_op: str
) -> tuple[dict[str, int], torch.Tensor]:
    """How often each op runs in one FP32 forward of `batch`, and the output at the measured op.

    Raises:
        InputError: that output is not finite.
    """
    counts = dict.fromkeys(names, 0)
    outputs: list[torch.Tensor] = []

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            if name in counts:
                counts[name] += 1
            if name == measured_op:
                outputs.append(output)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(count(name)) for name in {*names, measured_op}]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs[-1].isfinite().all():
        raise InputError(f"the FP32 output at {measured_op} is not finite on a calibration batch; check the weights")
    return counts, outputs[-1]
