"""From a capture's records to a ranking: each op's scores aggregated over batches, the most sensitive op first.

In: scores of a map, and the sums of squares of the FP32 output. Out: rows as the report shows them.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from auto_quantize_model.measure.aggregate import decibels, mean, ratio
from auto_quantize_model.records import Capture, Estimate, Op, Plan, Score
from auto_quantize_model.schemes.scheme import INC_INT8

# Whether a high mse_value means a sensitive op. A map that is not here ranks nothing.
HIGH_IS_SENSITIVE = {"isolated": True, "fallback": False}


def aggregated(scores: Sequence[Score | None], references: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Aggregate one op's scores over the batches in which it ran.

    Returns:
        `mse_value` is the mean of INC's sums of squared errors, `mse_value_std` their standard deviation between
        batches (null for one batch). `relative_error` is the sum of errors over the sum of squares of the FP32 output.
        `image_relative_error` and `text_relative_error` are the same at those positions. `sqnr_db` is -10 log10 of
        `relative_error`, in dB. `divergence` (nats), `top1_agreement` and `router_agreement` are
        means. `image_divergence` and
        `text_divergence` are means over those positions. A value is null if it was not measured, if there are no
        positions, or (the SQNR) if the error is 0.
    """
    pairs = [(score, reference) for score, reference in zip(scores, references, strict=True) if score is not None]
    relative = {
        name: ratio([(getattr(score, error), reference[part]) for score, reference in pairs])
        for name, error, part in (
            ("relative_error", "mse_value", "all"),
            ("image_relative_error", "image_error", "image"),
            ("text_relative_error", "text_error", "text"),
            ("image_divergence", "image_divergence", "image_positions"),
            ("text_divergence", "text_divergence", "text_positions"),
        )
    }
    overall = relative["relative_error"]
    means = {
        name: mean([getattr(score, name) for score, _ in pairs])
        for name in ("mse_value", "divergence", "top1_agreement", "router_agreement")
    }
    errors = [score.mse_value for score, _ in pairs]
    return {
        "mse_value": means.pop("mse_value"),
        "mse_value_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "relative_error": overall,
        "sqnr_db": decibels(overall),
        **means,
        **relative,
    }


def ranked(
    label: str,
    ops: Sequence[Op],
    scores: Mapping[str, Sequence[Score | None]],
    references: Sequence[Mapping[str, float]],
    by: str = "mse_value",
    estimates: Mapping[str, Estimate] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The ops of a map as rows, each with its rank, whether it is tied, its name, type and aggregated scores.

    Rank 1 is the most sensitive op and comes first: the highest value of `by` in the isolated map, the lowest in the
    fallback map. Ops with the same value are marked as tied. Among these the isolated map ranks the later one in the
    plan first, the fallback map the earlier one. The requantize map is a running total: its rows stay in the plan's
    order, and their rank is None.

    An op whose scores were not measured has an estimate in `estimates`. Its row has `measured` false, the estimated KL
    divergence with its `standard_error` and `split_half`, and no other metric. With such an op, the KL divergence
    ranks in place of `by`.
    """
    rows = [row_of(op, scores.get(op.op_name), references, estimates.get(op.op_name)) for op in ops]
    if not all(row["measured"] for row in rows):
        by = "divergence"
    if label not in HIGH_IS_SENSITIVE:
        return [{"rank": None, "tied": False, **row} for row in rows]
    rows.sort(key=lambda row: row[by])
    if HIGH_IS_SENSITIVE[label]:
        rows.reverse()
    count = Counter(row[by] for row in rows)
    return [{"rank": rank, "tied": count[row[by]] > 1, **row} for rank, row in enumerate(rows, start=1)]


def row_of(
    op: Op, scores: Sequence[Score | None] | None, references: Sequence[Mapping[str, float]], estimate: Estimate | None
) -> dict[str, Any]:
    """The row of one op without its rank, from its scores or, where it has none, from its estimate."""
    row = {"op_name": op.op_name, "op_type": op.op_type, "measured": scores is not None}
    row |= aggregated(scores or [None] * len(references), references)
    if scores is not None or estimate is None:
        return row | {"standard_error": None, "split_half": None}
    return row | {key: getattr(estimate, key) for key in ("divergence", "standard_error", "split_half")}


def most_sensitive_first(plan: Plan, capture: Capture) -> list[str]:
    """The names of the ops that ran by the isolated map, the most sensitive first."""
    return [row["op_name"] for row in isolated(plan, capture, plan.main_scheme, ranking_metric(plan.main_scheme))]


def ranking_metric(scheme: str) -> str:
    """The metric that ranks ops in a scheme: INC's own in `inc_int8`, else the KL divergence."""
    return "mse_value" if scheme == INC_INT8 else "divergence"


def isolated(plan: Plan, capture: Capture, scheme: str, by: str) -> list[dict[str, Any]]:
    """The isolated map of a scheme as `ranked` returns it, for the ops that ran and can have the scheme."""
    references = [batch.reference for batch in capture.batches]
    ops = [op for op in plan.ops if op.ran and scheme in op.schemes]
    return ranked("isolated", ops, capture.of_map("isolated", scheme), references, by, capture.estimates_of(scheme))
