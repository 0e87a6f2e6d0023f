"""The ranking of the ops in each scheme, and how far the rankings of two schemes agree.

In: the plan and the capture. Out: rows as the report shows them. The KL divergence ranks here: it describes the change
that a user of the model sees, and compares across schemes.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from auto_quantize_model.decide.ranking import aggregated, isolated, ranked
from auto_quantize_model.decide.stability import TOP, tau
from auto_quantize_model.records import Capture, Estimate, Plan


def of_schemes(plan: Plan, capture: Capture) -> dict[str, dict[str, Any]]:
    """Each scheme of a plan with more than one: {scheme: {all, ops, fallback, refused, estimates}}.

    `all` is the state with every op in the scheme that can have it. `ops` are the scores of the isolated map, by KL
    divergence, the most sensitive first; those that were estimated say so. `fallback` are the scores of that map where
    the plan asks for it in the scheme, the most sensitive first. `refused` is {op_name: reason}. `estimates` are
    checked against the scores, as `checked` returns them.
    """
    if len(plan.schemes) == 1:
        return {}
    references = [batch.reference for batch in capture.batches]
    found = {}
    for name in plan.schemes:
        ops = [op for op in plan.ops if op.ran and name in op.schemes]
        rows = isolated(plan, capture, name, by="divergence")
        fallback = capture.of_map("fallback", name) if name in plan.fallback_schemes else {}
        found[name] = {
            "all": aggregated(capture.all_in(name), references),
            "ops": rows,
            "fallback": ranked("fallback", ops, fallback, references, by="divergence") if fallback else [],
            "estimates": checked(rows, capture.estimates_of(name)),
            "refused": {op.op_name: op.refused[name] for op in plan.ops if name in op.refused},
        }
    return found


def checked(rows: Sequence[Mapping[str, Any]], estimates: Mapping[str, Estimate]) -> dict[str, Any] | None:
    """How estimates agree with the scores of the ops that were measured too; None without estimates.

    Returns:
        {compared, tau, ratio}: the number of these ops, Kendall's tau-b, and the sum of the estimates over the sum of
        the scores. tau and ratio are None where they are undefined.
    """
    if not estimates:
        return None
    measured = {row["op_name"]: row["divergence"] for row in rows if row["measured"]}
    made = [estimates[name].divergence for name in measured]
    together = math.fsum(measured.values())
    return {
        "compared": len(measured),
        "tau": tau(list(measured.values()), made),
        "ratio": math.fsum(made) / together if together else None,
    }


def agreements(schemes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each pair of schemes, how far their rankings agree on the ops that both have.

    `tau` is Kendall's tau-b of the KL divergences, None if undefined. `top_shared` of `top` most sensitive ops are the
    same.
    """
    found = []
    for first, second in itertools.combinations(schemes, 2):
        values = [{row["op_name"]: row["divergence"] for row in schemes[name]["ops"]} for name in (first, second)]
        common = [name for name in values[0] if name in values[1]]
        top = min(TOP, len(common))
        tops = [set(sorted(common, key=of_one.__getitem__, reverse=True)[:top]) for of_one in values]
        found.append(
            {
                "first": first,
                "second": second,
                "ops": len(common),
                "tau": tau(*([of_one[name] for name in common] for of_one in values)),
                "top": top,
                "top_shared": len(set.intersection(*tops)),
            }
        )
    return found
