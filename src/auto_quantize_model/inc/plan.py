"""INC's own plan of the quantization: every op with its observers, and every module that is left out with the reason.

In: a model, its calibration batches, and the plan's keys of the config. Out: the plan that capture and report use.
"""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationScheme
from neural_compressor.adaptor.pytorch import _cfg_to_qconfig
from neural_compressor.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion
from neural_compressor.strategy.mse_v2 import MSE_V2TuneStrategy

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc_pytorch_mse_patching import (
    HelperCall,
    activations_reduced,
    build_strategy,
    describe_observers,
    fused_patterns,
    module_name,
    run_planned_pass,
    with_measured_op_last,
)
from auto_quantize_model.measure.metrics import squared_error
from auto_quantize_model.models import checkpoint
from auto_quantize_model.models.checkpoint import Checkpoint
from auto_quantize_model.models.coverage import cover
from auto_quantize_model.models.experts import RoutedExperts, StackedLinear
from auto_quantize_model.models.hidden_state import HIDDEN_STATE, without_part
from auto_quantize_model.models.prepare import INNER, changes_of
from auto_quantize_model.models.sample import tokens_of
from auto_quantize_model.models.snapshot import explained
from auto_quantize_model.models.units import experts_of, tower_of, towers_with, unit_of, units_of
from auto_quantize_model.models.weights import require_meaningful
from auto_quantize_model.records import (
    CalibrationManifest,
    Excluded,
    IncCheck,
    IncInt8,
    ModelManifest,
    Op,
    Output,
    Plan,
    Side,
)
from auto_quantize_model.replay.model import Batch, Replay, goes_along, refusals
from auto_quantize_model.schemes.compressed import fields_of, nearest, refusal, scheme_of, stored_bytes
from auto_quantize_model.schemes.scheme import INC_INT8, assigned

PACKAGES = ("neural-compressor", "compressed-tensors", "torch", "transformers")
FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
MATCH = """
import json, re, sys
pattern, *names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""
OBSERVER_KEYS = ("dtype", "scheme", "granularity", "algorithm")
# What INC and FX raise at a model that they cannot convert. Errors of memory and files are not among them.
INC_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,  # FX writes Python and compiles it
    TypeError,
    ValueError,
)
INT8_STATES = {"all_int8": "every op", "fallback": "every op but the last"}
CHECKED_STATES = {"no_op": "no op", **INT8_STATES}


def versions() -> dict[str, str]:
    """The versions of the packages that the numbers depend on."""
    return {name: version(name) for name in PACKAGES}


def quant_config(confidence_batches: int, kept: Iterable[str] = ()) -> PostTrainingQuantConfig:
    """INC's configuration of a static mse_v2 run, with the ops of `kept` (INC's names) pinned to FP32.

    Any model meets its accuracy criterion. The tolerable loss is 0.99, because INC asks for less than 1, and nothing is
    ever evaluated against the criterion.
    """
    return PostTrainingQuantConfig(
        approach="static",
        quant_level=1,
        op_name_dict={re.escape(name): FP32 for name in kept} or None,
        tuning_criterion=TuningCriterion(strategy="mse_v2", strategy_kwargs={"confidence_batches": confidence_batches}),
        accuracy_criterion=AccuracyCriterion(tolerable_loss=0.99),
    )


def build_plan(model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec) -> Plan:
    """Have INC plan the quantization of `model`, and check that INC can measure it.

    Where INC's scheme is not asked for, or cannot be measured exactly and other schemes are asked for, the plan lists
    the ops without INC.

    Args:
        model: FP32, eval mode, on the CPU.
        batches: the calibration batches; the first `confidence_batches` are the ones that will be scored.
        spec: the keys of the config that the plan depends on.

    Raises:
        InputError: as `plan_ops` says, or the engine cannot measure this model, or not as INC does.
    """
    scored = batches[: spec.confidence_batches]
    schemes = schemes_to_plan(spec, model)
    with activations_reduced(spec.reduce_range) as reduced:
        planned, inc_check = planned_and_checked(model, batches, spec)
    measured = [name for name in spec.fields_of_schemes if name != INC_INT8 or planned.strategy]
    fields = {
        name: fields_to_plan(schemes[name], planned.ops, model, scored) if name in schemes else {} for name in measured
    }
    names = [op.op_name for op in planned.ops]
    ops = [with_schemes(op, schemes) for op in planned.ops]
    counts, outputs = [], []
    for batch in scored:
        count, logits = run_in_fp32(model, batch, names, planned.measured_op)
        counts.append(count)
        outputs.append(output_of(model, planned.measured_op, logits.shape, batch))
    active = active_shares(model)
    tower = towers_with(scored[0])
    ops = [replace(op, active=active.get(op.unit, 1.0), tower=tower(op.op_name)) for op in ops]
    left = {re.escape(name): "fp32" for name in planned.left}
    return Plan(
        engine=spec.engine,
        confidence_batches=spec.confidence_batches,
        maps=tuple(spec.maps),
        experts=spec.experts,
        keep={"op_type_dict": dict(spec.op_type_dict), "op_name_dict": {**spec.op_name_dict, **left}},
        reduce_range=reduced,
        reduce_range_by="inc" if spec.reduce_range is None else "config",
        measured_op=planned.measured_op,
        output=outputs[0],
        head_only=planned.head_only,
        schemes=fields,
        fallback_schemes=spec.fallback_schemes,
        ops=tuple(replace(op, executions=tuple(count[op.op_name] for count in counts)) for op in ops),
        units=tuple(units_of(ops, dict(model.named_modules()))),
        excluded=tuple(planned.excluded),
        coverage=cover(model, names, planned.kept, {one.op_name: one.reason for one in planned.excluded}, scored[0]),
        inc_check=inc_check,
        versions=versions(),
    )


def planned_and_checked(model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec) -> tuple["Planned", IncCheck]:
    """The ops of a plan, by INC where the config asks for INC's scheme, and whether INC can measure them.

    Raises:
        InputError: as `build_plan` says.
    """
    if INC_INT8 not in spec.fields_of_schemes:
        return plan_without_inc(model, batches, spec), {"status": "not_asked"}
    try:
        planned = plan_ops(model, batches, spec)
        scored = batches[: spec.confidence_batches]
        inc_check, incs_errors = check_inc(planned, scored)
        require_measurable(model, planned.ops, spec.engine, inc_check)
        if spec.engine != "inc" and not refusals(model, planned.ops):
            for index, errors in incs_errors.items():
                require_same_int8(model, planned, scored, index, errors)
    except WithoutInc as error:
        if len(spec.schemes) == 1 or spec.engine != "replay":
            raise
        return plan_without_inc(model, batches, spec), {"status": "no_plan", "reason": error.reason}
    return planned, inc_check


def schemes_to_plan(spec: PlanSpec, model: torch.nn.Module) -> dict[str, QuantizationScheme | Checkpoint]:
    """The schemes of compressed-tensors that the config names. A checkpoint is compared with the model by its headers.

    Raises:
        InputError: as `scheme_of`, `folder_of` and `read_checkpoint` say.
    """
    found: dict[str, QuantizationScheme | Checkpoint] = {}
    for name, fields in spec.fields_of_schemes.items():
        if place := fields.get("checkpoint"):
            found[name] = checkpoint.read_checkpoint(place, checkpoint.folder_of(place), model)
        elif name != INC_INT8:
            found[name] = scheme_of(name, fields or None)
    return found


def fields_to_plan(
    scheme: QuantizationScheme | Checkpoint, ops: Sequence[Op], model: torch.nn.Module, scored: Sequence[Batch]
) -> dict[str, Any]:
    """What the plan says of a scheme, from which the later steps make it again.

    Raises:
        InputError: as `checkpoint.described` says. Or a changed norm may not run when the op after it runs.
    """
    if isinstance(scheme, QuantizationScheme):
        return fields_of(scheme)
    linears = [op.op_name for op in ops if op.op_type == "Linear"]
    fields = checkpoint.described(scheme, linears, model, scored)
    for norm, fed in fields["norms"].items():
        if apart := [name for name in fed if not goes_along(model, norm, name)]:
            raise InputError(
                f"{scheme.place}: the checkpoint changes {norm}, which lies in another block than {apart[0]}, so the"
                " replay may skip it; name a checkpoint without that change"
            )
    return fields


class Planned(NamedTuple):
    """The ops of a plan. INC's own strategy and configuration, with the measured op last, are None without INC.

    `kept` are the modules that the config keeps in FP32, and `left` those that no site reproduces; `excluded` lists
    both. `head_only` is that of the plan.
    """

    measured_op: str
    head_only: bool
    ops: list[Op]
    excluded: list[Excluded]
    kept: list[str]
    left: list[str]
    strategy: MSE_V2TuneStrategy | None
    tune_cfg: dict[str, Any]


class WithoutInc(InputError):
    """INC's scheme cannot be measured in a model, and other schemes can; `reason` says why."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(
            f"{reason}; {advice}add a scheme of compressed-tensors, such as W8A8, to sensitivity.schemes, because such"
            " schemes need no plan of INC"
        )
        self.reason = reason


class CannotPlan(WithoutInc):
    """INC cannot plan a model."""

    def __init__(self, why: str) -> None:
        super().__init__(f"INC cannot plan this model: {why}")


def plan_ops(model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec) -> Planned:
    """INC's plan of `model`. Whether INC can carry out the plan is not checked here.

    With the engine `replay`, ops that no site reproduces stay in FP32.

    Raises:
        InputError: there are too few batches, a keep entry matches no op, or the output is not finite. Or the output
            comes from no single op, or nothing is left to quantize.
        CannotPlan: INC cannot plan the model.
    """
    require_batches(batches, spec)
    measured_op, head_only = find_output_op(model, batches[0])
    if measured_op == HIDDEN_STATE:
        raise CannotPlan("it has no head, and no op of INC gives the last hidden state, where it is measured")
    planned = planned_by_inc(model, batches, spec, measured_op, {})
    names = names_of_ops(model, planned.tune_cfg)
    kept = ops_to_keep(names, spec)
    refused = refusals(model, planned.ops) if spec.engine == "replay" else {}
    # Without the measured op nothing can be measured, and `require_measurable` says so.
    left = {key: refused[name] for key, (name, _) in names.items() if name in refused and name != measured_op}
    if kept or left:
        planned = planned_by_inc(model, batches, spec, measured_op, left | kept)
    planned = with_blocks_of_experts(model, planned)
    if not planned.ops:
        raise InputError("sensitivity.op_type_dict and op_name_dict keep every op in FP32: nothing is left to measure")
    modules, others = ([names[key][0] for key in keys] for keys in (kept, left.keys() - kept.keys()))
    return planned._replace(head_only=head_only, kept=modules, left=sorted(others))


def with_blocks_of_experts(model: torch.nn.Module, planned: Planned) -> Planned:
    """A plan of INC with the ops that hold a matrix of all experts of a block, which INC does not see."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if type(module) is StackedLinear]
    if not names:
        return planned
    reason = {INC_INT8: "INC quantizes each expert alone; set sensitivity.experts to each"}
    blocks = [replace(inventoried(name, "Experts", modules, None), refused=reason) for name in names]
    excluded = [module for module in planned.excluded if module.op_name not in names]
    return planned._replace(ops=[*planned.ops[:-1], *blocks, *planned.ops[-1:]], excluded=excluded)


def names_of_ops(model: torch.nn.Module, tune_cfg: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{INC's name of each op: (op_name, op_type)}."""
    return {inc_name: (module_name(model, inc_name), op_type) for inc_name, op_type in tune_cfg["op"]}


def config_of_inc(model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec) -> PostTrainingQuantConfig:
    """INC's configuration of a run, with the ops that the config keeps pinned to FP32.

    Raises:
        InputError: as `ops_to_keep` says.
        CannotPlan: INC cannot plan the model.
    """
    if not spec.op_type_dict and not spec.op_name_dict:
        return quant_config(spec.confidence_batches)
    with planning_by_inc():
        _, tune_cfg = build_strategy(model, quant_config(spec.confidence_batches), CalibrationLoader(batches))
    return quant_config(spec.confidence_batches, ops_to_keep(names_of_ops(model, tune_cfg), spec))


def planned_by_inc(
    model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec, measured_op: str, kept: Mapping[str, str]
) -> Planned:
    """INC's plan with the ops of `kept` in FP32: {INC's name: the reason}.

    Raises:
        CannotPlan: INC cannot plan the model, or not the measured op.
    """
    with planning_by_inc():
        conf = quant_config(spec.confidence_batches, kept)
        strategy, tune_cfg = build_strategy(model, conf, CalibrationLoader(batches))
        patterns = fused_patterns(strategy.adaptor, model, tune_cfg)
    inc_names = {name: inc_name for inc_name, (name, _) in names_of_ops(model, tune_cfg).items()}
    if measured_op not in inc_names:
        raise CannotPlan(f"the output comes from {measured_op}, which is not an op of INC's plan")
    tune_cfg = with_measured_op_last(tune_cfg, inc_names[measured_op])
    ops, excluded = describe_ops(model, tune_cfg, kept, patterns)
    return Planned(measured_op, False, ops, excluded, [], [], strategy, tune_cfg)


def plan_without_inc(model: torch.nn.Module, batches: Sequence[Batch], spec: PlanSpec) -> Planned:
    """Every Linear as an op, in the order of the modules, with the measured op last; INC takes no part.

    Raises:
        InputError: as `plan_ops` says. Or another engine than the replay is asked for.
    """
    if spec.engine != "replay":
        raise InputError(
            f"sensitivity.engine {spec.engine} measures with INC, and inc_int8 is not measured here; set it to replay"
        )
    require_batches(batches, spec)
    measured_op, head_only = find_output_op(model, batches[0])
    modules = dict(model.named_modules())
    kinds = {torch.nn.Linear: "Linear", StackedLinear: "Experts"}
    names = {name: (name, kinds[type(module)]) for name, module in modules.items() if type(module) in kinds}
    kept = ops_to_keep(names, spec)
    apart = without_part(model, batches[0], names) - {*kept} if measured_op == HIDDEN_STATE else set()
    reasons = kept | dict.fromkeys(sorted(apart), "it has no part in the last hidden state, where errors are measured")
    in_order = [name for name in names if name != measured_op] + [measured_op] * (measured_op in names)
    ops = [inventoried(name, names[name][1], modules, None) for name in in_order if name not in reasons]
    if not ops:
        raise InputError("sensitivity.op_type_dict and op_name_dict keep every op in FP32: nothing is left to measure")
    excluded = [Excluded(name, names[name][1], reason) for name, reason in reasons.items()]
    left = others(model, {*names}, "schemes of compressed-tensors quantize a Linear, and this is none")
    return Planned(measured_op, head_only, ops, [*excluded, *left], list(kept), [], None, {})


def require_batches(batches: Sequence[Batch], spec: PlanSpec) -> None:
    """Refuse fewer batches than are scored."""
    if len(batches) < spec.confidence_batches:
        raise InputError(
            f"sensitivity.confidence_batches is {spec.confidence_batches}, but the calibration set makes"
            f" {len(batches)} batches; raise calibration.num_samples or lower calibration.batch_size"
        )


@contextmanager
def planning_by_inc() -> Iterator[None]:
    """Turn INC's errors during planning into an error that names INC's.

    Raises:
        CannotPlan: in place of INC's error.
    """
    try:
        yield
    except INC_ERRORS as error:
        raise CannotPlan(f"INC raises {described(error)}") from error


def described(error: Exception) -> str:
    """An error of INC in one line: its class and the first line of its message.

    Raises:
        Exception: `error` itself if memory ran out, because that says nothing about INC.
    """
    if "DefaultCPUAllocator" in str(error):
        raise error
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__} ({' '.join(first[:200].split())})" if first else type(error).__name__


def check_inc(planned: Planned, batches: Sequence[Batch]) -> tuple[IncCheck, dict[int, dict[str, float]]]:
    """Whether INC can measure the model of a plan.

    Of the scored batches, the first with each set of inputs is tried: a batch without images runs no vision tower.

    Returns:
        {"status": "reproduces_fp32"}, or {"status": "cannot", "reason": ...}. And INC's errors in `INT8_STATES` on each
        batch that was tried, by the batch's index; empty where INC cannot measure the model.
    """
    first_of_kind: dict[frozenset[str], int] = {}
    for index, batch in enumerate(batches):
        first_of_kind.setdefault(frozenset(batch), index)
    errors = {}
    for index in first_of_kind.values():
        problem, errors[index] = tried_by_inc(planned, batches[index])
        # INC's models hold themselves in circles. Until Python looks for circles, the weights stay in memory twice.
        gc.collect()
        if problem:
            return {"status": "cannot", "reason": f"{problem} on batch {index}"}, {}
    return {"status": "reproduces_fp32"}, errors


def tried_by_inc(planned: Planned, batch: Batch) -> tuple[str, dict[str, float]]:
    """What is wrong with INC's conversion of a model, by INC's unmodified helpers; empty if nothing is wrong.

    With no op quantized, INC's model must give the FP32 output, bit for bit. It fails where FX drops an in-place
    operation whose result nobody reads, such as `scatter_`: INC then measures another model. With every op quantized,
    INC's model must run. The second value holds its errors in `INT8_STATES`: sums of squared errors at the measured op.
    """
    reached = ["no_op"]
    assert planned.strategy is not None  # noqa: S101  INC planned
    try:
        calls: dict[str, HelperCall] = {}
        for label in CHECKED_STATES:
            calls |= run_planned_pass(
                planned.strategy,
                planned.tune_cfg,
                CalibrationLoader([batch]),
                maps=[label],
                only=[planned.ops[-1].op_name],  # the measured one, unless the config keeps it in FP32
                on_op=lambda label, name: reached.append(label),
            )
    except INC_ERRORS as error:
        return f"with {CHECKED_STATES[reached[-1]]} in INT8, INC's model ends with {described(error)}", {}
    (difference,) = calls["no_op"].scores.values()
    errors = {name: next(iter(calls[label].scores.values())) for label, name in INT8_STATES.items()}
    if difference == 0:
        return "", errors
    problem = (
        f"with no op in INT8, INC's model differs from the FP32 model by a sum of squared errors of {difference:.2g} at"
        f" {planned.measured_op}"
    )
    return problem, errors


def require_same_int8(
    model: torch.nn.Module, planned: Planned, batches: Sequence[Batch], index: int, incs_errors: Mapping[str, float]
) -> None:
    """Refuse a model whose states with many ops in INT8 are others in INC than in the replay.

    A site gives FP32 to whatever follows its op. INC keeps some functions between two ops in INT8, such as tanh and
    clamp. A state with one op in INT8 does not show that, and the frontier would be wrong. Where the measured op is in
    INT8 too, the codes of few values can hide it.

    Raises:
        WithoutInc: the errors differ in any bit.
    """
    batch = batches[index]
    with Replay(model, planned.ops, planned.measured_op) as replay:
        replay.calibrate(batch)
        reference = replay.begin(batch)
        names = [op.op_name for op in planned.ops if op.inc_int8 and op.op_name in replay.first_visit]
        but_last = [name for name in names if name != planned.ops[-1].op_name]
        of_state = dict(zip(INT8_STATES.values(), (names, but_last), strict=True))
        found = {state: squared_error(reference, replay.run(assigned(ops))) for state, ops in of_state.items()}
    if state := next((state for state, error in found.items() if error != incs_errors[state]), ""):
        raise WithoutInc(
            f"with {state} in INT8, the replay has a sum of squared errors of {found[state]:.4g} at"
            f" {planned.measured_op} on batch {index}, and INC has {incs_errors[state]:.4g}. INC computes a function"
            " between two ops in INT8, such as tanh or clamp",
            "set sensitivity.engine to inc, or ",
        )


def require_measurable(model: torch.nn.Module, ops: Sequence[Op], engine: str, inc_check: IncCheck) -> None:
    """Refuse an engine that cannot measure this model, and name an engine that can.

    Raises:
        InputError: INC is asked for and cannot.
        WithoutInc: the replay is needed and does not cover every op.
    """
    if inc_check["status"] != "cannot":
        if engine == "replay" and (refused := refusals(model, ops)):
            name, reason = next(iter(refused.items()))
            problem = f"{len(refused)} of {len(ops)} ops cannot be replayed exactly, first {name}: {reason}"
            raise WithoutInc(problem, "set sensitivity.engine to inc or auto, or ")
        return
    problem = f"INC cannot measure this model: {inc_check['reason']}"
    if refused := refusals(model, ops):
        name, reason = next(iter(refused.items()))
        engine_too = " and set sensitivity.engine to replay" if engine == "inc" else ""
        raise WithoutInc(
            f"{problem}. The replay does not cover {len(refused)} of {len(ops)} ops, first {name}: {reason}",
            f"keep them in FP32 with {keep_entry(ops, refused)}{engine_too}, or ",
        )
    if engine == "inc":
        raise InputError(
            f"{problem}; set sensitivity.engine to replay, and torch's own quantized modules audit in INC's place"
        )


def keep_entry(ops: Sequence[Op], names: Iterable[str]) -> str:
    """The config's entry that keeps the named ops in FP32: by type if they are all ops of their types, else by name."""
    names = set(names)
    types = {op.op_type for op in ops if op.op_name in names}
    if all(op.op_name in names for op in ops if op.op_type in types):
        return f"sensitivity.op_type_dict {{{', '.join(f'{kind}: fp32' for kind in sorted(types))}}}"
    return "sensitivity.op_name_dict"


def identify(plan: Plan, manifest: ModelManifest, calibration: CalibrationManifest, config_digest: str) -> Plan:
    """The plan with the names and digests of the model, the calibration set and the config that it was made for."""
    return replace(
        plan,
        model=manifest.model,
        model_digest=manifest.digest,
        calibration=calibration.calibration,
        calibration_digest=calibration.digest,
        config_digest=config_digest,
    )


def find_output_op(model: Any, batch: Batch) -> tuple[str, bool]:
    """The module whose output the model returns as its logits, and whether the model changes that output first.

    A model without a head returns its last hidden state in place of logits. Some models scale or cap what their head
    returns. Then the head is the module, and the second value is true.

    Raises:
        InputError: a weight is not finite, or the model cannot run on the first calibration batch. Or its FP32 logits
            there are not finite, or are one value for the whole vocabulary. Or they come from no single module.
    """
    require_meaningful(model)
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: outputs.update({name: output})

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    without_head = any(name == HIDDEN_STATE for name, _ in leaves)
    handles = [module.register_forward_hook(remember(name)) for name, module in leaves]
    try:
        with torch.no_grad(), explained("the first calibration batch", "the FP32 model cannot run on it"):
            returned = model(**batch)
            logits = returned[HIDDEN_STATE] if without_head else returned.logits
    finally:
        for handle in handles:
            handle.remove()
    if not logits.isfinite().all():
        raise InputError(
            "the FP32 model's output on the first calibration batch has values that are not finite; check the weights"
        )
    if (logits == logits[..., :1]).all():
        raise InputError(
            "the FP32 model's output on the first calibration batch is the same in all channels, so there is nothing to"
            " measure; check the weights"
        )
    if without_head:
        return HIDDEN_STATE, False
    # A Dropout or Identity after the head returns the head's own tensor, and is not an op.
    owners = [name for name, output in reversed(outputs.items()) if output is logits]
    weighted = {name for name, module in leaves if any(True for _ in module.parameters())}
    if found := next((name for name in owners if name in weighted), next(iter(owners), "")):
        return found, False
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next((name for name, module in leaves if module is head), "")
    if name not in outputs or outputs[name].shape != logits.shape:
        raise InputError(
            "the model's logits come from no single module, so there is no place to measure at; choose another"
            " model.path"
        )
    return name, True


def output_of(model: torch.nn.Module, measured_op: str, shape: Sequence[int], batch: Batch) -> Output:
    """What an output of that shape on a batch has rows of, and what its channels stand for."""
    if measured_op == HIDDEN_STATE:
        return Output("position", "")
    tokens = tokens_of(batch)
    choice = "class" if "Classification" in type(model).__name__ else "token"
    return Output("token" if tokens is not None and tuple(tokens.shape) == tuple(shape[:-1]) else "sample", choice)


def ops_to_keep(ops: Mapping[str, tuple[str, str]], spec: PlanSpec) -> dict[str, str]:
    """The keys of the ops that the config keeps in FP32, each with the entry that keeps the op.

    Args:
        ops: {key: (op_name, op_type)}.

    Raises:
        InputError: an entry matches no op.
    """
    kept: dict[str, str] = {}
    for op_type_wanted in spec.op_type_dict:
        found = [key for key, (_, op_type) in ops.items() if op_type == op_type_wanted]
        _require_match(found, f"op_type_dict[{op_type_wanted!r}]", sorted({op_type for _, op_type in ops.values()}))
        kept.update((key, f"kept in FP32 by sensitivity.op_type_dict[{op_type_wanted!r}]") for key in found)
    names = [name for name, _ in ops.values()]
    for pattern in spec.op_name_dict:
        matched = matching(pattern, names)
        found = [key for key, (name, _) in ops.items() if name in matched]
        _require_match(found, f"op_name_dict[{pattern!r}]", names)
        kept.update((key, f"kept in FP32 by sensitivity.op_name_dict[{pattern!r}]") for key in found)
    return kept


def matching(pattern: str, names: Sequence[str], seconds: float = 10.0) -> set[str]:
    """The names that a regular expression of `sensitivity.op_name_dict` matches as a whole.

    A child process does the matching, because `re` cannot be interrupted and may backtrack for years.

    Raises:
        InputError: the text is not a regular expression, or needs more than `seconds` for all names.
    """
    entry = f"sensitivity.op_name_dict[{pattern!r}]"
    try:
        re.compile(pattern)
        ended = subprocess.run(
            [sys.executable, "-ISc", MATCH],
            input=json.dumps([pattern, *names]),
            text=True,
            capture_output=True,
            timeout=seconds,
        )
        ended.check_returncode()
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{entry}: not a regular expression ({error}); correct it") from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{entry}: did not match {len(names)} names within {seconds:g} s, so it backtracks without end; write it"
            " without a repeat inside a repeat, such as (a+)+"
        ) from None
    return set(json.loads(ended.stdout))


def _require_match(found: list[str], entry: str, names: list[str]) -> None:
    if not found:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(f"sensitivity.{entry} matches no op of the model; ops are {shown}")


def describe_ops(
    model: torch.nn.Module, tune_cfg: dict[str, Any], kept: Mapping[str, str], patterns: dict[str, str]
) -> tuple[list[Op], list[Excluded]]:
    """INC's tune_cfg as the plan's `ops` (quantized, in INC's order) and `excluded` (with the reason)."""
    ops: list[Op] = []
    excluded: list[Excluded] = []
    qconfigs = _cfg_to_qconfig(tune_cfg, tune_cfg["approach"])
    modules = dict(model.named_modules())
    for (inc_name, op_type), configuration in tune_cfg["op"].items():
        name = module_name(model, inc_name)
        if configuration["weight"]["dtype"] == "fp32":
            excluded.append(Excluded(name, op_type, kept.get(inc_name, "INC plans it in FP32")))
            continue
        sides = {
            side: Side(observer, **{key: configuration[side][key] for key in OBSERVER_KEYS})
            for side, observer in describe_observers(qconfigs[inc_name]).items()
        }
        scheme = IncInt8(inc_name, patterns.get(inc_name, "module that FX does not keep"), **sides)
        ops.append(inventoried(name, op_type, modules, scheme))
    known = {op.op_name for op in ops} | {module.op_name for module in excluded}
    return ops, [*excluded, *others(model, known, "INC 2.6 has no static INT8 configuration for this module type")]


def others(model: torch.nn.Module, known: Collection[str], reason: str) -> list[Excluded]:
    """The modules with parameters that are not among the known ones. A plain module inside of one stands for it."""
    uses = "uses its weight otherwise than a plain module does"
    return [
        Excluded(name, type(module).__name__, f"{type(module).__name__} {uses}" if changes_of(module) else reason)
        for name, module in model.named_modules()
        if name not in known and INNER not in module._modules and any(True for _ in module.parameters(recurse=False))
    ]


def inventoried(name: str, op_type: str, modules: Mapping[str, torch.nn.Module], scheme: IncInt8 | None) -> Op:
    """An op of the inventory, without the count of its executions. `scheme` is what INC plans, None without INC."""
    weight = getattr(modules[name], "weight", None)  # a module that INC fuses may have no weight
    return Op(
        op_name=name,
        op_type=op_type,
        shape=() if weight is None else tuple(weight.shape),
        weight_bytes=0 if weight is None else 4 * weight.numel(),
        executions=(),
        tower=tower_of(name),
        unit=unit_of(name, modules),
        expert=bool(experts_of(name, modules)),
        inc_int8=scheme,
        schemes=(INC_INT8,) if scheme else (),
        refused={},
    )


def with_schemes(op: Op, schemes: Mapping[str, QuantizationScheme | Checkpoint]) -> Op:
    """An op with the schemes of compressed-tensors that it can have, and the reasons against the others."""
    refused = {}
    for name, scheme in schemes.items():
        if isinstance(scheme, Checkpoint):
            refused[name] = scheme.refusal(op.op_name, op.op_type)
        elif reason := refusal(scheme, op.op_type, op.shape):
            other = nearest(scheme, op.op_type, op.shape)
            refused[name] = f"{reason}; {other} can hold the op" if other else reason
    refused = {**op.refused, **{name: reason for name, reason in refused.items() if reason}}
    able = tuple(name for name in schemes if name not in refused)
    # INC's INT8 has a byte for each value and a float32 scale for each row.
    stored = {INC_INT8: op.weight_bytes // 4 + 4 * op.shape[0]} if op.shape and op.inc_int8 else {}
    stored |= {
        name: stored_bytes(schemes[name], op.shape) for name in able if isinstance(schemes[name], QuantizationScheme)
    }
    return replace(op, schemes=(*op.schemes, *able), refused=refused, stored_bytes=stored)


def active_shares(model: torch.nn.Module) -> dict[str, float]:
    """{module that holds the experts of a block: the share of them that each token took in the last forward}."""
    return {
        name: experts.chosen.shape[-1] / experts.count()
        for name, experts in model.named_modules()
        if isinstance(experts, RoutedExperts) and experts.chosen is not None
    }


def run_in_fp32(
    model: torch.nn.Module, batch: Batch, names: Sequence[str], measured_op: str
) -> tuple[dict[str, int], torch.Tensor]:
    """How often each op runs in one FP32 forward of `batch`, and the output at the measured op.

    Raises:
        InputError: the output is not finite.
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
