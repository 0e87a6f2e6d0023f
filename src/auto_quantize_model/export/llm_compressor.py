"""llm-compressor's recipe: a config group for each scheme, with the scheme's own fields."""

import textwrap
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.export.names import regular_expressions
from auto_quantize_model.export.subject import Subject
from auto_quantize_model.records import Op
from auto_quantize_model.schemes.compressed import fields_of

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
    """The note on lm_head, where the profile quantizes one."""
    return [LM_HEAD] if any(name.rpartition(".")[2] == "lm_head" for name in subject.profile.assignment) else []


def files(subject: Subject, above: str) -> dict[str, str]:
    """The recipe. It ignores the other Linears by name, because vLLM asks for the scheme of each one not ignored."""
    groups: dict[str, Any] = {}
    for scheme, names in subject.groups.items():
        sides = {side: stated(side, fields) for side, fields in fields_of(subject.schemes[scheme]).items() if fields}
        groups[scheme] = {"targets": targets(subject, names), **sides}
    rest = [
        name
        for name, kind in subject.modules.items()
        if issubclass(kind, torch.nn.Linear) and name not in subject.profile.assignment
    ]
    modifier = {"config_groups": groups, "ignore": targets(subject, rest)}
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    comment = textwrap.indent(above, "# ", lambda line: True).replace("# \n", "#\n")
    return {"llm_compressor_recipe.yaml": f"{comment}\n{yaml.safe_dump(recipe, sort_keys=False, width=1000)}"}


def targets(subject: Subject, names: list[str]) -> list[str]:
    """The names as the library's regular expressions."""
    return [f"re:{pattern}" for pattern in regular_expressions(subject.common(names).values())]


def stated(side: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a side that have a value, and the observer where a calibration finds the range."""
    observer = {} if fields["dynamic"] is True else {"observer": OBSERVERS[side]}
    return {key: value for key, value in fields.items() if value is not None} | observer
