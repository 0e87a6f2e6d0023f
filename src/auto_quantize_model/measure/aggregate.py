"""Numbers of several batches as one number. In: records as plain numbers, null where not measured. Out: the same."""

import math


def ratio(pairs: list[tuple[float | None, float]]) -> float | None:
    """Sum of errors over sum of squares; None if an error was not measured or the sum of squares is 0."""
    errors, squares = [error for error, _ in pairs if error is not None], math.fsum(square for _, square in pairs)
    return math.fsum(errors) / squares if len(errors) == len(pairs) and squares else None


def mean(values: list[float | None]) -> float | None:
    """The mean, or None where a value was not measured, or where there are no values."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def decibels(relative: float | None) -> float | None:
    """A relative error as SQNR in dB; None where it is 0 or unknown."""
    return -10 * math.log10(relative) if relative else None
