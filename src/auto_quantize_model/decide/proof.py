"""What the held-out samples say about the decision: the frontier against its controls, and predicted against measured.

In: the measured frontier. Out: statistics for the report.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from auto_quantize_model.decide.stability import tau
from auto_quantize_model.measure.aggregate import interval
from auto_quantize_model.records import Frontier, Point

RULES = ("random", "edges")  # the controls that are compared at equal bytes


def comparisons(frontier: Frontier) -> list[dict[str, Any]]:
    """Each control of `RULES` next to the point of the frontier whose bytes are nearest.

    Returns:
        Rows of {kind, name, bits, divergence, frontier_bits, frontier_divergence, more, low, high}. `more` is how
        many nats the control's divergence is above the frontier's, as a mean over the samples. `low` and `high` are
        the 95 % interval of that difference by samples.
    """
    rows = []
    for control in frontier.controls:
        if control.kind in RULES:
            mine = min(frontier.points, key=lambda point: abs(point.weight_bytes - control.weight_bytes))  # noqa: B023
            pairs = zip(control.divergence_by_sample, mine.divergence_by_sample, strict=True)
            differences = [theirs - ours for theirs, ours in pairs]
            low, high = interval(differences, [1.0] * len(differences))
            rows.append(
                {
                    "kind": control.kind,
                    "name": control.name,
                    "bits": control.bits,
                    "divergence": control.divergence,
                    "frontier_bits": mine.bits,
                    "frontier_divergence": mine.divergence,
                    "more": statistics.fmean(differences),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def prediction(frontier: Frontier) -> dict[str, Any]:
    """How the sums of the units' losses agree with the measured divergence over all choices that quantize something.

    Returns:
        {compared, tau, ratio}: the number of choices, Kendall's tau-b, and the geometric mean of measured over
        predicted. tau and ratio are None where they are undefined, and where another loss than the divergence is
        summed, ratio is None.
    """
    points: Sequence[Point] = [*frontier.points, *frontier.controls]
    known = [(point.predicted, point.divergence) for point in points if point.predicted > 0 < point.divergence]
    logs = [math.log(measured / predicted) for predicted, measured in known]
    of_nats = frontier.loss == "divergence"
    return {
        "compared": len(known),
        "tau": tau([predicted for predicted, _ in known], [measured for _, measured in known]),
        "ratio": math.exp(statistics.fmean(logs)) if logs and of_nats else None,
    }
