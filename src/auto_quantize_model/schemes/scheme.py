"""The schemes by name, and the assignment of schemes to ops. Every state of a model is an assignment."""

from collections.abc import Iterable, Mapping
from typing import Any

# A scheme is the name of a way to quantize an op. INC 2.6's static INT8 is one; the others are compressed-tensors'.
INC_INT8 = "inc_int8"
UNQUANTIZED = "unquantized"  # the word for an op without a scheme, where schemes are listed
# {op_name: scheme}; an op that is absent is unquantized.
Assignment = Mapping[str, str]


def assigned(op_names: Iterable[str], scheme: str = INC_INT8) -> dict[str, str]:
    """The assignment that gives each named op one scheme; all other ops stay unquantized."""
    return dict.fromkeys(op_names, scheme)


def without_places(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan's scheme on which numbers depend. A checkpoint counts by its files, wherever they lie."""
    return {key: value for key, value in fields.items() if key not in ("checkpoint", "folder", "warnings")}
