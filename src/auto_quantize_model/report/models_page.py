"""The decisions of several runs as one HTML page, without scripts.

In: the reports, each of a model and a calibration set. Out: HTML, made with the style sheet of the report's page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from auto_quantize_model.escape import printable_document
from auto_quantize_model.report import sentences
from auto_quantize_model.report.page import STYLE, source, template


def render_models(reports: Sequence[Mapping[str, Any]], links: Sequence[str]) -> str:
    """The page as HTML, the same for the same inputs.

    Args:
        reports: as `build_report` returns them, one for each run.
        links: the path of each run's own page, relative to this page's folder; empty where there is none.
    """
    runs = [
        {"report": report, "link": link, "uniform": uniform(report)}
        for report, link in zip(map(printable_document, reports), links, strict=True)
    ]
    schemes = list(dict.fromkeys(scheme for run in runs for scheme in run["uniform"]))
    return template("models.html.j2").render(runs=runs, schemes=schemes, sentences=sentences, style=source(STYLE))


def uniform(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The points that have one scheme for every op that can have it, measured on held-out samples, by the scheme."""
    controls = report["frontier"].get("controls", [])
    return {point["name"]: point for point in controls if point["kind"] == "uniform"}
