"""The signal-to-quantization-noise ratio of a relative error."""

import math


def decibels(relative: float | None) -> float | None:
    """A relative error as SQNR in dB; None where it is 0 or unknown."""
    return -10 * math.log10(relative) if relative else None
