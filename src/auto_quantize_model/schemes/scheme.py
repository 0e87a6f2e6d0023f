"""Schemes by name, and the assignment of schemes to ops: every state of a model is an assignment."""

from collections.abc import Iterable, Mapping

# How an op is quantized, by name. INC 2.6's static INT8 is the one scheme that there is.
INC_INT8 = "inc_int8"
# {op_name: scheme}; an op that is absent is unquantized.
Assignment = Mapping[str, str]


def assigned(op_names: Iterable[str], scheme: str = INC_INT8) -> dict[str, str]:
    """The assignment that has each of the named ops in one scheme, and all others unquantized."""
    return dict.fromkeys(op_names, scheme)
