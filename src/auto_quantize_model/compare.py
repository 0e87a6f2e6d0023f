"""Two reports of the same model family: which ops moved further than the noise of their own batches allows.

In: two JSON reports. Out: what changed about the runs, rank moves, changes of the top set, and Markdown of it.
"""

import math
from typing import Any

from auto_quantize_model.files import InputError
from auto_quantize_model.report import markdown_cell
from auto_quantize_model.trust import tau

IDENTITY = {
    "model": ("model", "model"),
    "model digest": ("model", "digest"),
    "calibration": ("calibration", "name"),
    "calibration digest": ("calibration", "digest"),
    "engine": ("measurement", "engine"),
    "device": ("measurement", "device"),
}


def compare(first: dict[str, Any], second: dict[str, Any], top: int, least_tau: float) -> dict[str, Any]:
    """Compare the isolated rankings of two reports.

    Args:
        first: a report as `report.build_report` returns it.
        second: the other one.
        top: size of the sets of most sensitive ops.
        least_tau: Kendall's tau-b below which the rankings count as different.

    Returns:
        {changed, common, only_first, only_second, tau, noise_tau, top, entered, left, moved, differs}. `changed` is
        what differs of model, calibration set, engine and versions; `noise_tau` the lower of both reports' own
        agreement between batches, null where both have one batch; `moved` the ops whose place, from 1 at the most
        sensitive, changed, farthest first. `differs` is true where tau is below both `least_tau` and `noise_tau`: two
        batches of one run agree no better than `noise_tau`, so a move within it is noise.

    Raises:
        InputError: the reports have fewer than two ops in common, or one has no isolated map.
    """
    places = [_places(report) for report in (first, second)]
    common = [name for name in places[0] if name in places[1]]
    if len(common) < 2:
        raise InputError("the reports have fewer than two measured ops in common; compare reports of one model family")
    agreement = tau([places[0][name] for name in common], [places[1][name] for name in common])
    noise = [report["trust"]["rank_tau"] for report in (first, second) if report["trust"]["rank_tau"] is not None]
    tops = [{name for name, place in of_one.items() if place <= top} for of_one in places]
    moved = [{"op_name": name, "first": places[0][name], "second": places[1][name]} for name in common]
    return {
        "changed": _changed(first, second),
        "common": len(common),
        "only_first": [name for name in places[0] if name not in places[1]],
        "only_second": [name for name in places[1] if name not in places[0]],
        "tau": agreement,
        "noise_tau": min(noise, default=None),
        "top": top,
        "entered": sorted(tops[1] - tops[0], key=places[1].__getitem__),
        "left": sorted(tops[0] - tops[1], key=places[0].__getitem__),
        "moved": sorted(
            (move for move in moved if move["first"] != move["second"]),
            key=lambda move: -abs(move["first"] - move["second"]),
        ),
        "differs": agreement is None or agreement < min([least_tau, *noise], default=math.inf),
    }


def _places(report: dict[str, Any]) -> dict[str, int]:
    """Each op's place in the isolated ranking, from 1 at the most sensitive."""
    if "isolated" not in report["maps"]:
        raise InputError(f"the report of {report['model']['model']} has no isolated map; measure it (sensitivity.maps)")
    rows = report["maps"]["isolated"]["ops"]
    return {row["op_name"]: place for place, row in enumerate(reversed(rows), start=1)}


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
    verdict = "The rankings differ" if comparison["differs"] else "The rankings agree"
    lines = [
        "# Two sensitivity reports compared",
        "",
        f"**{verdict}:** Kendall's tau {cell(comparison['tau'])} over {comparison['common']} common ops; batches of one"
        f" run agree by {cell(comparison['noise_tau'])}.",
        "",
        f"Entered the {comparison['top']} most sensitive: {_listed(comparison['entered'])}. Left them:"
        f" {_listed(comparison['left'])}.",
        "",
        f"Only in the first: {_listed(comparison['only_first'])}. Only in the second:"
        f" {_listed(comparison['only_second'])}.",
        "",
        "| changed | first | second |",
        "|---|---|---|",
        *(f"| {cell(row['what'])} | {cell(row['first'])} | {cell(row['second'])} |" for row in comparison["changed"]),
        "",
        f"The farthest of {len(comparison['moved'])} moves, places from 1 at the most sensitive:",
        "",
        "| op_name | first | second |",
        "|---|---:|---:|",
        *(f"| `{cell(row['op_name'])}` | {row['first']} | {row['second']} |" for row in comparison["moved"][:shown]),
    ]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{markdown_cell(name)}`" for name in names) or "none"
