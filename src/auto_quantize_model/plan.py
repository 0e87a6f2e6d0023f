"""INC's own plan of the quantization, as JSON: every op with its observers and scheme, what is left out and why.

In: a model, its calibration batches, and what the config asks for. Out: the plan that capture and report stand on.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from neural_compressor.adaptor.pytorch import _cfg_to_qconfig
from neural_compressor.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion

from auto_quantize_model.calibration import Batch, CalibrationLoader
from auto_quantize_model.coverage import cover
from auto_quantize_model.files import InputError
from auto_quantize_model.inc_pytorch_mse_patching import (
    build_strategy,
    describe_observers,
    fused_patterns,
    module_name,
    with_measured_op_last,
)
from auto_quantize_model.replay import require_replayable
from auto_quantize_model.snapshot import explained
from auto_quantize_model.weights import require_meaningful

PACKAGES = ("neural-compressor", "torch", "transformers")
FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
MATCH = """
import json, re, sys
pattern, *names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""
OBSERVER_KEYS = ("dtype", "scheme", "granularity", "algorithm")


@dataclass(frozen=True)
class SensitivitySpec:
    """What the plan needs of the config's `sensitivity` block.

    `engine` is `replay`, `inc`, or `auto`: replay, and INC for what replay does not cover. `op_type_dict` and
    `op_name_dict` name what stays in FP32: an op type, or a regular expression that a module's whole name must match.
    """

    engine: str = "replay"
    confidence_batches: int = 2
    maps: Sequence[str] = ("isolated", "fallback", "requantize")
    op_type_dict: dict[str, str] = field(default_factory=dict)
    op_name_dict: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {name: version(name) for name in PACKAGES}


def quant_config(confidence_batches: int, kept: Iterable[str] = ()) -> PostTrainingQuantConfig:
    """INC's configuration of a static mse_v2 run, with the ops of `kept` (INC's names) pinned to FP32.

    Any model meets its accuracy criterion: the tolerable loss is 0.99 because INC asks for less than 1, and nothing is
    ever evaluated against it.
    """
    return PostTrainingQuantConfig(
        approach="static",
        quant_level=1,
        op_name_dict={re.escape(name): FP32 for name in kept} or None,
        tuning_criterion=TuningCriterion(strategy="mse_v2", strategy_kwargs={"confidence_batches": confidence_batches}),
        accuracy_criterion=AccuracyCriterion(tolerable_loss=0.99),
    )


def build_plan(model: torch.nn.Module, batches: Sequence[Batch], spec: SensitivitySpec) -> dict[str, Any]:
    """Have INC plan the quantization of `model`.

    Args:
        model: FP32, eval mode, on the CPU.
        batches: the calibration batches; the first `confidence_batches` are the ones that will be scored.
        spec: the config's sensitivity block.

    Returns:
        {engine, confidence_batches, maps, keep, measured_op, ops, excluded, coverage, versions}: `ops` in INC's order,
        each with `op_name` (the module's name), `inc_name` (INC's name of it), `op_type`, `pattern` (its class once INC
        has fused what it fuses), `activation` and `weight` (dtype, scheme, granularity, algorithm, and the observer);
        `coverage` as `coverage.cover` returns it.

    Raises:
        InputError: too few batches, a keep entry that matches no op, non-finite output, an output op that INC cannot
            measure, nothing left to quantize, or an op that the replay engine does not cover.
    """
    if len(batches) < spec.confidence_batches:
        raise InputError(
            f"sensitivity.confidence_batches is {spec.confidence_batches}, but the calibration set makes"
            f" {len(batches)} batches; raise calibration.num_samples or lower calibration.batch_size"
        )
    measured_op = find_output_op(model, batches[0])
    kept = ops_to_keep(model, batches, spec)
    strategy, tune_cfg = build_strategy(model, quant_config(spec.confidence_batches, kept), CalibrationLoader(batches))
    inc_names = {module_name(model, name): name for name, _ in tune_cfg["op"]}
    if measured_op not in inc_names:
        raise InputError(
            f"the model's output comes from {measured_op or 'no single module'}, which is no op of INC's plan; INC"
            " would measure elsewhere, so this model cannot be measured"
        )
    tune_cfg = with_measured_op_last(tune_cfg, inc_names[measured_op])
    ops, excluded = describe_ops(model, tune_cfg, kept, fused_patterns(strategy.adaptor, model, tune_cfg))
    if not ops:
        raise InputError("sensitivity.op_type_dict and op_name_dict keep every op in FP32: nothing is left to measure")
    if spec.engine == "replay":
        require_replayable(model, ops)
    return {
        "engine": spec.engine,
        "confidence_batches": spec.confidence_batches,
        "maps": list(spec.maps),
        "keep": {"op_type_dict": dict(spec.op_type_dict), "op_name_dict": dict(spec.op_name_dict)},
        "measured_op": measured_op,
        "ops": ops,
        "excluded": excluded,
        "coverage": cover(model, [op["op_name"] for op in ops], [module_name(model, inc_name) for inc_name in kept]),
        "versions": versions(),
    }


def identify(
    plan: dict[str, Any], manifest: dict[str, Any], calibration: dict[str, Any], config_digest: str
) -> dict[str, Any]:
    """The plan with the names and digests of what it is for."""
    return {
        "model": manifest["model"],
        "model_digest": manifest["digest"],
        "calibration": calibration["calibration"],
        "calibration_digest": calibration["digest"],
        "config_digest": config_digest,
        **plan,
    }


def find_output_op(model: torch.nn.Module, batch: Batch) -> str:
    """The name of the leaf module whose output tensor is the logits that the model returns; empty if there is none.

    Raises:
        InputError: a weight is not finite, the model cannot run on the first calibration batch, or its FP32 logits
            there are not finite, or one value for the whole vocabulary.
    """
    require_meaningful(model)
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: outputs.update({name: output})

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(remember(name)) for name, module in leaves]
    try:
        with torch.no_grad(), explained("the first calibration batch", "the FP32 model cannot run on it"):
            logits = model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()
    if not logits.isfinite().all():
        raise InputError(
            "the FP32 model's output on the first calibration batch has values that are not finite; check the weights"
        )
    if (logits == logits[..., :1]).all():
        raise InputError(
            "the FP32 model's logits on the first calibration batch are the same for the whole vocabulary, so there is"
            " nothing to measure; check the weights"
        )
    return next((name for name, output in reversed(outputs.items()) if output is logits), "")


def ops_to_keep(model: torch.nn.Module, batches: Sequence[Batch], spec: SensitivitySpec) -> dict[str, str]:
    """INC's names of the ops that the config keeps in FP32, each with the entry that says so.

    Raises:
        InputError: an entry matches no op.
    """
    if not spec.op_type_dict and not spec.op_name_dict:
        return {}
    _, tune_cfg = build_strategy(model, quant_config(spec.confidence_batches), CalibrationLoader(batches))
    ops = [(inc_name, module_name(model, inc_name), op_type) for inc_name, op_type in tune_cfg["op"]]
    kept: dict[str, str] = {}
    for op_type_wanted in spec.op_type_dict:
        found = [inc_name for inc_name, _, op_type in ops if op_type == op_type_wanted]
        _require_match(found, f"op_type_dict[{op_type_wanted!r}]", sorted({op_type for _, _, op_type in ops}))
        kept.update((inc_name, f"kept in FP32 by sensitivity.op_type_dict[{op_type_wanted!r}]") for inc_name in found)
    for pattern in spec.op_name_dict:
        matched = matching(pattern, [name for _, name, _ in ops])
        found = [inc_name for inc_name, name, _ in ops if name in matched]
        _require_match(found, f"op_name_dict[{pattern!r}]", [name for _, name, _ in ops])
        kept.update((inc_name, f"kept in FP32 by sensitivity.op_name_dict[{pattern!r}]") for inc_name in found)
    return kept


def matching(pattern: str, names: Sequence[str], seconds: float = 10.0) -> set[str]:
    """The names that a regular expression of `sensitivity.op_name_dict` matches whole.

    A child process matches, because `re` cannot be interrupted and may backtrack for longer than anyone lives.

    Raises:
        InputError: it is not a regular expression, or it needs more than `seconds` for all names.
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
    model: torch.nn.Module, tune_cfg: dict[str, Any], kept: dict[str, str], patterns: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """INC's tune_cfg as the plan's `ops` (quantized, in INC's order) and `excluded` (with the reason)."""
    ops, excluded = [], []
    qconfigs = _cfg_to_qconfig(tune_cfg, tune_cfg["approach"])
    for (inc_name, op_type), configuration in tune_cfg["op"].items():
        name = module_name(model, inc_name)
        if configuration["weight"]["dtype"] == "fp32":
            reason = kept.get(inc_name, "INC plans it in FP32")
            excluded.append({"op_name": name, "op_type": op_type, "reason": reason})
            continue
        pattern = patterns.get(inc_name, "module that FX does not keep")
        sides = {
            side: {key: configuration[side][key] for key in OBSERVER_KEYS} | {"observer": observer}
            for side, observer in describe_observers(qconfigs[inc_name]).items()
        }
        ops.append({"op_name": name, "inc_name": inc_name, "op_type": op_type, "pattern": pattern, **sides})
    known = {entry["op_name"] for entry in [*ops, *excluded]}
    for name, module in model.named_modules():
        if name not in known and any(True for _ in module.parameters(recurse=False)):
            reason = "INC 2.6 has no static INT8 configuration for this module type"
            excluded.append({"op_name": name, "op_type": type(module).__name__, "reason": reason})
    return ops, excluded
