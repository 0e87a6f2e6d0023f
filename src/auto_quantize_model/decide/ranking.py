"""From a capture's scores to a ranking: aggregate each op's scores over the batches, and sort the ops.

In: scores of a map, and the sums of squares of the FP32 output. Out: rows as the report shows them.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from auto_quantize_model.measure.aggregate import decibels, mean, ratio
from auto_quantize_model.records import Capture, Op, Plan, Score


def aggregated(scores: Sequence[Score | None], references: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Aggregate one op's scores over the batches in which it ran.

    Returns:
        `mse_value` is the mean of INC's sums of squared errors, `mse_value_std` their standard deviation between
        batches (null for one batch). `relative_error` is the sum of errors over the sum of squares of the FP32 output.
        `image_relative_error` and `text_relative_error` are the same at those positions. `sqnr_db` is -10 log10 of
        `relative_error`, in dB. `kl_divergence` (nats) and `top1_agreement` are means. A value is null if it was not
        measured, if there are no positions, or (the SQNR) if the error is 0.
    """
    pairs = [(score, reference) for score, reference in zip(scores, references, strict=True) if score is not None]
    relative = {
        name: ratio([(getattr(score, error), reference[part]) for score, reference in pairs])
        for name, error, part in (
            ("relative_error", "mse_value", "all"),
            ("image_relative_error", "image_error", "image"),
            ("text_relative_error", "text_error", "text"),
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
    ops: Sequence[Op], scores: Mapping[str, Sequence[Score | None]], references: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The ops by ascending `mse_value`, with their rank from 1; `tied` marks a shared value (in the plan's order)."""
    if not ops:
        return []
    rows = [{"op_name": op.op_name, "op_type": op.op_type, **aggregated(scores[op.op_name], references)} for op in ops]
    table = pd.DataFrame(rows, dtype=object).sort_values("mse_value", kind="stable")
    table.insert(0, "rank", range(1, len(table) + 1))
    table.insert(1, "tied", table["mse_value"].duplicated(keep=False).astype(object))
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def most_sensitive_first(plan: Plan, capture: Capture) -> list[str]:
    """The names of the measured ops by the isolated map, the most sensitive first."""
    references = [batch.reference for batch in capture.batches]
    rows = ranked([op for op in plan.ops if op.ran], capture.of_map("isolated"), references)
    return [row["op_name"] for row in rows][::-1]
