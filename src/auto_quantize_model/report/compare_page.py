"""A comparison of two reports as one HTML page that needs no network: the verdict, the decisions, and all ranks.

In: the comparison, and the two reports. Out: HTML, made with the style sheet and the scripts of the report's page.
"""

import math
from pathlib import Path
from typing import Any

import altair as alt

from auto_quantize_model.escape import printable_document
from auto_quantize_model.report import compare_text, coverage, sentences
from auto_quantize_model.report.compare import Ranking, rankings
from auto_quantize_model.report.figures import GREY, INK, PAPER, SOFT, VERMILION, Figure, Row, finish, towers_of
from auto_quantize_model.report.page import COMMON, STYLE, bundle, source, specs_of, template, together
from auto_quantize_model.report.sentences import PROFILES

SCRIPT = Path(__file__).with_name("compare.js")
RUNS = ("first", "second")
NAMED = 12  # so many jumped ops get their names in the picture
SIDE = 520  # of the picture, in pixels
LINE = 15  # between the names of two ops, in pixels
ABSENT = "not in this run"
KINDS = ["joined or left the top", "other op"]


def render_comparison(comparison: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> str:
    """The page as HTML, the same for the same inputs.

    Args:
        comparison: as `compare` returns it for the two reports.
        first: a report as `build_report` returns it.
        second: the other one.
    """
    comparison, first, second = (printable_document(document) for document in (comparison, first, second))
    reports = (first, second)
    _, ranks = rankings(first, second)
    drawn = {"ranks": rank_plot(comparison, first, ranks)}
    words, rest, others = compare_text.verdict(comparison, str)
    profiles = [name for name in PROFILES if any(name in report["profiles"]["profiles"] for report in reports)]
    return template("comparison.html.j2").render(
        comparison=comparison,
        reports=dict(zip(RUNS, reports, strict=True)),
        words=words,
        rest=rest,
        others=others,
        profiles=profiles,
        units=units_of(profiles, *reports),
        ops=ops_of(comparison, ranks, towers_of(first) | towers_of(second)),
        candidates=of_candidates(*reports),
        figures=drawn,
        specs=specs_of(drawn),
        compare_text=compare_text,
        coverage=coverage,
        sentences=sentences,
        bundle=bundle(),
        script=together(COMMON, SCRIPT),
        style=source(STYLE),
    )


def of_candidates(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Which schemes each run chose from, and which of them are not in both."""
    sides = [report["frontier"].get("candidates", []) for report in (first, second)]
    found = [
        f"The {name} run chose from {', '.join(side)}." if side else f"The {name} run decided nothing."
        for name, side in zip(RUNS, sides, strict=True)
    ]
    for name, side, other in zip(RUNS, sides, sides[::-1], strict=True):
        if all(sides) and (alone := [scheme for scheme in side if scheme not in other]):
            found.append(f"Candidates of the {name} run alone: {', '.join(alone)}.")
    return found


def units_of(profiles: list[str], first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The units of either run: {name, pairs, differs}. A pair holds a profile's scheme in both runs."""
    sides = []
    for report in (first, second):
        units = [unit["name"] for unit in report["frontier"].get("units", [])]
        chosen = {name: found["point"]["schemes"] for name, found in report["profiles"]["profiles"].items()}
        sides.append(
            {name: dict(zip(units, chosen[name], strict=True)) for name in chosen} | {"": dict.fromkeys(units)}
        )
    found = []
    for unit in dict.fromkeys([*sides[0][""], *sides[1][""]]):
        pairs = [
            [side.get(name, {}).get(unit, "–") if unit in side[""] else ABSENT for side in sides] for name in profiles
        ]
        found.append({"name": unit, "pairs": pairs, "differs": any(one != other for one, other in pairs)})
    return found


def ops_of(comparison: dict[str, Any], ranks: list[Ranking], towers: dict[str, str]) -> list[dict[str, Any]]:
    """All ops of both runs by their rank in the second, with the move; and last the ops of one run alone."""
    moved = {move["op_name"]: move for move in comparison["moved"]}
    found = []
    for name, other in ranks[1].items():
        one = ranks[0][name]
        sides = {"first": one.rank, "second": other.rank, "first_range": one.range, "second_range": other.range}
        beyond = compare_text.BEYOND[moved[name]["beyond_noise"]] if name in moved else "no"
        found.append({"op_name": name, "tower": towers[name], "beyond": beyond, "move": one.rank - other.rank, **sides})
    for run in RUNS:
        for name in comparison[f"only_{run}"]:
            found.append({"op_name": name, "tower": towers[name], "beyond": f"only in the {run} run", "move": None})
    return found


def rank_plot(comparison: dict[str, Any], report: dict[str, Any], ranks: list[Ranking]) -> Figure:
    """The rank in the second run over the rank in the first; the ops that joined or left the top set have names."""
    top, count = comparison["top"], len(ranks[0])
    jumped = {
        move["op_name"]: move
        for move in [*comparison["entered"], *comparison["left"]]
        if move["beyond_noise"] is not False
    }
    largest = sorted(jumped, key=lambda name: -abs(math.log(jumped[name]["first"] / jumped[name]["second"])))[:NAMED]
    points = [
        {
            "op": name,
            "first": ranks[0][name].rank,
            "second": ranks[1][name].rank,
            "kind": KINDS[name not in jumped],
            "size": 110 if name in jumped else 35,
        }
        for name in ranks[0]
    ]
    caption = (
        f"Each point is one of {count} common ops; 1 is the most sensitive, and both axes are logarithmic. On the line"
        f" the rank is the same. The dotted lines are the limits of the {top} most sensitive."
    )
    if jumped:
        caption += " Ops that joined or left these, and not by noise alone, are drawn in colour."
        caption += f" The {NAMED} largest jumps have names." if len(jumped) > NAMED else ""
    else:
        caption += " No op joined or left these beyond the noise."
    names = labels([point for point in points if point["op"] in largest], count)
    chart = rank_chart(points, names, top, count)
    return finish(report, "Rank of each op in both runs", caption, chart)


def labels(points: list[Row], count: int) -> list[Row]:
    """The names of points, each at a height where no other name stands, on the wider side of its point."""
    step = LINE / SIDE * math.log(count + 1)
    found: list[Row] = []
    for point in sorted(points, key=lambda point: point["second"]):
        height = math.log(point["second"])
        if found and height < found[-1]["log"] + step:
            height = found[-1]["log"] + step
        left = math.log(point["first"]) > math.log(count) / 2
        found.append(point | {"log": height, "height": math.exp(height), "left": left})
    return found


def rank_chart(points: list[Row], names: list[Row], top: int, count: int) -> alt.LayerChart:
    """The points, the diagonal, the limits of the top set, and the names."""
    scale = alt.Scale(type="log", domain=[0.9, count * 1.1], nice=False)
    down = alt.Scale(type="log", domain=[0.9, count * 1.1], nice=False, reverse=True)
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if tick <= count]
    axis = alt.Axis(values=ticks, format="d", labelOverlap=True)
    x = alt.X("first:Q", title="rank in the first run", scale=scale, axis=axis)
    y = alt.Y("second:Q", title="rank in the second run", scale=down, axis=axis)
    ends = alt.Data(values=[{"first": end, "second": end} for end in (0.9, count * 1.1)])
    diagonal = alt.Chart(ends).mark_line(color=SOFT, strokeDash=[5, 4], strokeWidth=1).encode(x=x, y=y)
    edge = alt.Chart(alt.Data(values=[{"first": top + 0.5, "second": top + 0.5}] if top < count else []))
    edges = [edge.mark_rule(color=SOFT, strokeDash=[2, 3]).encode(**side) for side in ({"x": x}, {"y": y})]
    legend = alt.Legend(title=None, orient="top", symbolSize=80, symbolOpacity=1, symbolStrokeWidth=0)
    color = alt.Color("kind:N", scale=alt.Scale(domain=KINDS, range=[VERMILION, GREY]), legend=legend)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=["triangle-up", "circle"]), legend=legend)
    size = alt.Size("size:Q", scale=None, legend=None)
    hints = {"op": "op", "first": "first rank", "second": "second rank"}
    dots = (
        alt.Chart(alt.Data(values=points))
        .mark_point(filled=True, opacity=0.8)
        .encode(
            x=x,
            y=y,
            color=color,
            shape=shape,
            size=size,
            tooltip=[alt.Tooltip(field=key, type="nominal", title=name) for key, name in hints.items()],
        )
    )
    # Paper behind a name keeps the name readable where it crosses a point.
    beside = [
        alt.Chart(alt.Data(values=[name for name in names if name["left"] is left]))
        .mark_text(align="right" if left else "left", dx=-10 if left else 10, fontSize=11, **ink)
        .encode(x=x, y=alt.Y("height:Q", title="rank in the second run", scale=down, axis=axis), text="op:N")
        for ink in ({"color": PAPER, "stroke": PAPER, "strokeWidth": 4}, {"color": INK})
        for left in (True, False)
    ]
    return alt.LayerChart(layer=[diagonal, *edges, dots, *beside]).properties(width=SIDE, height=SIDE)
