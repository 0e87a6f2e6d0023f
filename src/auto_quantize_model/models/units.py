"""The parts of a model that an op belongs to: its tower, and its unit, whose ops share a scheme."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from auto_quantize_model.records import Op, Unit
from auto_quantize_model.schemes.scheme import INC_INT8

# Serving engines hold these modules as one matrix, which has one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# The names that transformers gives to the towers' modules, and to the modules that join images to the text model.
AUDIO = re.compile(r"(\w+_)?(audio|speech|acoustic)(_\w+)?")
VISION = re.compile(
    r"(\w+_)?(vision|visual|image|video)(_\w+)?|((multi_modal|mm)_)?projector|connector|aligner|merger|qformer"
    r"|language_projection|resampler(_\w+)?|perceiver(_\w+)?|perception_\w+|vq_?model|generation_\w+"
    # The names that classifiers of images give to all but their heads.
    r"|\w*vit(v2|_\w+)?|deit|beit|bit|donut|\w*swin|swinv2|convnext(v2)?|cvt|dinat|dinov2\w*|efficientnet|focalnet|hiera|ijepa"
    r"|mobilenet_v\d|poolformer|pvt(_v2)?|resnet|regnet|segformer|swiftformer|textnet"
)


def tower_of(op_name: str) -> str:
    """`vision`, `audio` or `language`, by the name of a module.

    What joins images to the text model is of the vision tower, because it runs with images alone.
    """
    parts = op_name.split(".")
    if any(AUDIO.fullmatch(part) for part in parts):
        return "audio"
    return "vision" if any(VISION.fullmatch(part) for part in parts) else "language"


def siblings_of(op_name: str, modules: Mapping[str, object]) -> list[str]:
    """The modules that serving engines hold in one matrix with an op, the op included, in the order of the matrix."""
    parent, _, own = op_name.rpartition(".")
    group = next((group for group in FUSED if own in group), (own,))
    names = [f"{parent}.{other}" if parent else other for other in group]
    return [name for name in names if name in modules]


def experts_of(op_name: str, modules: Mapping[str, Any]) -> str:
    """The module that holds the experts of a block, for a matrix of one of them; empty for any other op."""
    parts = op_name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    held = (name for name in above if hasattr(modules.get(name), "holds_experts") or name.endswith(".experts"))
    return next(held, "")


def members_of(op_name: str, modules: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The modules that share an op's scheme, the op included, and whether they share the weight itself."""
    if holder := experts_of(op_name, modules):
        inside = (name for name in modules if name.startswith(f"{holder}."))
        return [name for name in inside if getattr(modules[name], "weight", None) is not None], False
    siblings = siblings_of(op_name, modules)
    weight = getattr(modules[op_name], "weight", None)
    if len(siblings) > 1 or weight is None:
        return siblings, False
    tied = [name for name, module in modules.items() if getattr(module, "weight", None) is weight]
    return tied, len(tied) > 1


def unit_of(op_name: str, modules: Mapping[str, Any]) -> str:
    """The name of an op's unit: that of its experts, or the names of the modules that share its matrix or its weight.

    Names are joined by `+`.
    """
    if holder := experts_of(op_name, modules):
        return holder
    members, tied = members_of(op_name, modules)
    if tied or len(members) == 1:
        return "+".join(members)
    parent = op_name.rpartition(".")[0]
    return f"{parent}.{'+'.join(name.rpartition('.')[2] for name in members)}"


def units_of(ops: Sequence[Op], modules: Mapping[str, Any]) -> list[Unit]:
    """The units of a plan, in the order of their first ops.

    A unit has the schemes of compressed-tensors that all its modules can have.

    Args:
        ops: the plan's, with their schemes.
        modules: of the model, by name.
    """
    planned = {op.op_name: op for op in ops}
    found = []
    for name in dict.fromkeys(op.unit for op in ops):
        of_unit = [op for op in ops if op.unit == name]
        members, tied = members_of(of_unit[0].op_name, modules)
        lone = [member for member in members if member not in planned]
        schemes, refused = [], {}
        for scheme in dict.fromkeys(scheme for op in of_unit for scheme in (*op.schemes, *op.refused)):
            if lone:
                shared = "weight" if tied else "matrix"
                refused[scheme] = f"{lone[0]} has the same {shared}, and it stays unquantized"
            elif against := next((op for op in of_unit if scheme in op.refused), None):
                refused[scheme] = f"{against.op_name}: {against.refused[scheme]}"
            else:
                schemes.append(scheme)
        served = tuple(scheme for scheme in schemes if scheme != INC_INT8)
        refused.pop(INC_INT8, None)
        found.append(Unit(name, tuple(op.op_name for op in of_unit), tied, served, refused))
    return found
