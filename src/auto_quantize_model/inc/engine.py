"""The reference engine: INC's unmodified helpers measure every score on the CPU, with one rebuilt model per op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from auto_quantize_model.code import code_digest_of_modules
from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import config_of_inc, plan_ops, run_in_fp32
from auto_quantize_model.inc_pytorch_mse_patching import activations_reduced, run_single_mse_v2_sensitivity_pass
from auto_quantize_model.measure.capture import Progress, Share, Work, context, digest_of_batch, require_finite
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.states import ALL
from auto_quantize_model.measure.store import Shelf
from auto_quantize_model.records import Plan
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.schemes.scheme import INC_INT8

CODE = code_digest_of_modules(["auto_quantize_model.inc.engine"])  # at import, as in `measure.capture`
LABELS = {ALL: "all_int8"}  # the patching module's name of the state with every op quantized
SECOND_PASS = "second_pass"


def measure_by_inc(work: Work, share: Share, on_progress: Progress) -> None:
    """Measure a share of the maps with INC.

    A map is in the store only when it is complete, because INC runs a map in one call.

    Raises:
        InputError: the model is not on the CPU, INC plans it differently than the plan says, or a number is not finite.
    """
    plan, model = work.plan, work.model
    if next(model.parameters()).device.type != "cpu":
        raise InputError("INC's quantized kernels run on the CPU only; set sensitivity.device to cpu")
    require_same_plan(model, work.batches, plan)
    spec = spec_of(plan)
    conf = config_of_inc(model, work.batches, spec)
    base = context(model, plan, plan.ops, "inc")
    base["code"] = CODE
    total = (sum(len(names) for label, names in share.items() if label != ALL) + 1) * len(work.batches)
    done = 0

    def step(*_: Any) -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    for index, batch in enumerate(work.batches):
        _, output = run_in_fp32(model, batch, plan.op_names, plan.measured_op)
        work.references[index] = Reference.of(output, batch, plan.measured_op).totals()
        exercised = {op.op_name for op in plan.ops if op.executions[index]}
        with work.shelf(base | {"batch": digest_of_batch(batch)}) as shelf:
            for label, names in share.items():
                ran = [""] if label == ALL else [name for name in names if name in exercised]
                # A kill may have come between the last score of a map and its second pass.
                keys = [f"{label}/{name}" for name in ran] + [SECOND_PASS] * (label == "fallback" and bool(ran))
                if any(shelf.get(key) is None for key in keys):
                    measure_map(work, conf, index, label, names, ran, shelf, step)
                else:
                    done += len(names) if label != ALL else 1
                work.scores |= {(index, INC_INT8, label, name): shelf.records[f"{label}/{name}"] for name in ran}
            work.second_pass[index] = shelf.get(SECOND_PASS) or {}


def measure_map(
    work: Work,
    conf: Any,
    index: int,
    label: str,
    names: Sequence[str],
    ran: Sequence[str],
    shelf: Shelf,
    step: Callable[..., None],
) -> None:
    """Measure one map of one batch, and put the scores of the ops that ran on the shelf."""
    plan, modules = work.plan, work.plan.by_inc_name
    with activations_reduced(plan.reduce_range):
        scores, second_pass = inc_scores(
            work.model, conf, work.batches[index], plan.measured_op, LABELS.get(label, label), names, step
        )
    for inc_name, value in scores.items():
        name = "" if label == ALL else modules[inc_name]
        if name in ran:
            shelf.add(f"{label}/{name}", require_finite({"mse_value": value}, index, label, name))
    if label == "fallback":
        rescored = {modules[name]: value for name, value in second_pass.items()}
        shelf.add(SECOND_PASS, require_finite(rescored, index, "fallback, second pass", ""))


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


def require_same_plan(model: torch.nn.Module, batches: Sequence[Batch], plan: Plan) -> None:
    """Refuse a plan that differs from INC's plan for this model now.

    Raises:
        InputError: the ops, the excluded modules, or the measured op differ from those of the plan.
    """
    with activations_reduced(plan.reduce_range):
        fresh = plan_ops(model, batches, spec_of(plan))
    ops = [(op.op_name, op.op_type, op.inc_int8) for op in fresh.ops]
    same = {
        "ops": ops == [(op.op_name, op.op_type, op.inc_int8) for op in plan.ops],
        "excluded": tuple(fresh.excluded) == plan.excluded,
        "measured_op": fresh.measured_op == plan.measured_op,
    }
    for key, equal in same.items():
        if not equal:
            raise InputError(
                f"the plan's {key} are not what INC plans for this model now; make the plan again"
                " (snakemake --cores 1 --forcerun plan_quantization)"
            )


def require_inc(plan: Plan) -> None:
    """Refuse to let INC quantize a model that it cannot convert.

    Raises:
        InputError: the message gives the reason.
    """
    if plan.inc_check["status"] == "cannot":
        raise InputError(
            f"INC cannot quantize this model: {plan.inc_check['reason']}; apply the profile with another tool, whose"
            " files are in the folder of exports"
        )


def spec_of(plan: Plan) -> PlanSpec:
    """The sensitivity block that a plan was made from, for INC, which measures its own scheme."""
    keys = {key: getattr(plan, key) for key in ("engine", "confidence_batches", "maps", "reduce_range")}
    return PlanSpec.model_validate(keys | plan.keep)
