"""Rounding to FP4 on a CPU, with the bits of compressed-tensors in about a fifth of its time.

In: values that a scheme has divided by their scales. Out: the nearest values of E2M1. The library finds the eight
values of FP4 by sixteen comparisons over the whole tensor. Here a power of two gives each value's step. The library's
registry of backends lends the function to `served_fp4` alone, so that the audit still runs the library's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from compressed_tensors.utils.impl_backend import ImplBackend

EXPONENT = 0x7F800000  # the bits of a float32's exponent; alone, they are the power of two at or below the value
_IN_USE = ContextVar("fp4_by_steps", default=False)


@contextmanager
def served_fp4() -> Iterator[None]:
    """Within this context, compressed-tensors rounds float32 values on a CPU by `round_to_fp4`."""
    before = _IN_USE.set(True)
    try:
        yield
    finally:
        _IN_USE.reset(before)


def _can(x: torch.Tensor) -> bool:
    return _IN_USE.get() and x.device.type == "cpu" and x.dtype == torch.float32


@ImplBackend.register("cast_to_fp4", _can, 0)  # type: ignore[untyped-decorator]
def round_to_fp4(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), ties to the even code.

    Args:
        x: float32 on a CPU, of any shape; stays as it is.
    """
    found = x + 0.0  # also turns -0.0 into 0.0, as the library does
    step = (found.view(torch.int32) & EXPONENT).view(torch.float32).mul_(0.5).clamp_(0.5, 2.0)
    return found.div_(step).round_().mul_(step).clamp_(-6.0, 6.0)
