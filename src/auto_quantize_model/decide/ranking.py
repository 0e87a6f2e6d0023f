"""From a capture's records to a ranking: each op's scores aggregated over batches, the most sensitive op first.

In: scores of a map, and the sums of squares of the FP32 output. Out: rows as the report shows them.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from auto_quantize_model.measure.aggregate import decibels, mean, ratio
from auto_quantize_model.records import Capture, Op, Plan, Score

# Whether a high mse_value means a sensitive op. A map that is not here ranks nothing.
HIGH_IS_SENSITIVE = {"isolated": True, "fallback": False}


def aggregated(scores: Sequence[Score | None], references: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Aggregate one op's scores over the batches in which it ran.

    Returns:
        `mse_value` is the mean of INC's sums of squared errors, `mse_value_std` their standard deviation between
        batches (null for one batch). `relative_error` is the sum of errors over the sum of squares of the FP32 output.
        `image_relative_error` and `text_relative_error` are the same at those positions. `sqnr_db` is -10 log10 of
        `relative_error`, in dB. `kl_divergence` (nats) and `top1_agreement` are means. `image_kl_divergence` and
        `text_kl_divergence` are means over those positions. A value is null if it was not measured, if there are no
        positions, or (the SQNR) if the error is 0.
    """
    pairs = [(score, reference) for score, reference in zip(scores, references, strict=True) if score is not None]
    relative = {
        name: ratio([(getattr(score, error), reference[part]) for score, reference in pairs])
        for name, error, part in (
            ("relative_error", "mse_value", "all"),
            ("image_relative_error", "image_error", "image"),
            ("text_relative_error", "text_error", "text"),
            ("image_kl_divergence", "image_divergence", "image_positions"),
            ("text_kl_divergence", "text_divergence", "text_positions"),
        )
    }
    overall = relative["relative_error"]
    means = {
        name: mean([getattr(score, name) for score, _ in pairs])
        for name in ("mse_value", "kl_divergence", "top1_agreement")
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
) -> list[dict[str, Any]]:
    """The ops of a map as rows, each with its rank, whether it is tied, its name, type and aggregated scores.

    Rank 1 is the most sensitive op and comes first: the highest value of `by` in the isolated map, the lowest in the
    fallback map. Ops with the same value are marked as tied. Among these the isolated map ranks the later one in the
    plan first, the fallback map the earlier one. The requantize map is a running total: its rows stay in the plan's
    order, and their rank is None.
    """
    rows: list[dict[str, Any]] = [
        {"op_name": op.op_name, "op_type": op.op_type, **aggregated(scores[op.op_name], references)} for op in ops
    ]
    if label not in HIGH_IS_SENSITIVE:
        return [{"rank": None, "tied": False, **row} for row in rows]
    rows.sort(key=lambda row: row[by])
    if HIGH_IS_SENSITIVE[label]:
        rows.reverse()
    count = Counter(row[by] for row in rows)
    return [{"rank": rank, "tied": count[row[by]] > 1, **row} for rank, row in enumerate(rows, start=1)]


def most_sensitive_first(plan: Plan, capture: Capture) -> list[str]:
    """The names of the measured ops by the isolated map, the most sensitive first."""
    references = [batch.reference for batch in capture.batches]
    rows = ranked("isolated", [op for op in plan.ops if op.ran], capture.of_map("isolated"), references)
    return [row["op_name"] for row in rows]
