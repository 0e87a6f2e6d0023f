"""A report without INC's scheme is of its first scheme, and no sentence in it is about INT8 or INC's measurements."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from build import (
    COVERAGE,
    a_calibration_manifest,
    a_capture,
    a_frontier,
    a_model_manifest,
    a_plan,
    a_point,
    an_audit,
    an_op,
)
from test_document import UNMEASURED, parts
from test_page import BARE, Elements

from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.records import Capture, Plan, Score, digest_of_record
from auto_quantize_model.report import sentences
from auto_quantize_model.report.document import build_report, mismatch, render, tables, top_table
from auto_quantize_model.report.figures import figures
from auto_quantize_model.report.page import render_page

SCHEMES = ("FP8_DYNAMIC", "NVFP4")
KL = {"FP8_DYNAMIC": {"a": 3.0, "b": 2.0, "c": 1.0}, "NVFP4": {"a": 5.0, "b": 0.5, "c": 1.0}}
# What a sentence may say of INC: what its number is, and that it measured nothing.
ALLOWED = (
    "mse_value is INC's number",
    "inc_int8 was not measured, so Intel Neural Compressor measured nothing again",
    "the order of the KL divergence, turned as INC's",
    "INC gives such ops a number without meaning",
)


def planned(**changes: Any) -> Plan:
    ops = [replace(an_op(name, schemes=SCHEMES), inc_int8=None, stored_bytes={}) for name in "abc"]
    fields: dict[str, Any] = {"schemes": dict.fromkeys(SCHEMES, {}), "inc_check": {"status": "not_asked"}}
    fields |= {"config_digest": "3" * 64, "coverage": COVERAGE, "maps": ("isolated", "fallback", "requantize")}
    return a_plan(ops, **fields | changes)


def captured(plan: Plan, **of_all: float) -> Capture:
    """Scores in both schemes; squared errors order the ops otherwise than the KL divergence."""
    record: dict[str, Any] = {"text_error": 1.0, "image_error": 0.5, "top1_agreement": 0.5}
    scores = [
        Score(0, "isolated", scheme, name, 10 - kl, divergence=kl, **record)
        for scheme, of_ops in KL.items()
        for name, kl in of_ops.items()
    ]
    scores += [Score(0, "all", scheme, "", 9.0, divergence=6.0, **record, **of_all) for scheme in SCHEMES]
    return replace(a_capture(plan, {}, [{"mse_value": 1.0}]), scores=tuple(scores), plan_digest=digest_of_record(plan))


def decided() -> Any:
    points = [a_point(["NVFP4", "FP8_DYNAMIC", "unquantized"], 0.02), a_point(["unquantized"] * 3, 0.0)]
    uniform = [a_point([name] * 3, 0.04, kind="uniform", name=name) for name in SCHEMES]
    return a_frontier("abc", points, uniform, candidates=SCHEMES)


def reported(plan: Plan, frontier: Any = UNMEASURED, **of_all: float) -> dict[str, Any]:
    audit = an_audit(status="not_measured", batch=None, ops=(), maps=(), compared=0, served={"FP8_DYNAMIC": 7})
    made = a_model_manifest(), a_calibration_manifest(), plan, captured(plan, **of_all), audit
    return build_report(*made, frontier, build_profiles(frontier, plan, Target(max_divergence=1)))


@pytest.fixture(scope="module", params=["decided", "undecided"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return reported(planned(), decided() if request.param == "decided" else UNMEASURED)


def of_inc(text: str) -> Iterator[str]:
    """What stands around each mention of INT8 or INC, apart from what is allowed."""
    plain = " ".join(re.sub(r"[`*\\]|</?\w+>", "", text).split())
    for allowed in ALLOWED:
        plain = plain.replace(allowed, "")
    plain = plain.replace("neural-compressor", "")
    for found in re.finditer(r"INT8|\bINC\b|Intel|inc_int8|mse_v2", plain):
        yield plain[max(0, found.start() - 60) : found.end() + 40]


def test_the_ranking_is_that_of_the_main_scheme_by_its_divergence(report: dict[str, Any]) -> None:
    assert report["main_scheme"] == "FP8_DYNAMIC" and mismatch(report) is None
    assert [row["op_name"] for row in report["most_sensitive"]] == ["a", "b", "c"]
    assert list(report["maps"]) == ["isolated"]  # `fallback` is not asked for, and `requantize` is INC's
    assert "in FP8_DYNAMIC, all others stay FP32" in report["maps"]["isolated"]["direction"]
    assert list(tables(report)["ranking"]["divergence"]) == [3.0, 2.0, 1.0]
    assert [line.split()[1] for line in top_table(report).splitlines()[1:]] == ["a", "b", "c"]


def test_no_sentence_of_the_markdown_is_about_int8_or_what_inc_measured(report: dict[str, Any]) -> None:
    markdown, document = render(report)
    assert list(of_inc(markdown)) == []
    assert "The sensitivity of each op in FP8" in markdown and "With every planned op in FP8" in markdown
    assert json.loads(document) == json.loads(json.dumps(report))


def test_no_sentence_of_the_page_and_its_pictures_is_about_int8_or_what_inc_measured(report: dict[str, Any]) -> None:
    page = Elements(render_page(report, BARE))
    assert list(of_inc(page.text)) == []
    assert list(of_inc(page.scripts["specs"])) == []
    for name, figure in figures(report).items():
        assert list(of_inc(figure.caption)) == [], name
    captions = " ".join(figure.caption for figure in figures(report).values())
    assert "only that op in FP8_DYNAMIC" in captions and "only this op is in FP8_DYNAMIC" in captions


def test_with_incs_scheme_the_pictures_are_of_int8() -> None:
    made = build_report(*parts())
    captions = " ".join(figure.caption for figure in figures(made).values())
    assert captions.count("in INT8") == 3 and list(of_inc(render(made)[0]))


def test_a_main_scheme_that_breaks_the_model_is_named() -> None:
    plan = planned()
    found = sentences.breaks(reported(plan))
    assert found[0].startswith("FP8_DYNAMIC breaks this model (every op in FP8_DYNAMIC, on the calibration batches).")
    closing = sentences.closing(reported(plan, decided()), "page.html", "exports", "")
    assert list(of_inc(" ".join(closing))) == []


@pytest.mark.parametrize("agreement", [None, 0.96875])
def test_a_column_of_routers_is_there_where_routers_are(agreement: float | None) -> None:
    of_all = {} if agreement is None else {"router_agreement": agreement}
    made = reported(planned(), **of_all)
    assert sentences.has_router(made) == (agreement is not None)
    markdown, _ = render(made)
    page = Elements(render_page(made, BARE)).said()
    for text in (markdown, page):
        assert ("The column router is the share of the routers' choices" in text) == (agreement is not None)
    shown = "| router |" in markdown, "0.9688" in markdown, "96.88 %" in page
    assert set(shown) == {agreement is not None}
    rows = [line for line in markdown.split("## Schemes")[1].split("\n\n")[2].splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
