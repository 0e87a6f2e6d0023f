"""The report as one HTML file that needs no network. In: the report, and links to what lies beside the page.

Op names are data: markup escapes them, and scripts get them as JSON that cannot end its element.
"""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from auto_quantize_model.figures import figures, number, percent

SHOWN = 12
MAPS = {"isolated": "isolated: the ranking", "fallback": "fallback: the error left", "requantize": "requantize: so far"}


def render_page(report: dict[str, Any], links: dict[str, Any], templates: Path) -> str:
    """The page as HTML, the same for the same inputs.

    Args:
        report: as `build_report` returns it.
        links: {files: {label: path}, exports: {profile: {tool: {files: [path], notes: [text]}}}}; paths are relative to
            the page's folder, and either may be empty.
        templates: the folder with op_sensitivity.html.j2.
    """
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "mb": megabytes}
    environment.filters |= {"csp_hash": csp_hash, "href": href, "breakable": breakable}
    drawn = figures(report)
    specs = {name: figure.chart.to_dict() for name, figure in drawn.items()}
    for spec in specs.values():
        del spec["title"]  # the page has a heading of its own
    return environment.get_template("op_sensitivity.html.j2").render(
        report=report,
        links=links,
        figures=drawn,
        specs=specs,
        maps={name: title for name, title in MAPS.items() if name in report["maps"]},
        not_exercised=[op for op in report["ops"] if op["status"] == "not_exercised"],
        best=report["profiles"]["profiles"].get("recommended"),
        shown=SHOWN,
        states=states(report),
        costs=costs(report),
        certainty=certainty(report),
        bundle=bundle(),
    )


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
    """A relative path as a link; a colon in it is quoted, so that it never is a scheme."""
    return quote(Path(path).as_posix())


def breakable(name: str) -> Markup:
    """A dotted name that a narrow column breaks behind its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))


def relative(path: Path, page: Path) -> str:
    """`path` as seen from the folder of `page`."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def megabytes(value: float) -> str:
    """Bytes as MB, or GB from 1000 MB on."""
    return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"


def states(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured on held-out samples: all ops in INT8, the recommended profile, all ops in FP32 where known."""
    if report["tradeoff"]["status"] != "measured":
        return []
    curve = report["tradeoff"]["curves"]["ranking"]
    found = [{"state": "every op in INT8", **curve[0]}]
    best = report["profiles"]["profiles"].get("recommended")
    if best and best["keep"]:
        found.append({"state": "recommended", **best})
    if curve[-1]["keep"] == report["tradeoff"]["ops"]:
        found.append({"state": "every op in FP32", **curve[-1]})
    return found


def costs(report: dict[str, Any]) -> list[str]:
    """What INT8 and the recommended profile cost, in sentences."""
    known = {state["state"]: state for state in states(report)}
    int8, best, fp32 = (known.get(name) for name in ("every op in INT8", "recommended", "every op in FP32"))
    if int8 is None:
        return without_tradeoff(report["all_int8"])
    found = []
    if best:
        size = f"The recommended profile has {megabytes(best['weight_bytes'])} of weights: "
        size += f"{best['weight_bytes'] / int8['weight_bytes']:.3g} times those of all-INT8"
        if fp32:
            size += f", {percent(best['weight_bytes'] / fp32['weight_bytes'])} of those of FP32"
        found.append(f"{size}.")
    return found + accuracy(report, int8, best, fp32)


def without_tradeoff(all_int8: dict[str, Any]) -> list[str]:
    """What INT8 costs on the calibration batches, where no held-out samples were measured."""
    found = ["What keeping ops costs and buys was not measured; of INT8 itself, the calibration batches say this."]
    top1 = all_int8["top1_agreement"]
    if top1 == 1:
        found.append("INT8 costs nothing measurable in top-1 there: no position's most likely token changes.")
    elif top1 is not None:
        found.append(f"The most likely token is that of FP32 at {percent(top1)} of the positions.")
    sqnr = all_int8["sqnr_db"]
    found.append(
        "With every op in INT8 the output has no error."
        if sqnr is None
        else f"With every op in INT8 the output has an SQNR of {sqnr:.2f} dB."
    )
    return found


def accuracy(
    report: dict[str, Any], int8: dict[str, Any], best: dict[str, Any] | None, fp32: dict[str, Any] | None
) -> list[str]:
    """What INT8 costs in answers and in top-1, in sentences, and whether either can be measured at all."""
    found = []
    answers = report["tradeoff"]["answers"]
    if fp32 and int8["accuracy"] is not None and fp32["accuracy"] is not None:
        right = f"{percent(int8['accuracy'])} of {answers} held-out answers are right with every op in INT8"
        if int8["accuracy"] >= fp32["accuracy"]:
            than = "as many as" if int8["accuracy"] == fp32["accuracy"] else f"{percent(fp32['accuracy'])}"
            found.append(
                f"INT8 costs nothing measurable in accuracy here: {right}, {than} in FP32. The trade-off therefore"
                " shows SQNR, in which there is something to gain."
            )
        else:
            kept = f", {percent(best['accuracy'])} with the recommended profile" if best else ""
            found.append(f"{right}{kept}, {percent(fp32['accuracy'])} in FP32.")
    if int8["top1_agreement"] == 1:
        found.append("It costs nothing measurable in top-1 either way: no position's most likely token changes.")
    else:
        kept = f", with the recommended profile at {percent(best['top1_agreement'])}" if best else ""
        found.append(
            f"The most likely token is that of FP32 at {percent(int8['top1_agreement'])} of the positions with every op"
            f" in INT8{kept}."
        )
    return found


def certainty(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How far the ranking can be trusted: what was looked at, and what it says."""
    found = [("Audit", audited(report["audit"]))]
    found += against_chance(report["tradeoff"])
    trust = report["trust"]
    if trust is None:
        return [*found, ("Ranking", "The isolated map was not measured, so there is none.")]
    if trust["rank_tau"] is None:
        found.append(("Between batches", "Unknown, one batch was scored; raise sensitivity.confidence_batches."))
    else:
        text = f"{trust['batches']} batches agree on the order with a Kendall's tau of {trust['rank_tau']:.2f}"
        text += f" (lowest {trust['rank_tau_lowest']:.2f}; 1 is the same order, 0 is chance)."
        if trust["top_shared"] is not None:
            text += f" {trust['top_shared']} of the {trust['top']} most sensitive ops are the same in every batch."
        found.append(("Between batches", text))
    if trust["metric_tau"] is not None:
        text = f"Squared error and KL divergence order the ops with a tau of {trust['metric_tau']:.2f}."
        found.append(("Between metrics", text))
    if trust["additivity"] is not None:
        text = f"The errors of single ops add up to {trust['additivity']:.3g} times the error with every op in INT8"
        far = abs(trust["additivity"] - 1) > 0.2
        text += "; errors cancel or feed each other, so keep-lists have to be measured." if far else ": nearly a sum."
        found.append(("As a sum", text))
    ties = f"{trust['ties']} ops share their value with another; among them the order is the plan's."
    return [*found, ("Ties", ties if trust["ties"] else "None, every op has a value of its own.")]


def against_chance(tradeoff: dict[str, Any]) -> list[tuple[str, str]]:
    """What the ranking is worth on held-out samples, over other orders in which ops can be kept."""
    if tradeoff["status"] != "measured":
        return []
    others = {"gain_db": "random ones", "gain_over_inverse_db": "the ranking reversed"}
    others |= {"gain_over_weight_bytes_db": "the largest weights first"}
    gains = [f"{tradeoff[key]:+.1f} dB over {name}" for key, name in others.items() if tradeoff[key] is not None]
    if not gains:
        return []
    higher, lengths = tradeoff["above_random"]
    return [
        (
            "Against chance",
            f"Keep-lists along the ranking, on held-out samples and over all lengths: {', '.join(gains)}."
            f" They are better than random ones at {higher} of {lengths} lengths.",
        )
    ]


def audited(audit: dict[str, Any]) -> str:
    """What was measured again, in a sentence."""
    if audit["status"] == "bit_identical":
        return (
            f"{audit['compared']} values ({len(audit['ops'])} ops, batch {audit['batch']}) were measured again by Intel"
            " Neural Compressor's unmodified helpers: every one is the same, bit for bit."
        )
    if audit["status"] == "sites_bit_identical":
        agreement = ", ".join(f"{name} {number(value)}" for name, value in audit["rank_agreement"].items())
        return (
            f"The INT8 outputs of {len(audit['ops'])} ops are the same on this device and on the CPU, bit for bit. Rank"
            f" correlation with Intel Neural Compressor on the CPU: {agreement or 'not computed'}."
        )
    return "Not needed, Intel Neural Compressor itself measured every op."
