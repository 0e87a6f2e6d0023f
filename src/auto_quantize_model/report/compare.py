"""Two reports of the same model family: which ops moved further than the noise of their own batches allows.

In: two JSON reports. Out: what changed about the runs, rank moves, and changes of the top set.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

from auto_quantize_model.decide.stability import tau
from auto_quantize_model.files import InputError
from auto_quantize_model.report.sentences import PROFILES, number
from auto_quantize_model.schemes.scheme import INC_INT8

USUAL_TAU = 0.8
IDENTITY = {
    "model": ("model", "model"),
    "model digest": ("model", "digest"),
    "calibration": ("calibration", "name"),
    "calibration digest": ("calibration", "digest"),
    "engine": ("measurement", "engine"),
    "device": ("measurement", "device"),
    "instruction set": ("measurement", "instruction_set"),
    "INT8 kernel": ("measurement", "int8_kernel"),
    "reduce_range": ("measurement", "reduce_range"),
}


class Standing(NamedTuple):
    """An op's rank among others, 1 for the most sensitive, and the ranks that its noise allows."""

    rank: int
    range: tuple[int, int] | None  # first and last; None where one batch gives no spread


Ranking = dict[str, Standing]


@dataclass(frozen=True)
class Limits:
    """The limits within which two reports agree.

    `tau` is the minimum Kendall's tau-b between the rankings. Its default (None) is the agreement between batches of
    one run, and `USUAL_TAU` at most. `changes` is how many ops may enter or leave the `top` most sensitive ones.
    `sqnr_drop` is how many dB of SQNR all-INT8 may lose.

    Raises:
        InputError: a value is out of its range.
    """

    top: int = 10
    tau: float | None = None
    changes: int = 2
    sqnr_drop: float = 3.0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"top: {self.top} is not a number of ops; give 1 or more")
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise InputError(f"tau: {self.tau} is not a Kendall's tau; give a number from -1 to 1")
        if self.changes < 0:
            raise InputError(f"top changes: {self.changes} is not a number of ops; give 0 or more")
        if not self.sqnr_drop >= 0:
            raise InputError(f"sqnr drop: {self.sqnr_drop} is not a loss in dB; give 0 or more")


def compare(first: dict[str, Any], second: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Compare the isolated rankings of two reports.

    Args:
        first: a report as `report.build_report` returns it.
        second: the other one.
        limits: within which the reports agree.

    Returns:
        {differs, reasons, warnings, changed, sqnr_db, profile, common, only_first, only_second, tau, noise_tau,
        limits, top, entered, left, new_in_top, gone_from_top, moved}. `reasons` are sentences, empty where the reports
        are within the limits.
        `warnings` are sentences about runs that cannot be compared number by number; they do not count as differences.
        `changed` lists differences in model, calibration set, engine and versions. `sqnr_db` is the SQNR of all-INT8 in
        each report. `profile` is the first profile that both reports have: {name, bits, schemes, only}. It holds the
        bits a weight in both reports, {unit: [first, second]} for the units whose scheme differs, and the units of each
        report alone; null without such a profile. `noise_tau` is the lower of both reports' agreement between batches;
        null where both have one batch.
        `moved` are the ops whose rank among the common ops changed, the largest change first: {op_name, first, second,
        first_range, second_range, beyond_noise} as `_move` says. `entered` and `left` are the moved ops that came into
        the top set or fell out of it. `new_in_top` are the ops of the second report alone that are in its top set.
        `gone_from_top` are the ops of the first report alone that are in its top set.

    Raises:
        InputError: the reports have fewer than two ops in common, or one has no isolated map. Or one has estimates, and
            the other has no KL divergence to compare them with.
    """
    top = limits.top
    everywhere, (one, other) = rankings(first, second)
    common = one.keys()
    moved = [_move(name, one[name], other[name]) for name in one if one[name].rank != other[name].rank]
    taus = [report["stability"]["rank_tau"] for report in (first, second)]
    found = {
        "warnings": _of_measurement(first, second),
        "changed": _changed(first, second),
        "sqnr_db": [report["all_ops"]["sqnr_db"] for report in (first, second)],
        "profile": _profile(first, second),
        "common": len(common),
        "only_first": [name for name in everywhere[0] if name not in common],
        "only_second": [name for name in everywhere[1] if name not in common],
        "tau": tau([one[name].rank for name in one], [other[name].rank for name in one]),
        "noise_tau": min((value for value in taus if value is not None), default=None),
        "limits": {"tau": limits.tau, "changes": limits.changes, "sqnr_drop": limits.sqnr_drop},
        "top": top,
        "entered": sorted((m for m in moved if m["second"] <= top < m["first"]), key=lambda move: move["second"]),
        "left": [move for move in moved if move["first"] <= top < move["second"]],
        "new_in_top": [name for name in list(everywhere[1])[:top] if name not in common],
        "gone_from_top": [name for name in list(everywhere[0])[:top] if name not in common],
        "moved": sorted(moved, key=lambda move: -abs(move["first"] - move["second"])),
    }
    reasons = [*_of_ranking(found, limits), *_of_top(found, limits), *_of_sqnr(found, limits)]
    return {"differs": bool(reasons), "reasons": reasons} | found


def rankings(first: dict[str, Any], second: dict[str, Any]) -> tuple[list[Ranking], list[Ranking]]:
    """The ranking of each report, and the rankings of the ops that both have.

    Raises:
        InputError: as `compare` says.
    """
    rows = [_rows(report) for report in (first, second)]
    by = _ranks_by(rows)
    everywhere = [standings(of_one, by) for of_one in rows]
    common = everywhere[0].keys() & everywhere[1].keys()
    if len(common) < 2:
        raise InputError("the reports have fewer than two measured ops in common; compare reports of one model family")
    return everywhere, [standings([row for row in of_one if row["op_name"] in common], by) for of_one in rows]


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    if "isolated" not in report["maps"]:
        raise InputError(f"the report of {report['model']['model']} has no isolated map; measure it (sensitivity.maps)")
    rows: list[dict[str, Any]] = report["maps"]["isolated"]["ops"]
    return rows


def _ranks_by(rows: list[list[dict[str, Any]]]) -> str:
    """The metric that ranks in both reports: INC's error, or the KL divergence where one report has estimates."""
    if all(row["mse_value"] is not None for of_one in rows for row in of_one):
        return "mse_value"
    if any(row["divergence"] is None for of_one in rows for row in of_one):
        raise InputError("one report has estimates, and the other has no KL divergence; measure it with the replay")
    return "divergence"


# The spread of each metric that ranks. A measured KL divergence has none.
SPREADS = {"mse_value": "mse_value_std", "divergence": "standard_error"}


def standings(rows: list[dict[str, Any]], by: str = "mse_value") -> Ranking:
    """The rank of each op among the `rows` of an isolated map, the most sensitive first.

    The range of an op holds the ranks that it would get with its value one spread higher or lower, all others at their
    means. Ops with the same value are equally sensitive, so the range holds the ranks of all of them.

    Args:
        by: the metric that ranks, one of `SPREADS`.
    """
    values = sorted(row[by] for row in rows)
    ordered = sorted(rows, key=lambda row: row[by], reverse=True)
    found = {}
    for rank, row in enumerate(ordered, start=1):
        value, spread = row[by], row.get(SPREADS[by])
        reach = None
        if spread is not None:
            above = len(values) - bisect_right(values, value + spread)
            reach = above + 1, len(values) - bisect_left(values, value - spread)
        found[row["op_name"]] = Standing(rank, reach)
    return found


def _move(name: str, first: Standing, second: Standing) -> dict[str, Any]:
    """One op's move. It is beyond the noise where its two ranges share no rank; null where one range is unknown."""
    beyond = None
    if first.range and second.range:
        beyond = first.range[1] < second.range[0] or second.range[1] < first.range[0]
    return {
        "op_name": name,
        "first": first.rank,
        "second": second.rank,
        "first_range": first.range,
        "second_range": second.range,
        "beyond_noise": beyond,
    }


def _of_measurement(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """A warning where the runs measured in different arithmetic, which the spread between batches does not cover."""
    found = []
    if any(report["measurement"].get("effort", {}).get("probes") for report in (first, second)):
        found.append("A report has estimates of some ops, so the KL divergence ranks the ops of both.")
    bits = [7 if report["measurement"]["reduce_range"] else 8 for report in (first, second)]
    if bits[0] == bits[1]:
        return found
    return [
        *found,
        f"The first run quantizes activations to {bits[0]} bits and the second to {bits[1]}, so their scores differ by"
        " arithmetic too. Set the same sensitivity.reduce_range in both configs to compare the models.",
    ]


def _of_ranking(found: dict[str, Any], limits: Limits) -> list[str]:
    """Whether the rankings as a whole differ by more than the batches of one run do."""
    agreement, noise = found["tau"], found["noise_tau"]
    least, what = limits.tau, "asked for"
    if least is None:
        least, what = USUAL_TAU, "usual between runs"
        if noise is not None and noise < least:
            least, what = noise, "between batches of one run"
    # Equal rankings can have a tau slightly below 1, because of rounding.
    if not found["moved"] or agreement >= least:
        return []
    return [f"Kendall's tau is {number(agreement)}, below the {number(least)} {what}."]


def _of_top(found: dict[str, Any], limits: Limits) -> list[str]:
    """Whether the top set differs. Tau weighs all ranks alike, so a few ops that jump to the top hardly lower it.

    A move of an op without a spread counts as beyond the noise.
    """
    beyond, unknown = (sum(move["beyond_noise"] is flag for move in found["entered"]) for flag in (True, None))
    new, gone = len(found["new_in_top"]), len(found["gone_from_top"])
    reasons = []
    if (came := beyond + unknown + new) > limits.changes:
        parts = [(beyond, "beyond the noise"), (unknown, "by unknown noise"), (new, "only in the second report")]
        counts = ", ".join(f"{count} {how}" for count, how in parts if count)
        reasons.append(
            f"Ops that came into the {limits.top} most sensitive: {came} ({counts}); at most {limits.changes} may."
        )
    if gone > limits.changes:
        reasons.append(
            f"Of the {limits.top} most sensitive ops of the first report {gone} are not in the second; at most"
            f" {limits.changes} may."
        )
    return reasons


def _of_sqnr(found: dict[str, Any], limits: Limits) -> list[str]:
    """Whether all-INT8 lost more SQNR than the limit; null is an infinite SQNR."""
    first, second = (math.inf if value is None else value for value in found["sqnr_db"])
    if second >= first - limits.sqnr_drop:
        return []
    return [
        f"With every op in INT8 the SQNR fell from {decibels(first)} to {decibels(second)}; the limit is a loss"
        f" of {decibels(limits.sqnr_drop)}."
    ]


def decibels(value: float) -> str:
    """An SQNR or a loss of it as text."""
    return "no error" if math.isinf(value) else f"{value:.2f} dB"


def _profile(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """The first profile that both reports have, with the units whose scheme differs."""
    sides = [report["profiles"]["profiles"] for report in (first, second)]
    name = next((name for name in PROFILES if all(name in side for side in sides)), None)
    if name is None:
        return None
    points = [side[name]["point"] for side in sides]
    schemes = [
        {unit["name"]: scheme for unit, scheme in zip(report["frontier"]["units"], point["schemes"], strict=True)}
        for report, point in zip((first, second), points, strict=True)
    ]
    common = [unit for unit in schemes[0] if unit in schemes[1]]
    changed = {unit: [side[unit] for side in schemes] for unit in common if schemes[0][unit] != schemes[1][unit]}
    only = [[unit for unit in side if unit not in common] for side in schemes]
    return {"name": name, "bits": [point["bits"] for point in points], "schemes": changed, "only": only}


def _changed(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, str]]:
    """The facts in which the two runs differ."""
    sides = []
    for report in (first, second):
        facts = {what: str(report[block][key]) for what, (block, key) in IDENTITY.items()}
        facts["measured schemes"] = ", ".join(report["schemes"]) or INC_INT8
        facts["candidate schemes"] = ", ".join(report["frontier"].get("candidates", ["none"]))
        sides.append(facts | report["versions"])
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [(name, sides[0].get(name, "none"), sides[1].get(name, "none")) for name in names]
    return [{"what": name, "first": one, "second": other} for name, one, other in pairs if one != other]
