"""Numbers of several batches or samples as one. In: plain numbers, null where not measured. Out: the same."""

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 1000  # of samples, for an interval


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


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of values with weights."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)


def interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a weighted mean by the percentile bootstrap over samples, the same for the same values.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. One sample has no interval but its
    value.
    """
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    value, weight = np.array(values), np.array(weights)
    means = (value * weight)[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def interval_of_count(found: int, of: int) -> tuple[int, int]:
    """The 95 % interval of how many of `of` samples show what `found` of them showed; each end is rounded outwards.

    Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934. It is
    exact for samples that are independent. For 0 of 200 it is 0 to 4, where a bootstrap would say 0 to 0.
    """
    from scipy.stats import binomtest  # here, because the commands tell their options without heavy libraries

    share = binomtest(found, of).proportion_ci(method="exact")
    return math.floor(share.low * of), math.ceil(share.high * of)
