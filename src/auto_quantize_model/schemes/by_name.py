"""The schemes of compressed-tensors by name, without an import of the library where no such scheme is asked for."""

from collections.abc import Iterable
from typing import Any

from auto_quantize_model.schemes.scheme import INC_INT8


def schemes_of(names: Iterable[str]) -> dict[str, Any]:
    """The schemes of compressed-tensors among `names`, as `schemes.compressed.scheme_of` returns them.

    Where there is none, compressed-tensors is not imported, because its import takes seconds.
    """
    served = [name for name in names if name != INC_INT8]
    if not served:
        return {}
    from auto_quantize_model.schemes.compressed import scheme_of

    return {name: scheme_of(name) for name in served}
