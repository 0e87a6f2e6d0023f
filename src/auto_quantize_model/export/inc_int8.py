"""The files for profiles of INC's INT8: for INC itself, and for NNCF, whose own INT8 leaves the same modules alone."""

import re

import torch

from auto_quantize_model.export.names import listed, regular_expressions
from auto_quantize_model.export.subject import Subject, python_file
from auto_quantize_model.files import canonical_json

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
QUANTIZED = (torch.nn.Linear, *CONVOLUTIONS, torch.nn.Embedding)  # the classes that both tools quantize
FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
BY_PROFILE, BY_PLAN = "the profile keeps it", "the plan keeps it"
IS_IDLE = "did not run on any scored batch, so its error is unknown"
FOR_INC = "Only for INC 2.6; INC 3.x has another API."
FOR_NNCF = (
    "Needs NNCF 3.0 or later. NNCF's preset chooses the scheme. The profile was measured with INC's per-channel weights"
    " and static, per-tensor, asymmetric activations. For nodes that read no module's weight (the products of"
    " attention), NNCF chooses by itself."
)


def kept(subject: Subject) -> dict[str, str]:
    """The modules that both tools must leave in FP32, each with the reason."""
    left = [op for op in subject.plan.ops if op.op_name not in subject.profile.assignment]
    found = {op.op_name: BY_PROFILE for op in left if op.ran}
    found |= {module.op_name: BY_PLAN for module in subject.plan.excluded}
    found |= {op.op_name: IS_IDLE for op in left if not op.ran}
    return {name: reason for name, reason in found.items() if issubclass(subject.modules[name], QUANTIZED)}


def inc_notes(subject: Subject) -> list[str]:
    """Whether INC can convert the model, and the ops that never ran."""
    check = subject.plan.inc_check
    unfit = f"Do not use: INC 2.6 cannot convert this model ({check.get('reason')})."
    return [*([unfit] if check["status"] == "cannot" else []), *notes(subject)]


def notes(subject: Subject) -> list[str]:
    """The ops that are kept because they never ran."""
    idle = [name for name, reason in kept(subject).items() if reason == IS_IDLE]
    return [f"Kept too ({IS_IDLE}): {listed(idle)}."] if idle else []


def inc_files(subject: Subject, above: str) -> dict[str, str]:
    """INC 2.6 matches the whole of its own name of an op; for a lone Linear this name is `NAME.module`."""
    op_name_dict = {rf"{re.escape(name)}(\.module)?": FP32 for name in subject.common(kept(subject))}
    script = python_file(
        "inc_quantize.py",
        above,
        calibration_samples=subject.calibration_samples,
        embeds_patches=torch.nn.Conv3d in subject.modules.values(),
        reduce_range=subject.plan.reduce_range,
    )
    return {"inc_op_name_dict.json": canonical_json(op_name_dict), **script}


def nncf_files(subject: Subject, above: str) -> dict[str, str]:
    """A function that finds the nodes of the kept modules in NNCF's graph."""
    reasons = kept(subject)
    names = subject.common(reasons)
    idle = [common for name, common in names.items() if reasons[name] == IS_IDLE]
    patterns = regular_expressions(names.values())
    return python_file("nncf_ignored_scope.py", above, patterns=patterns, idle=regular_expressions(idle))
