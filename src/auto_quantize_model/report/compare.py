"""Two reports of the same model family: which ops moved further than the noise of their own batches allows.

In: two JSON reports. Out: what changed about the runs, rank moves, changes of the top set, and Markdown of it.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

from auto_quantize_model.decide.stability import tau
from auto_quantize_model.escape import code
from auto_quantize_model.files import InputError
from auto_quantize_model.report.document import markdown_cell

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
    """An op's place among others, from 1 at the most sensitive, and the places that its noise allows."""

    place: int
    range: tuple[int, int] | None  # first and last; None where one batch gives no spread


@dataclass(frozen=True)
class Limits:
    """Beyond what two reports differ.

    `tau` is the least Kendall's tau-b of the rankings; where it is None, that by which batches of one run agree, and at
    most `USUAL_TAU`. `changes` is how many ops may come into or vanish from the `top` most sensitive, `sqnr_drop` how
    many dB all-INT8 may lose.

    Raises:
        InputError: a value is out of its range.
    """

    top: int = 10
    tau: float | None = None
    changes: int = 2
    sqnr_drop: float = 3.0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"top: {self.top} is no size of a set of ops; give 1 or more")
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise InputError(f"tau: {self.tau} is no Kendall's tau; give a number from -1 to 1")
        if self.changes < 0:
            raise InputError(f"top changes: {self.changes} is no number of ops; give 0 or more")
        if not self.sqnr_drop >= 0:
            raise InputError(f"sqnr drop: {self.sqnr_drop} is no loss in dB; give 0 or more")


def compare(first: dict[str, Any], second: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Compare the isolated rankings of two reports.

    Args:
        first: a report as `report.build_report` returns it.
        second: the other one.
        limits: beyond what they differ.

    Returns:
        {differs, reasons, warnings, changed, sqnr_db, recommended, common, only_first, only_second, tau, noise_tau,
        top, entered, left, new_in_top, gone_from_top, moved}. `reasons` are sentences, empty where the reports agree.
        `warnings` are sentences about runs that cannot be compared number by number; they decide nothing. `changed` is
        what differs of model, calibration set, engine and versions; `sqnr_db` that of all-INT8 in each report;
        `recommended` the ops that the recommended profile keeps now and no longer, null where one report lacks it;
        `noise_tau` the lower of both reports' own agreement between batches, null where both have one batch. `moved`
        are the ops whose place among the common ones changed, farthest first: {op_name, first, second, first_range,
        second_range, beyond_noise} as `_move` says. `entered` and `left` are those of them that crossed the end of the
        top set; `new_in_top` the ops of the second report alone that stand in its own top set, `gone_from_top` those of
        the first alone in its own.

    Raises:
        InputError: the reports have fewer than two ops in common, or one has no isolated map.
    """
    top = limits.top
    rows = [_rows(report) for report in (first, second)]
    everywhere = [standings(of_one) for of_one in rows]
    common = everywhere[0].keys() & everywhere[1].keys()
    if len(common) < 2:
        raise InputError("the reports have fewer than two measured ops in common; compare reports of one model family")
    one, other = (standings([row for row in of_one if row["op_name"] in common]) for of_one in rows)
    moved = [_move(name, one[name], other[name]) for name in one if one[name].place != other[name].place]
    noise = [report["trust"]["rank_tau"] for report in (first, second) if report["trust"]["rank_tau"] is not None]
    found = {
        "warnings": _of_measurement(first, second),
        "changed": _changed(first, second),
        "sqnr_db": [report["all_int8"]["sqnr_db"] for report in (first, second)],
        "recommended": _recommended(first, second),
        "common": len(common),
        "only_first": [name for name in everywhere[0] if name not in common],
        "only_second": [name for name in everywhere[1] if name not in common],
        "tau": tau([one[name].place for name in one], [other[name].place for name in one]),
        "noise_tau": min(noise, default=None),
        "top": top,
        "entered": sorted((m for m in moved if m["second"] <= top < m["first"]), key=lambda move: move["second"]),
        "left": [move for move in moved if move["first"] <= top < move["second"]],
        "new_in_top": [name for name in list(everywhere[1])[:top] if name not in common],
        "gone_from_top": [name for name in list(everywhere[0])[:top] if name not in common],
        "moved": sorted(moved, key=lambda move: -abs(move["first"] - move["second"])),
    }
    reasons = [*_of_ranking(found, limits), *_of_top(found, limits), *_of_sqnr(found, limits)]
    return {"differs": bool(reasons), "reasons": reasons} | found


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    if "isolated" not in report["maps"]:
        raise InputError(f"the report of {report['model']['model']} has no isolated map; measure it (sensitivity.maps)")
    return report["maps"]["isolated"]["ops"]


def standings(rows: list[dict[str, Any]]) -> dict[str, Standing]:
    """Where each op of a map's `rows` stands among them, the most sensitive first.

    Its range is the places that it would take if its `mse_value` were one `mse_value_std` higher or lower, all others
    at their means. Of ops with the same value none is the more sensitive, so the range holds the places of all of them.
    """
    values = sorted(row["mse_value"] for row in rows)
    ordered = sorted(reversed(rows), key=lambda row: row["mse_value"], reverse=True)
    found = {}
    for place, row in enumerate(ordered, start=1):
        value, spread = row["mse_value"], row["mse_value_std"]
        reach = None
        if spread is not None:
            above = len(values) - bisect_right(values, value + spread)
            reach = above + 1, len(values) - bisect_left(values, value - spread)
        found[row["op_name"]] = Standing(place, reach)
    return found


def _move(name: str, first: Standing, second: Standing) -> dict[str, Any]:
    """One op's move: beyond the noise where its two ranges share no place; null (unknown) where one has none."""
    beyond = None
    if first.range and second.range:
        beyond = first.range[1] < second.range[0] or second.range[1] < first.range[0]
    return {
        "op_name": name,
        "first": first.place,
        "second": second.place,
        "first_range": first.range,
        "second_range": second.range,
        "beyond_noise": beyond,
    }


def _of_measurement(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Whether the two runs measured in the same arithmetic; the spread between batches does not cover another one."""
    bits = [7 if report["measurement"]["reduce_range"] else 8 for report in (first, second)]
    if bits[0] == bits[1]:
        return []
    return [
        f"The first run quantizes activations to {bits[0]} bits and the second to {bits[1]}, so their scores differ by"
        " arithmetic. Set the same sensitivity.reduce_range in both configs to compare the models."
    ]


def _of_ranking(found: dict[str, Any], limits: Limits) -> list[str]:
    """Whether the rankings as a whole differ; what is within the agreement of a run's own batches is noise."""
    agreement, noise, cell = found["tau"], found["noise_tau"], markdown_cell
    least, what = limits.tau, "asked for"
    if least is None:
        least, what = USUAL_TAU, "usual between runs"
        if noise is not None and noise < least:
            least, what = noise, "by which batches of one run agree"
    # Without a move nothing differs: rounding leaves the tau of equal rankings a hair below 1.
    if not found["moved"] or agreement >= least:
        return []
    return [f"Kendall's tau is {cell(agreement)}, below the {cell(least)} {what}."]


def _of_top(found: dict[str, Any], limits: Limits) -> list[str]:
    """Whether the top set differs: tau weighs all places alike, and hardly falls when a few ops jump to the top.

    What has no spread counts as beyond the noise.
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
    """Whether all-INT8 lost more than it may; null is an infinite SQNR."""
    first, second = (math.inf if value is None else value for value in found["sqnr_db"])
    if second >= first - limits.sqnr_drop:
        return []
    return [
        f"With every op in INT8 the SQNR fell from {_decibels(first)} to {_decibels(second)}; it may lose"
        f" {_decibels(limits.sqnr_drop)}."
    ]


def _decibels(value: float) -> str:
    return "no error" if math.isinf(value) else f"{value:.2f} dB"


def _recommended(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[str]] | None:
    """What the recommended profile keeps now and did not keep before, and what it no longer keeps."""
    kept = [report["profiles"]["profiles"].get("recommended", {}).get("kept") for report in (first, second)]
    if None in kept:
        return None
    return {
        "added": [name for name in kept[1] if name not in kept[0]],
        "removed": [name for name in kept[0] if name not in kept[1]],
    }


def _changed(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, str]]:
    """What differs of the two runs themselves."""
    sides = []
    for report in (first, second):
        facts = {what: str(report[block][key]) for what, (block, key) in IDENTITY.items()}
        sides.append(facts | report["versions"])
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [(name, sides[0].get(name, "none"), sides[1].get(name, "none")) for name in names]
    return [{"what": name, "first": one, "second": other} for name, one, other in pairs if one != other]


def to_markdown(comparison: dict[str, Any], shown: int = 20) -> str:
    """The comparison for people: the verdict first, then what changed, the top set, and the farthest moves."""
    cell = markdown_cell
    lines = [
        "# Two sensitivity reports compared",
        "",
        "**The reports differ:**" if comparison["differs"] else "**The reports agree.**",
        "",
        *(f"- {reason}" for reason in comparison["reasons"]),
        *([""] if comparison["reasons"] else []),
        *(line for warning in comparison["warnings"] for line in (f"> **Warning:** {warning}", "")),
        f"Kendall's tau is {cell(comparison['tau'])} over {comparison['common']} common ops; batches of one run"
        + (" were not compared." if comparison["noise_tau"] is None else f" agree by {cell(comparison['noise_tau'])}."),
        "",
        *_changed_lines(comparison, shown),
        "",
        *_top_lines(comparison, shown),
        "",
        *_move_lines(comparison, shown),
    ]
    return "\n".join(lines) + "\n"


def _changed_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    cell = markdown_cell
    rows = [f"| {cell(row['what'])} | {cell(row['first'])} | {cell(row['second'])} |" for row in comparison["changed"]]
    unchanged = ["Model, calibration set, engine, device, instruction set and versions are the same."]
    return [
        "## What changed",
        "",
        *(["| changed | first | second |", "|---|---|---|", *rows] if rows else unchanged),
        "",
        "With every op in INT8: "
        + ", then ".join(_decibels(math.inf if value is None else value) for value in comparison["sqnr_db"])
        + f" (SQNR). {_recommended_line(comparison['recommended'], shown)}",
        "",
        f"Only in the first: {_listed(comparison['only_first'], shown)}. Only in the second:"
        f" {_listed(comparison['only_second'], shown)}.",
    ]


def _recommended_line(recommended: dict[str, list[str]] | None, shown: int) -> str:
    if recommended is None:
        return "Recommended profiles cannot be compared: not both reports have one."
    if not any(recommended.values()):
        return "The recommended profile keeps the same ops."
    added, removed = (_listed(recommended[change], shown) for change in ("added", "removed"))
    return f"The recommended profile now keeps: {added}; no longer: {removed}."


def _top_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    moves = [(change, move) for change in ("entered", "left") for move in comparison[change]]
    return [
        f"## The {comparison['top']} most sensitive",
        "",
        *(_move_table(moves) if moves else ["No common op entered or left them."]),
        "",
        f"New in the second report and among its {comparison['top']}: {_listed(comparison['new_in_top'], shown)}. Of"
        f" the {comparison['top']} of the first and not in the second: {_listed(comparison['gone_from_top'], shown)}.",
    ]


def _move_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    """The moves that noise does not explain, or may not; the rest is a number."""
    flags = [move["beyond_noise"] for move in comparison["moved"]]
    listed = [move for move in comparison["moved"] if move["beyond_noise"] is not False]
    unknown = f", {flags.count(None)} by unknown noise (one batch has no spread)" if None in flags else ""
    farthest = f" The farthest {shown}:" if len(listed) > shown else ""
    table = _move_table([("up" if move["second"] < move["first"] else "down", move) for move in listed[:shown]])
    legend = (
        "Places are counted among the common ops, from 1 at the most sensitive. In brackets: the places that the op"
        " would take with its `mse_value` one standard deviation between batches higher or lower. A move is beyond the"
        " noise where the two reports share no such place."
    )
    return [
        "## Moves",
        "",
        f"{flags.count(True)} of {comparison['common']} common ops moved beyond the noise{unknown},"
        f" {flags.count(False)} within it.{farthest}",
        *(["", *table] if listed else []),
        *(["", legend] if flags else []),
    ]


def _move_table(moves: list[tuple[str, dict[str, Any]]]) -> list[str]:
    answers = {True: "yes", False: "no", None: "unknown"}
    return [
        "| op_name | move | first | second | beyond the noise |",
        "|---|---|---:|---:|---|",
        *(
            f"| {code(move['op_name'])} | {how} | {_place(move, 'first')} | {_place(move, 'second')}"
            f" | {answers[move['beyond_noise']]} |"
            for how, move in moves
        ),
    ]


def _place(move: dict[str, Any], which: str) -> str:
    first, last = move[f"{which}_range"] or (None, None)
    return str(move[which]) if first == last else f"{move[which]} ({first}–{last})"


def _listed(names: list[str], shown: int) -> str:
    rest = [f"{len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*(code(name) for name in names[:shown]), *rest]) or "none"
