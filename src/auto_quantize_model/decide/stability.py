"""How stable the ranking is between batches and between metrics, and whether the ops' errors add up.

In: the isolated map of a capture. Out: statistics for the report, each null if it cannot be computed.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau

from auto_quantize_model.measure.aggregate import mean
from auto_quantize_model.records import Score

TOP = 10
Scores = Mapping[str, Sequence[Score | None]]  # of a map: each op's score on each batch, None where it did not run


def assess(isolated: Scores, all_int8: Sequence[Score], complete: bool = True) -> dict[str, Any]:
    """Statistics of the isolated map, over the ops whose scores were measured.

    Args:
        isolated: the scores of the map.
        complete: whether these are all ops, with no op that was only estimated.
        all_int8: the score with every op in INT8, for each batch.

    Returns:
        {batches, rank_tau, rank_tau_lowest, top, top_shared, ties, metric_tau, additivity}. `rank_tau` and
        `rank_tau_lowest`: Kendall's tau-b between the rankings of two batches, mean and lowest over the pairs. `top`:
        ten, or a quarter of fewer than forty ops. `top_shared`: how many of each batch's `top` most sensitive ops are
        among those of every other batch. `ties`: how many ops share with another the value by which they are ranked,
        the mean over batches. `metric_tau`: tau-b between `mse_value` and KL divergence (means over batches).
        `additivity`: the sum of the isolated errors over the all-INT8 error, 1 where errors add up; None where some
        are estimated.
    """
    names, values = by_batch(isolated)
    ranked_by = [mean([score.mse_value for score in scores if score]) for scores in isolated.values()]
    known = rank_taus(values)
    top = min(TOP, math.ceil(len(names) / 4))
    tops = [set(sorted(names, key=dict(zip(names, batch, strict=True)).__getitem__)[-top:]) for batch in values]
    summed = math.fsum(score.mse_value for scores in isolated.values() for score in scores if score)
    together = math.fsum(score.mse_value for score in all_int8)
    return {
        "batches": len(all_int8),
        "rank_tau": statistics.fmean(known) if known else None,
        "rank_tau_lowest": min(known, default=None),
        "top": top,
        "top_shared": len(set.intersection(*tops)) if len(tops) > 1 else None,
        "ties": sum(count for count in Counter(ranked_by).values() if count > 1),
        "metric_tau": _between_metrics(isolated),
        "additivity": summed / together if together and complete else None,
    }


def by_batch(scores: Scores) -> tuple[list[str], list[list[float]]]:
    """The ops that ran in every batch, and for each batch their `mse_value` in that order."""
    complete = _complete(scores)
    values = zip(*([score.mse_value for score in of_one] for of_one in complete.values()), strict=True)
    return list(complete), [list(batch) for batch in values]


def _complete(scores: Scores) -> dict[str, list[Score]]:
    """The scores of the ops that ran in every batch."""
    ran = {name: [score for score in of_one if score] for name, of_one in scores.items()}
    return {name: of_one for name, of_one in ran.items() if len(of_one) == len(scores[name])}


def rank_taus(values: list[list[float]]) -> list[float]:
    """Tau-b between the rankings of each pair of batches, without the pairs for which tau-b is undefined."""
    taus = (tau(*pair) for pair in itertools.combinations(values, 2))
    return [value for value in taus if value is not None]


def _between_metrics(isolated: Scores) -> float | None:
    """Tau-b between the squared error and the KL divergence; None where INC measured, because INC gives errors only."""
    pairs = [[(score.mse_value, score.divergence) for score in scores] for scores in _complete(isolated).values()]
    known = [[(error, divergence) for error, divergence in of_one if divergence is not None] for of_one in pairs]
    if known != pairs:
        return None
    errors, divergences = ([statistics.fmean(pair[side] for pair in of_one) for of_one in known] for side in (0, 1))
    return tau(errors, divergences)


def tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b, which counts ties; None for fewer than two ops or if all are tied."""
    if len(first) < 2:
        return None
    value = float(kendalltau(first, second).statistic)
    return None if math.isnan(value) else value
