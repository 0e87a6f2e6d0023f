"""llm-compressor's recipe: a config group for each scheme, with the scheme's own fields.

A second recipe has the cures of units as well, where these regain a loss of the whole profile on held-out samples.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.export.names import regular_expressions
from auto_quantize_model.export.subject import Subject, header
from auto_quantize_model.records import Cause, Op, body_of
from auto_quantize_model.report import explanations
from auto_quantize_model.schemes.compressed import fields_of
from auto_quantize_model.schemes.cures import SEARCH

RECIPE = "llm_compressor_recipe.yaml"
CURED = "llm_compressor_with_cures.yaml"
SMOOTHED = "llm_compressor_smoothing.yaml"  # comes before
# What a cure of the ranges changes in a config group: the side, and its fields.
RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse_weight": ("weights", {"observer": "memoryless_mse", "observer_kwargs": dict(SEARCH)}),
    "asymmetric_inputs": ("input_activations", {"symmetric": False}),
}
CURES = (
    "The cures were measured with the arithmetic of SmoothQuantModifier and of the observer memoryless_mse of"
    " llm-compressor 0.14. A smoothing scale that folds into a Linear was measured as a division of the inputs."
)
USE_CURES = (
    'Use: oneshot(model=model, recipe="llm_compressor_with_cures.yaml", dataset=samples, pipeline="basic") with the'
    " calibration samples."
)
FIRST = (
    'Before that, use oneshot(model=model, recipe="llm_compressor_smoothing.yaml", dataset=samples, pipeline="basic").'
    " A static range of smoothed inputs is right only after the smoothing. With the default pipeline, llm-compressor"
    " 0.14.0.1 saw smaller input ranges on digits_vlm and smoothed less."
)
TITLE = "llm-compressor and vLLM"
REMARK = (
    'Use: oneshot(model=model, recipe="llm_compressor_recipe.yaml"), then model.save_pretrained(folder,'
    " save_compressed=True). Give oneshot a dataset too if a scheme has static inputs, as FP8 and NVFP4 have."
)
# Ranges as `schemes.compressed` finds them. Without a name, llm-compressor takes a moving average over the batches of
# inputs.
OBSERVERS = {"weights": "memoryless_minmax", "input_activations": "static_minmax"}
# The first release whose `CompressedTensorsConfig.get_quant_method` has a branch for `ParallelLMHead`
# (vllm-project/vllm#37291). The failures: vllm-project/vllm#48856 and #52434.
LM_HEAD = (
    "vLLM loads a quantized lm_head from version 0.20.0 on; older versions do not. Some GPUs run FP8 by other kernels."
    " There, versions 0.25 to 0.27 were seen to fail on an lm_head in FP8."
)


def refusal(scheme: QuantizationScheme, op: Op, shared: bool) -> str:
    """llm-compressor holds every scheme of compressed-tensors."""
    return ""


def notes(subject: Subject) -> list[str]:
    """The note on lm_head, where the profile quantizes one, and the note on cures, where some were tried."""
    found = [LM_HEAD] if any(name.rpartition(".")[2] == "lm_head" for name in subject.profile.assignment) else []
    if not subject.cured:
        return found
    text = explanations.of_cured(body_of(subject.cured), subject.plan.output.unit)
    return [*found, f"{text} {CURED} has these cures." if subject.cured.is_confirmed else text]


def files(subject: Subject, above: str) -> dict[str, str]:
    """The recipe, and a second one with cures where they help the whole profile on held-out samples.

    Smoothing has a recipe of its own: in one call llm-compressor would calibrate inputs before they are smoothed.
    """
    found = {RECIPE: commented(above, {"quant_stage": {"quant_modifiers": quantization(subject, {})}})}
    if subject.cured and subject.cured.is_confirmed:
        cured = {cause.unit: cause for cause in subject.causes if cause.unit in subject.cured.units}
        smoothed = smoothing(subject, cured.values())
        told = [
            *subject.described(),
            explanations.of_cured(body_of(subject.cured), subject.plan.output.unit),
            *(of_exported(cause, subject.plan.output.unit) for cause in cured.values()),
            CURES,
        ]
        told += [USE_CURES, *([FIRST] if smoothed else [])]
        found[CURED] = commented(header(told), {"quant_stage": {"quant_modifiers": quantization(subject, cured)}})
        if smoothed:
            found[SMOOTHED] = commented(header(told), {"smoothing_stage": smoothed})
    return found


def of_exported(cause: Cause, unit: str) -> str:
    """What the cure of one unit regains alone."""
    return f"{cause.unit} in {cause.scheme}, alone: {explanations.of_cure(body_of(cause), body_of(cause.cure), unit)}"


def commented(above: str, recipe: dict[str, Any]) -> str:
    """A recipe as YAML below a comment."""
    comment = textwrap.indent(above, "# ", lambda line: True).replace("# \n", "#\n")
    return f"{comment}\n{yaml.safe_dump(recipe, sort_keys=False, width=1000)}"


def quantization(subject: Subject, cured: Mapping[str, Cause]) -> dict[str, Any]:
    """The modifier that quantizes. It ignores the other Linears by name, because vLLM asks for a scheme of each one.

    Args:
        cured: {unit: why it breaks, with a cure}; such a unit has a config group of its own where the cure changes its
            ranges.
    """
    of_op = {name: cause for cause in cured.values() for name in cause.ops}
    groups: dict[str, Any] = {}
    for scheme, names in subject.groups.items():
        sides = {side: stated(side, fields) for side, fields in fields_of(subject.schemes[scheme]).items() if fields}
        members: dict[str, list[str]] = {}
        for name in names:
            kinds = of_op[name].cure.settings.keys() & RANGES.keys() if name in of_op else set()  # type: ignore[union-attr]
            members.setdefault("+".join([scheme, *sorted(kinds)]), []).append(name)
        for group, own in members.items():
            changed = {side: dict(fields) for side, fields in sides.items()}
            for kind in group.split("+")[1:]:
                side, fields = RANGES[kind]
                changed[side] |= fields
            groups[group] = {"targets": targets(subject, own), **changed}
    rest = [
        name
        for name, kind in subject.modules.items()
        if issubclass(kind, torch.nn.Linear) and name not in subject.profile.assignment
    ]
    return {"QuantizationModifier": {"config_groups": groups, "ignore": targets(subject, rest)}}


def smoothing(subject: Subject, cured: Iterable[Cause]) -> dict[str, Any]:
    """A modifier for each strength, which smooths its units."""
    mappings: dict[str, list[Any]] = {}
    for cause in cured:
        if cause.cure and (strength := cause.cure.settings.get("smoothing")):
            # The whole name: the last part alone, such as `norm`, may stand in the names of other modules.
            before = f"re:{re.escape(cause.cure.folds_into)}$"
            mappings.setdefault(strength, []).append([targets(subject, list(cause.ops)), before])
    return {
        f"smoothing_{number}_modifiers": {
            "SmoothQuantModifier": {"smoothing_strength": float(strength), "mappings": of_strength}
        }
        for number, (strength, of_strength) in enumerate(sorted(mappings.items()))
    }


def targets(subject: Subject, names: list[str]) -> list[str]:
    """The names as the library's regular expressions."""
    return [f"re:{pattern}" for pattern in regular_expressions(subject.common(names).values())]


def stated(side: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a side that have a value, and the observer where a calibration finds the range."""
    observer = {} if fields["dynamic"] is True else {"observer": OBSERVERS[side]}
    return {key: value for key, value in fields.items() if value is not None} | observer
