"""The report as one HTML file that needs no network. In: the report, and links to the files of the same run.

Op names are data: markup escapes them, and scripts get them as JSON that cannot end its element. The scripts and
`page.css` are put into the page as they are. The page of a comparison is made with them too.
"""

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from auto_quantize_model.escape import printable_document
from auto_quantize_model.records import Output
from auto_quantize_model.report import coverage, explanations, sentences
from auto_quantize_model.report.figures import Figure, figures, strips, towers_of

TEMPLATES = Path(__file__).with_name("templates")
COMMON, ALLOCATE, SCRIPT, STYLE = (
    Path(__file__).with_name(name) for name in ("common.js", "allocate.js", "page.js", "page.css")
)
MAPS = {"isolated": "isolated: the ranking", "fallback": "fallback: the error left", "requantize": "requantize: so far"}


def render_page(report: dict[str, Any], links: dict[str, Any]) -> str:
    """The page as HTML, the same for the same inputs.

    Args:
        report: as `build_report` returns it.
        links: {files: {label: path}, exports: {profile: {tool: {files: [path], notes: [text]}}}, texts: {path: text}}.
            Paths are relative to the page's folder, and each part may be empty. The page shows the text of a path in
            `texts`.
    """
    report, links = printable_document(report), printable_document(links)
    found = figures(report)
    drawn = {"frontier": found["frontier"], "strips": strips(report), "heat_map": found["heat_map"]}
    drawn |= {"ranked_ops": found["ranked_ops"]}
    if sentences.has_images(report):
        drawn["modalities"] = found["modalities"]
    return template("op_sensitivity.html.j2").render(
        report=report,
        links=links,
        figures=drawn,
        specs=specs_of(drawn),
        data=data_of(report),
        maps={name: title for name, title in MAPS.items() if name in report["maps"]},
        not_exercised=[op for op in report["ops"] if op["status"] == "not_exercised"],
        sentences=sentences,
        coverage=coverage,
        explanations=explanations,
        bundle=bundle(),
        script=together(COMMON, ALLOCATE, SCRIPT),
        style=source(STYLE),
    )


def specs_of(drawn: Mapping[str, Figure]) -> dict[str, Any]:
    """The charts as specifications without a title, because the page has a heading for each."""
    return {
        name: {key: value for key, value in figure.spec.items() if key != "title"} for name, figure in drawn.items()
    }


def data_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the page's script computes with and shows."""
    decided = sentences.decided(report)
    linears = [op["op_name"] for op in [*report["ops"], *report["excluded"]] if op["op_type"].endswith("Linear")]
    schemes = {name: {key: found[key] for key in ("ops", "refused")} for name, found in report["schemes"].items()}
    return {
        "model": report["model"]["model"],
        "maps": report["maps"],
        "schemes": schemes,
        "frontier": report["frontier"],
        "profiles": {name: found["point"]["schemes"] for name, found in report["profiles"]["profiles"].items()},
        "decided": decided[0] if decided else None,
        "linears": linears,
        "why": [told(report, cause) for cause in report["why"].get("causes", ())],
        "words": words_of(sentences.output(report)),
        "towers": towers_of(report),
    }


def words_of(output: Output) -> dict[str, str]:
    """The words for the divergence and for what it is measured at."""
    keys = ("divergence", "short", "unit", "heading", "position", "choice")
    return {key: getattr(output, key) for key in keys}


def told(report: dict[str, Any], cause: dict[str, Any]) -> dict[str, Any]:
    """Why a unit breaks, as the panel of one of its ops shows it: sentences, both sides alone, and histograms."""
    more, unit = explanations.instead(report, cause), sentences.output(report).unit
    cures = [explanations.of_cure(cause, cure, unit) for cure in cause["cures"]]
    return {
        "ops": cause["ops"],
        "scheme": cause["scheme"],
        "sentences": explanations.of_cause(cause, unit),
        "sides": {side: explanations.loss_of(cause[side]) for side in ("whole", "weight_alone", "inputs_alone")},
        "cures": [*cures, more] if more else cures,
        "histograms": {side: cause[side]["histogram"] for side in ("inputs", "weight")},
    }


@cache
def template(name: str) -> Template:
    """The template of a page, compiled once."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # schemes keep the config's order
    environment.filters |= {
        "number": sentences.number,
        "percent": sentences.percent,
        "bytes": partial(coverage.in_bytes, digits=4),
        "csp_hash": csp_hash,
        "href": href,
        "breakable": breakable,
        "name": lambda path: Path(path).name,
    }
    return environment.get_template(name)


def source(path: Path) -> Markup:
    """A file of this folder as markup, unchanged: what the page holds is what its hash is computed from."""
    return Markup(path.read_text(encoding="utf-8"))  # noqa: S704  our own source


def together(*scripts: Path) -> Markup:
    """Scripts as one, in a block of its own: the names of the Vega bundle are global."""
    return Markup('"use strict";\n{\n') + Markup("").join(map(source, scripts)) + Markup("}\n")


@cache
def bundle() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script, the versions that draw the files too.

    Raises:
        ValueError: it holds something that would end or change the element that it is put into.
    """
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if any(text in script.lower() for text in ("</script", "<!--", "<script", "\r")):
        raise ValueError("the Vega bundle of this vl-convert cannot stand inside a page; install the locked version")
    return Markup(script)  # noqa: S704  a library's script, checked above


def csp_hash(script: str) -> str:
    """The source expression by which a content security policy allows this inline script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def href(path: str) -> str:
    """A path as a link; a colon in it is quoted, so that it never is a scheme, and two slashes never name a host."""
    return re.sub("^/+", "/", quote(Path(path).as_posix()))


def breakable(name: str) -> Markup:
    """A dotted name that a narrow column breaks behind its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))


def relative(path: Path, page: Path) -> str:
    """`path` as seen from the folder of `page`."""
    return Path(os.path.relpath(path, page.parent)).as_posix()
