"""Pictures of a report. In: the report. Out: Altair charts, drawn as files or embedded in a page from one source.

Op names are data: they stand in the data of a chart and never in an expression or a field name. Colours of ink and
paper are written as six digits: the page replaces each of them for a dark screen.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from auto_quantize_model.escape import printable_document
from auto_quantize_model.files import atomic_path
from auto_quantize_model.records import Output
from auto_quantize_model.report.coverage import in_bytes
from auto_quantize_model.report.sentences import (
    counted,
    divergence_of,
    heldout,
    in_main,
    mixture_of_units,
    number,
    output,
    percent,
)
from auto_quantize_model.schemes.scheme import INC_INT8

Row = dict[str, Any]
# What `alt.layer` returns, as it is typed.
Panel = alt.LayerChart | alt.FacetChart
TOP = 10
# Colours of Okabe and Ito, which the colour-blind tell apart; each has a shape as well.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F5F5F"
PARTS = {"vision": (BLUE, "circle"), "language": (VERMILION, "triangle-up")}
KINDS = {
    "frontier": ("best for its bytes", BLUE, "circle"),
    "uniform": ("one scheme for all", GREEN, "square"),
    "random": ("random choice", GREY, "diamond"),
    "edges": ("first and last layers first", VERMILION, "triangle-down"),
}
INK, SOFT, PAPER = "#1B1B1B", "#555555", "#FFFFFF"
CONFIG = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "background": PAPER,
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#E6E6E6",
        "labelColor": INK,
        "titleColor": INK,
        "tickColor": "#8A8A8A",
        "domainColor": "#8A8A8A",
    },
    "header": {"labelColor": INK, "labelFontSize": 13, "labelFontWeight": "bold", "titleColor": INK},
    "legend": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 300,
        "labelColor": INK,
        "titleColor": INK,
    },
    "text": {"color": INK},
    "title": {"fontSize": 13, "anchor": "start", "fontWeight": "bold", "color": INK, "subtitleColor": SOFT},
    "view": {"stroke": "#BDBDBD"},
}
NO_RANKING = "The isolated map was not measured, so there is no score of an op alone: add it to sensitivity.maps."
SVG_NAME = re.compile(r'(?<=id=")(?:gradient_|clip)\d+(?=")|(?<=url\(#)(?:gradient_|clip)\d+(?=\))')
IN_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Figure:
    """A chart, its title, and a caption that explains it."""

    title: str
    caption: str
    chart: alt.TopLevelMixin

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The chart as a Vega-Lite specification, made and checked once for all files of a picture."""
        spec: dict[str, Any] = self.chart.to_dict()
        return spec


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """The pictures `heat_map`, `ranked_ops`, `frontier` and `modalities` of a report as `build_report` returns it.

    All four are always there. A picture of something that was not measured says why.
    """
    report = printable_document(report)  # an SVG with a control character cannot be read
    return {draw.__name__: draw(report) for draw in (heat_map, ranked_ops, frontier, modalities)}


def save(figure: Figure, path: Path) -> None:
    """Draw `figure` to `path`, whole or not at all. The suffix decides the format: .svg, or .png at two pixels a unit.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a figure is drawn as .svg or .png")
    with atomic_path(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(renumbered(vl_convert.vegalite_to_svg(figure.spec)), encoding="utf-8")
        else:
            temporary.write_bytes(vl_convert.vegalite_to_png(figure.spec, scale=2))


def renumbered(svg: str) -> str:
    """An SVG whose gradients and clips are numbered from 0, because Vega counts through all drawings of a process."""
    found = dict.fromkeys(re.findall(r'<[^<>]* id="((?:gradient_|clip)\d+)"', svg))
    new = {name: f"{name.rstrip('0123456789')}{index}" for index, name in enumerate(found)}
    # In tags alone: the text between them holds names of ops.
    return re.sub(r"<[^<>]*>", lambda tag: SVG_NAME.sub(lambda name: new.get(name[0], name[0]), tag[0]), svg)


def heat_map(report: dict[str, Any]) -> Figure:
    """Block by projection, with a panel for each stack of blocks and one for all other ops; colour is SQNR in dB."""
    title = f"SQNR of the output with one op in {in_main(report)}"
    if "isolated" not in report["maps"]:
        return finish(report, title, NO_RANKING, None)
    towers, others = cells(report)
    known = [cell["sqnr"] for row in [*towers.values(), others] for cell in row if cell["sqnr"] is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    domain = [low, high] if high > low else [low - 1, low + 1]
    columns = max((len({cell["block"] for cell in tower}) for tower in towers.values()), default=1)
    step = max(10, min(48, 680 // columns))
    labels = [cell["projection"] for tower in towers.values() for cell in tower] + [cell["op"] for cell in others]
    extent = min(360, 12 + 6 * max(map(len, labels)))
    panels = [heat_panel(name, tower, domain, step, extent) for name, tower in towers.items()]
    if others:
        panels.append(heat_panel("", others, domain, 48, extent))
    caption = (
        f"Each cell is one op: the SQNR in dB at the model's output with only that op in {in_main(report)}. Dark cells"
        " are sensitive. Grey cells have no value: the op never ran, adds no error, or was only estimated."
    )
    return finish(report, title, caption, alt.vconcat(*panels, spacing=18))


def places(report: dict[str, Any]) -> dict[str, tuple[str, int, str]]:
    """{op: its stack of blocks, its block, its projection}; a stack has two or more blocks, and is empty without."""
    matches = {op["op_name"]: IN_BLOCK.fullmatch(op["op_name"]) for op in report["ops"]}
    blocks: dict[str, set[str]] = {}
    for match in filter(None, matches.values()):
        blocks.setdefault(match[1], set()).add(match[2])
    return {
        name: (match[1], int(match[2]), match[3]) if match and len(blocks[match[1]]) > 1 else ("", 0, name)
        for name, match in matches.items()
    }


def cells(report: dict[str, Any]) -> tuple[dict[str, list[Row]], list[Row]]:
    """Planned ops by their stack of blocks, and the ops outside of stacks."""
    rows = {row["op_name"]: row for row in report["maps"]["isolated"]["ops"]}
    found, hover = places(report), hover_of(report, len(rows))
    towers: dict[str, list[Row]] = {}
    others: list[Row] = []
    for op in report["ops"]:
        (stack, block, projection), row = found[op["op_name"]], rows.get(op["op_name"])
        value = row["sqnr_db"] if row else None
        cell = {"sqnr": value, "text": f"{value:.1f}" if value is not None else "–"}
        never = {"op": op["op_name"], "type": op["op_type"], "part": op["tower"], "mse_value": "never ran"}
        cell |= hover(row) if row else never
        (towers.setdefault(stack, []) if stack else others).append(cell | {"block": block, "projection": projection})
    return towers, others


def heat_panel(tower: str, found: list[Row], domain: list[float], step: int, extent: int) -> Panel:
    """The panel of one stack of blocks, or of all other ops where `tower` is empty; sizes in pixels."""
    # No sorting: projections keep the plan's order, and a sorted domain would put names into an expression.
    axis = alt.Axis(labelLimit=extent, minExtent=extent, ticks=False, domain=False)
    x_axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, domain=False, labelPadding=4) if tower else None
    base = alt.Chart(alt.Data(values=found)).encode(
        x=alt.X("block:O", title="block", axis=x_axis, scale=alt.Scale(padding=0)),
        y=alt.Y("projection:N", sort=None, title=None, axis=axis, scale=alt.Scale(padding=0)),
        tooltip=tooltip(found),
    )
    legend = alt.Legend(title="SQNR (dB)", format=".3~g", tickCount=6, gradientLength=160, gradientStrokeWidth=0)
    color = alt.Color("sqnr:Q", scale=alt.Scale(scheme="viridis", domain=domain), legend=legend)
    rect = base.mark_rect(stroke=PAPER, strokeWidth=1, invalid=None).encode(
        color=alt.condition("datum.sqnr === null", alt.value("#D9D9D9"), color)
    )
    layers = [rect]
    if step >= 36:
        middle = (domain[0] + domain[1]) / 2
        white = alt.condition(f"datum.sqnr !== null && datum.sqnr < {middle}", alt.value("white"), alt.value("black"))
        layers.append(base.mark_text(fontSize=11).encode(text="text:N", color=white))
    title = f"{found[0]['part'].capitalize()}: {tower}" if tower else "Outside the repeated blocks"
    return alt.layer(*layers).properties(
        width=step * len({cell["block"] for cell in found}),
        height=20 * len({cell["projection"] for cell in found}),
        title=alt.TitleParams(title, frame="group", limit=680),
        view=alt.ViewConfig(stroke=None),
    )


def strips(report: dict[str, Any]) -> Figure:
    """KL divergence of each op alone: a panel for each scheme, a row for each projection, a point for each op."""
    what = output(report)
    title = f"{what.divergence[0].upper()}{what.divergence[1:]} of each op alone, by projection and scheme"
    if "isolated" not in report["maps"]:
        return finish(report, title, NO_RANKING, None)
    schemes = {name: scheme["ops"] for name, scheme in report["schemes"].items()}
    schemes = schemes or {INC_INT8: report["maps"]["isolated"]["ops"]}
    rows = [(scheme, row) for scheme, ops in schemes.items() for row in ops]
    drawn = [(scheme, row) for scheme, row in rows if row["divergence"]]
    if not drawn:
        return finish(report, title, f"No op has a {what.divergence} above 0.", None)
    found = places(report)
    parts, blocks = towers_of(report), dict[str, int]()
    towers: dict[str, set[str]] = {}
    for name, (stack, block, projection) in found.items():
        blocks[stack] = max(block + 1, blocks.get(stack, 0))
        towers.setdefault(projection, set()).add(parts[name])
    points = []
    for scheme, row in drawn:
        stack, block, projection = found[row["op_name"]]
        part = parts[row["op_name"]]
        line = f"{projection} ({part})" if len(towers[projection]) > 1 else projection
        point = {"op": row["op_name"], "scheme": scheme, "part": part, "projection": line}
        point |= {"value": row["divergence"], "kl": divergence_of(row, what.unit), "place": [*schemes].index(scheme)}
        # From 0 to 1: the blocks of a row lie below each other, so that equal values stay apart.
        points.append(point | {"depth": (block + 0.5) / blocks[stack]})
    order = {name: place for place, name in enumerate(found)}
    points.sort(key=lambda point: order[point["op"]])  # rows in the plan's order
    caption = (
        "Each point is one op, quantized alone. The axis is logarithmic and the same in each panel. Within a row the"
        " first block lies at the top and the last at the bottom."
    )
    if missing := len(rows) - len(drawn):
        caption += f" {counted(missing, 'value')} of 0 cannot be drawn."
    values = [point["value"] for point in points]
    return finish(report, title, caption, strip_chart(points, decades(min(values), max(values)), what))


def strip_chart(points: list[Row], domain: list[float], what: Output) -> alt.FacetChart:
    """The panels of `strips`, two in a row."""
    longest = max(len(point["projection"]) for point in points)
    extent = min(300, 12 + 6 * longest)
    color, shape = by_part(points)
    scale, values = alt.Scale(type="log", domain=domain, nice=False), powers(domain)
    every = -(-len(values) // 6)
    axis = alt.Axis(format="~e", values=values[::every], labelFlush=True)
    # No sorting, as in `heat_panel`.
    y_axis = alt.Axis(labelLimit=extent, minExtent=extent, ticks=False, grid=True)
    hints = {"op": "op", "scheme": "scheme", "kl": "divergence"}
    base = alt.Chart(alt.Data(values=points), width=320, height=alt.Step(28)).mark_point(
        filled=True, size=20, opacity=0.8
    )
    encoded = base.encode(
        x=alt.X("value:Q", title=what.heading.replace("KL", "KL divergence"), scale=scale, axis=axis),
        y=alt.Y("projection:N", sort=None, title=None, axis=y_axis),
        yOffset=alt.YOffset("depth:Q", scale=alt.Scale(domain=[-0.25, 1.25])),  # with a gap between rows
        color=color,
        shape=shape,
        tooltip=[alt.Tooltip(field=key, type="nominal", title=name) for key, name in hints.items()],
    )
    facet = alt.Facet("scheme:N", sort=alt.EncodingSortField("place", op="min"), title=None)
    panels: alt.FacetChart = encoded.facet(facet, columns=2, spacing=16)
    return panels


def ranked_ops(report: dict[str, Any]) -> Figure:
    """Every op by its error on a logarithmic axis; above them the ten most sensitive with their names."""
    title = "Error that each op adds, the most sensitive first"
    if "isolated" not in report["maps"]:
        return finish(report, title, NO_RANKING, None)
    rows = report["maps"]["isolated"]["ops"]
    measured = [row for row in rows if row["measured"]]
    drawn = [row for row in measured if row["mse_value"] > 0]
    if not drawn:
        why = "No op adds any error: every mse_value is 0." if measured else "Every op was estimated: no mse_value."
        return finish(report, title, why, None)
    high = max(row["mse_value"] + (row["mse_value_std"] or 0) for row in drawn)
    domain = decades(min(row["mse_value"] for row in drawn), high)
    hover = hover_of(report, len(rows))
    points = [
        hover(row)
        | {
            "rank": row["rank"],
            "value": row["mse_value"],
            "low": max(row["mse_value"] - (row["mse_value_std"] or 0), domain[0]),
            "high": row["mse_value"] + (row["mse_value_std"] or 0),
        }
        for row in drawn
    ]
    spread = any(row["mse_value_std"] for row in drawn)
    parts = by_part(points)  # of all, because both panels share one legend
    named = ranked_panel(points[:TOP], domain, spread, True, parts).properties(
        title=alt.TitleParams(
            f"The {len(points[:TOP])} most sensitive" if len(points) > 1 else "The most sensitive", frame="group"
        ),
        height=22 * len(points[:TOP]),
    )
    whole = ranked_panel(points, domain, spread, False, parts).properties(
        title=alt.TitleParams(of_all(len(rows), len(measured)), frame="group"),
        height=min(380, max(120, 7 * len(points))),
    )
    caption = (
        f"The error that an op adds when only this op is in {in_main(report)}: mse_value, the sum of squared errors at"
        " the model's output. The axis is logarithmic."
    )
    if spread:
        caption += (
            " Bars are ± one standard deviation between batches. A bar that ends at the left edge is cut off there."
        )
    if missing := len(measured) - len(drawn):
        caption += f" {counted(missing, 'op')} without any error cannot be drawn on this axis."
    if estimated := len(rows) - len(measured):
        caption += f" {counted(estimated, 'op')} with an estimate alone {'is' if estimated == 1 else 'are'} not drawn."
    return finish(report, title, caption, alt.vconcat(named, whole, spacing=14))


def of_all(ops: int, measured: int) -> str:
    """The title of a panel with all ops that were measured."""
    if measured < ops:
        return f"The {measured} measured of {ops} ops"
    return "The only op" if ops == 1 else f"All {ops} ops"


def ranked_panel(
    points: list[Row], domain: list[float], spread: bool, named: bool, parts: tuple[alt.Color, alt.Shape]
) -> Panel:
    """Ops from the top down, labelled by their names (`named`) or by their ranks."""
    extent = min(360, 12 + 6 * max(len(point["op"]) for point in points)) if named else 0
    every = next(step for step in (2, 5, 10, 20, 50, 100, 200, 500, len(points)) if len(points) / step <= 9)
    y = (
        alt.Y("op:N", sort=None, title=None, axis=alt.Axis(labelLimit=extent, grid=True, ticks=False))
        if named
        else alt.Y(
            "rank:Q",
            title="rank (1 is the most sensitive)",
            scale=alt.Scale(reverse=True, domain=[0, len(points) + 1], nice=False),
            axis=alt.Axis(values=[1, *range(every, len(points) + 1, every)], format="d"),
        )
    )
    axis = alt.Axis(format="~g", values=powers(domain), labelFlush=False)
    scale = alt.Scale(type="log", domain=domain, nice=False)
    base = alt.Chart(alt.Data(values=points), width=520).encode(y=y)
    value = alt.X("value:Q", scale=scale, axis=axis, title="mse_value (sum of squared errors)")
    color, shape = parts
    dots = base.mark_point(filled=True, size=70 if named else 30, opacity=1).encode(
        x=value, color=color, shape=shape, tooltip=tooltip(points)
    )
    if not spread:
        return alt.layer(dots)
    bars = base.mark_rule(strokeWidth=1.5 if named else 1, opacity=0.55).encode(
        x=alt.X("low:Q", scale=scale, axis=axis, title="mse_value (sum of squared errors)"), x2="high:Q", color=color
    )
    return alt.layer(bars, dots)


def frontier(report: dict[str, Any]) -> Figure:
    """KL divergence on held-out samples over bits a weight: the best choices, and the controls."""
    title = "Loss on held-out samples over the size of a weight"
    found = report["frontier"]
    if found["status"] != "measured":
        return finish(report, title, f"Nothing was measured: {found['reason']}.", None)
    points = frontier_points(report)
    if not points:
        return finish(report, title, "No choice loses anything, so there is no curve to draw.", None)
    named: dict[tuple[float, float], list[str]] = {}
    for name, profile in report["profiles"]["profiles"].items():
        named.setdefault((profile["point"]["bits"], profile["point"]["divergence"]), []).append(name)
    profiles = [{"profile": ", ".join(names), "bits": bits, "kl": kl} for (bits, kl), names in named.items() if kl > 0]
    caption = (
        f"The mixed-precision model, measured on {heldout(report)}: {output(report).divergence} from the unquantized"
        " model, on a logarithmic axis. Bits count scales as well. The line joins the best choices for growing budgets."
        " Bars are 95 % intervals over the samples. A choice without any loss is not drawn."
    )
    return finish(report, title, caption, frontier_chart(points, profiles, output(report)))


def frontier_points(report: dict[str, Any]) -> list[Row]:
    """The choices that lose something, with their texts."""
    points = []
    for point in [*report["frontier"]["controls"], *report["frontier"]["points"]]:  # the frontier lies on top
        if point["divergence"] > 0:
            points.append(
                {
                    "curve": KINDS[point["kind"]][0],
                    "choice": point["name"] or "best for its bytes",
                    "bits": point["bits"],
                    "kl": point["divergence"],
                    # A bar cannot reach 0 on a logarithmic axis.
                    "low": max(point["divergence_low"], point["divergence"] / 10),
                    "high": point["divergence_high"],
                    "bits_text": f"{point['bits']:.2f}",
                    "kl_text": number(point["divergence"], output(report).unit),
                    "units": mixture_of_units(report, point),
                    "weights": in_bytes(point["weight_bytes"], 4),
                    "top1": percent(point["top1_agreement"]),
                    "lost": number(point["answers_lost"]),
                    "accuracy": percent(point["accuracy"]),
                    "sqnr": "no error" if point["sqnr_db"] is None else f"{point['sqnr_db']:.2f} dB",
                }
            )
    return points


def frontier_chart(points: list[Row], profiles: list[Row], what: Output) -> Panel:
    """The line of the frontier, all points with intervals, and the names of the profiles."""
    lowest, highest = min(point["low"] for point in points), max(point["high"] for point in points)
    domain = decades(lowest, highest)
    known = [kind for kind in KINDS.values() if any(point["curve"] == kind[0] for point in points)]
    labels, colors, shapes = (list(column) for column in zip(*known, strict=True))
    legend = alt.Legend(title=None, orient="bottom", columns=4, symbolSize=90, symbolOpacity=1, symbolStrokeWidth=0)
    color = alt.Color("curve:N", scale=alt.Scale(domain=labels, range=colors), legend=legend)
    shape = alt.Shape("curve:N", scale=alt.Scale(domain=labels, range=shapes), legend=legend)
    bits = [point["bits"] for point in points]
    margin = 0.03 * (max(bits) - min(bits)) or 0.5
    wide = alt.Scale(zero=False, domain=[min(bits) - margin, max(bits) + margin], nice=False)
    x = alt.X("bits:Q", title="bits a weight, with scales", scale=wide)
    scale, axis = alt.Scale(type="log", domain=domain, nice=False), alt.Axis(format="~e", values=powers(domain))
    unit = f"{what.unit} per {what.position}".strip()
    title = f"{what.divergence} ({unit}), held-out"
    y = alt.Y("kl:Q", title=title, scale=scale, axis=axis)
    base = alt.Chart(alt.Data(values=points), width=640, height=340).encode(x=x, color=color)
    bars = base.mark_rule(strokeWidth=1.2, opacity=0.5).encode(
        y=alt.Y("low:Q", title=title, scale=scale, axis=axis), y2="high:Q"
    )
    line = base.transform_filter(f"datum.curve === '{KINDS['frontier'][0]}'").mark_line(strokeWidth=2).encode(y=y)
    hints = {
        "curve": "kind",
        "choice": "choice",
        "bits_text": "bits a weight",
        "kl_text": "divergence",
        "top1": "top-1",
    }
    hints |= {
        "lost": "answers lost",
        "accuracy": "answers right",
        "sqnr": "SQNR",
        "units": "units",
        "weights": "weights",
    }
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=y, shape=shape, tooltip=[alt.Tooltip(field=key, type="nominal", title=name) for key, name in hints.items()]
    )
    named = alt.Chart(alt.Data(values=profiles)).encode(x=x, y=y)
    rings = named.mark_point(size=220, color=INK, strokeWidth=1.5, filled=False)
    names = named.mark_text(align="left", baseline="bottom", dx=8, dy=-6, fontSize=11, fontWeight="bold").encode(
        text="profile:N"
    )
    # The page puts the choice of its slider here.
    chosen = alt.Chart(alt.Data(values=[], name="chosen")).mark_point(
        shape="cross", size=160, color=INK, filled=True, opacity=1, clip=True
    )
    return alt.layer(bars, line, dots, rings, names, chosen.encode(x=x, y=y))


def modalities(report: dict[str, Any]) -> Figure:
    """A point for each op: relative error at image tokens over that at text tokens. On the diagonal both are equal."""
    title = "Error at image tokens against error at text tokens"
    if "isolated" not in report["maps"]:
        return finish(report, title, NO_RANKING, None)
    rows = report["maps"]["isolated"]["ops"]
    # The most sensitive op is drawn last, on top of the others.
    pairs = [
        row for row in rows[::-1] if row["image_relative_error"] is not None and row["text_relative_error"] is not None
    ]
    drawn = [row for row in pairs if row["image_relative_error"] > 0 and row["text_relative_error"] > 0]
    if not drawn:
        return finish(report, title, no_modalities(report, pairs), None)
    errors = [row[f"{kind}_relative_error"] for row in drawn for kind in ("image", "text")]
    domain = decades(min(errors), max(errors))
    values, hover = {"image": "image_relative_error", "text": "text_relative_error"}, hover_of(report, len(rows))
    points = [hover(row) | {f"{key}_value": row[name] for key, name in values.items()} for row in drawn]
    ratio = {row["op_name"]: row["image_relative_error"] / row["text_relative_error"] for row in drawn}
    above = sum(value > 1 for value in ratio.values())
    most = max(ratio, key=lambda name: ratio[name])
    caption = (
        f"Each point is one op, with only this op in {in_main(report)}. Above the line, {above} of"
        f" {counted(len(drawn), 'op')} harm image tokens more than text tokens. Errors are relative to the FP32 output"
        f" at the same tokens. The ratio is largest for {most}: {ratio[most]:.3g}."
    )
    if missing := len(rows) - len(drawn):
        caption += f" {counted(missing, 'op')} without a value above 0 on both axes cannot be drawn."
    return finish(report, title, caption, modality_chart(points, domain))


def no_modalities(report: dict[str, Any], pairs: Sequence[Row]) -> str:
    """Why errors at image and text tokens cannot be compared."""
    if not any(batch["image_tokens"] for batch in report["batches"]):
        return "No batch has image tokens, so this picture is empty."
    if not pairs and report["measurement"]["effort"]["probes"]:
        return "Every op was estimated, and estimates do not tell image and text tokens apart."
    if not pairs:
        return (
            "Errors at image and text tokens were not measured: Intel Neural Compressor's engine gives only their sum."
        )
    return "No op has an error above 0 at both image and text tokens."


def modality_chart(points: list[Row], domain: list[float]) -> Panel:
    """The scatter plot, the diagonal, and labels for its two sides."""
    scale = alt.Scale(type="log", domain=domain, nice=False)
    axis = alt.Axis(format="~e", values=powers(domain), labelFlush=False, labelOverlap=True)
    x = alt.X("text_value:Q", scale=scale, axis=axis, title="relative error at text tokens")
    y = alt.Y("image_value:Q", scale=scale, axis=axis, title="relative error at image tokens")
    ends = alt.Data(values=[{"text_value": end, "image_value": end} for end in domain])
    diagonal = alt.Chart(ends).mark_line(color=SOFT, strokeDash=[5, 4], strokeWidth=1).encode(x=x, y=y)
    color, shape = by_part(points)
    dots = (
        alt.Chart(alt.Data(values=points))
        .mark_point(filled=True, size=55, opacity=0.8)
        .encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip(points))
    )
    note = alt.Chart(alt.Data(values=[{}]))
    sides = [
        note.mark_text(align="left", fontSize=12, color=SOFT, text="image tokens harmed more").encode(
            x=alt.value(8), y=alt.value(14)
        ),
        note.mark_text(align="right", fontSize=12, color=SOFT, text="text tokens harmed more").encode(
            x=alt.value(452), y=alt.value(446)
        ),
    ]
    return alt.layer(diagonal, *sides, dots).properties(width=460, height=460)


def by_part(points: Iterable[Row]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape by the model's part, with a legend if there are several parts."""
    parts = [part for part in PARTS if any(point["part"] == part for point in points)]
    legend = alt.Legend(title=None, orient="top", symbolSize=80, symbolOpacity=1) if len(parts) > 1 else None
    colors, shapes = ([PARTS[part][index] for part in parts] for index in range(2))
    return (
        alt.Color("part:N", scale=alt.Scale(domain=parts, range=colors), legend=legend),
        alt.Shape("part:N", scale=alt.Scale(domain=parts, range=shapes), legend=legend),
    )


def hover_of(report: dict[str, Any], ops: int) -> Callable[[Row], Row]:
    """What gives the values of a ranked op for its tooltip, as text that needs no formatting in the browser."""
    towers, unit = towers_of(report), output(report).unit

    def hover(row: Row) -> Row:
        spread = f" ± {row['mse_value_std']:.2g}" if row["mse_value_std"] is not None else ""
        return {
            "op": row["op_name"],
            "type": row["op_type"],
            "part": towers[row["op_name"]],
            "rank_text": f"{row['rank']} of {ops}",
            "mse_value": f"{row['mse_value']:.4g}{spread}" if row["measured"] else "estimated",
            "sqnr_text": of_sqnr(row),
            "kl": divergence_of(row, unit),
            "top1": percent(row["top1_agreement"]),
            "at_image": number(row["image_relative_error"]),
            "at_text": number(row["text_relative_error"]),
        }

    return hover


def towers_of(report: dict[str, Any]) -> dict[str, str]:
    """{op: its tower}."""
    return {op["op_name"]: op["tower"] for op in report["ops"]}


def of_sqnr(row: Row) -> str:
    """The SQNR of an op alone, as text."""
    if row["sqnr_db"] is not None:
        return f"{row['sqnr_db']:.2f} dB"
    return "no error" if row["measured"] else "–"


def tooltip(points: Sequence[Row]) -> list[alt.Tooltip]:
    """The tooltip over what `hover` returns."""
    names = {
        "op": "op",
        "type": "type",
        "rank_text": "rank",
        "mse_value": "mse_value",
        "sqnr_text": "SQNR",
        "kl": "divergence",
    }
    names |= {"top1": "top-1", "at_image": "image error", "at_text": "text error"}
    known = {key: name for key, name in names.items() if any(point.get(key, "–") != "–" for point in points)}
    return [alt.Tooltip(field=key, type="nominal", title=name) for key, name in known.items()]


def decades(low: float, high: float) -> list[float]:
    """The powers of ten around a range, one decade or more."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**bottom, 10.0 ** max(top, bottom + 1)]


def powers(domain: list[float]) -> list[float]:
    """The powers of ten of a range that `decades` returned."""
    bottom, top = (round(math.log10(end)) for end in domain)
    return [10.0**power for power in range(bottom, top + 1)]


def finish(report: dict[str, Any], title: str, caption: str, chart: Any) -> Figure:
    """Title and fonts around a chart; without a chart, the caption is drawn."""
    if chart is None:
        text = alt.Data(values=[{"text": "\n".join(textwrap.wrap(caption, 84))}])
        chart = alt.Chart(text, width=560, height=80, view=alt.ViewConfig(stroke=None))
        chart = chart.mark_text(align="left", baseline="top", fontSize=13, lineBreak="\n", color=INK).encode(
            text="text:N", x=alt.value(0), y=alt.value(10)
        )
    model = report["model"]
    stand_in = ": STAND-IN, not the published weights" if model["stand_in"] else ""
    heading = alt.TitleParams(
        title, subtitle=f"{model['model']}{stand_in}", fontSize=16, subtitleFontSize=12, anchor="start", offset=14
    )
    return Figure(title, caption, chart.properties(title=heading, padding=12).configure(**CONFIG))
