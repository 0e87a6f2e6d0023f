"""The parts of a model that an op belongs to: its tower, and its fusion unit."""

import re
from collections.abc import Mapping
from typing import Any

# Serving engines hold these modules as one matrix, which has one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def tower_of(op_name: str) -> str:
    """`vision` for a module of the vision tower, by its name, and `language` for any other."""
    return "vision" if re.search(r"\b(visual|vision\w*)\b", op_name) else "language"


def siblings_of(op_name: str, modules: Mapping[str, object]) -> list[str]:
    """The modules that serving engines hold in one matrix with an op, the op included, in the order of the matrix."""
    parent, _, own = op_name.rpartition(".")
    group = next((group for group in FUSED if own in group), (own,))
    names = [f"{parent}.{other}" if parent else other for other in group]
    return [name for name in names if name in modules]


def unit_of(op_name: str, modules: Mapping[str, Any]) -> str:
    """The fusion unit of an op: the names of the ops that share its matrix or its weight, joined by `+`."""
    siblings = siblings_of(op_name, modules)
    if len(siblings) > 1:
        parent = op_name.rpartition(".")[0]
        return f"{parent}.{'+'.join(name.rpartition('.')[2] for name in siblings)}"
    weight = getattr(modules[op_name], "weight", None)
    if weight is None:
        return op_name
    return "+".join(name for name, module in modules.items() if getattr(module, "weight", None) is weight)
