"""How far the ranking can be trusted: between batches, between metrics, and as a sum.

In: the isolated map of a capture. Out: a few statistics for the report, each null where it cannot be computed.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scipy.stats import kendalltau

from auto_quantize_model.decide.ranking import mean

TOP = 10
Records = dict[str, list[dict[str, float] | None]]


def assess(isolated: Records, all_int8: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Statistics of the isolated map.

    Args:
        isolated: op to its record per batch, null where it did not run; a record holds at least `mse_value`.
        all_int8: the record with every op in INT8, per batch.

    Returns:
        {batches, rank_tau, rank_tau_lowest, top, top_shared, ties, metric_tau, additivity}: Kendall's tau-b between the
        rankings of two batches, mean and lowest over the pairs; how many of each batch's `top` most sensitive ops (ten,
        or a quarter of fewer than forty) are among those of every other batch; how many ops share the value by which
        they are ranked, the mean over batches, with another; tau-b between `mse_value` and KL divergence (means over
        batches); the sum of the isolated errors over the all-INT8 error, 1 where errors add up.
    """
    names, values = by_batch(isolated)
    ranked_by = [mean([record["mse_value"] for record in records if record]) for records in isolated.values()]
    known = rank_taus(values)
    top = min(TOP, math.ceil(len(names) / 4))
    tops = [set(sorted(names, key=dict(zip(names, batch, strict=True)).__getitem__)[-top:]) for batch in values]
    summed = math.fsum(record["mse_value"] for records in isolated.values() for record in records if record)
    together = math.fsum(record["mse_value"] for record in all_int8)
    return {
        "batches": len(all_int8),
        "rank_tau": statistics.fmean(known) if known else None,
        "rank_tau_lowest": min(known, default=None),
        "top": top,
        "top_shared": len(set.intersection(*tops)) if len(tops) > 1 else None,
        "ties": sum(count for count in Counter(ranked_by).values() if count > 1),
        "metric_tau": _between_metrics(isolated, names),
        "additivity": summed / together if together else None,
    }


def by_batch(records: Records) -> tuple[list[str], list[list[float]]]:
    """The ops that ran in every batch, and of each batch their `mse_value` in that order."""
    names = [name for name, of_one in records.items() if None not in of_one]
    values = zip(*([_of(record)["mse_value"] for record in records[name]] for name in names), strict=True)
    return names, [list(batch) for batch in values]


def rank_taus(values: list[list[float]]) -> list[float]:
    """Tau-b between the rankings of each two batches, where it is known."""
    taus = (tau(*pair) for pair in itertools.combinations(values, 2))
    return [value for value in taus if value is not None]


def _of(record: dict[str, float] | None) -> dict[str, float]:
    assert record is not None  # noqa: S101  ops without one are left out above
    return record


def _between_metrics(isolated: Records, names: list[str]) -> float | None:
    """Tau-b between the squared error and the KL divergence; None where INC measured, which gives no KL divergence."""
    records = [[_of(record) for record in isolated[name]] for name in names]
    if any("kl_divergence" not in record for of_one in records for record in of_one):
        return None
    errors, divergences = (
        [statistics.fmean(record[metric] for record in of_one) for of_one in records]
        for metric in ("mse_value", "kl_divergence")
    )
    return tau(errors, divergences)


def tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b, which counts ties; None for fewer than two ops or where all are tied."""
    if len(first) < 2:
        return None
    value = float(kendalltau(first, second).statistic)
    return None if math.isnan(value) else value
