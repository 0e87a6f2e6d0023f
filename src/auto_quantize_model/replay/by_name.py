"""The schemes of compressed-tensors, without an import of the library where no such scheme is asked for."""

from collections.abc import Mapping
from typing import Any

from auto_quantize_model.schemes.scheme import INC_INT8


def schemes_of(schemes: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, Any]:
    """The schemes of compressed-tensors among `schemes`: {name: a scheme or a checkpoint}.

    Where there is none, compressed-tensors is not imported, because its import takes seconds.

    Args:
        schemes: {name: fields}, as a plan holds them. A preset needs no fields.
        model: of the plan, by whose modules a checkpoint's tensors are named.

    Raises:
        InputError: the fields are wrong, or the files of a checkpoint are not those of the plan.
    """
    served = {name: fields for name, fields in schemes.items() if name != INC_INT8}
    if not served:
        return {}
    from auto_quantize_model.models.checkpoint import open_checkpoint
    from auto_quantize_model.schemes.compressed import PRESETS, scheme_of

    return {
        name: open_checkpoint(fields, model)
        if "checkpoint" in fields
        else scheme_of(name, None if name in PRESETS else fields)
        for name, fields in served.items()
    }
