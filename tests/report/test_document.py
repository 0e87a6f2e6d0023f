"""The report ranks by the isolated map, says what each map means, and never gives a number to what did not run."""

import json
import math
import re
from dataclasses import replace
from html import unescape

import pytest
from build import (
    COVERAGE,
    a_calibration_manifest,
    a_capture,
    a_frontier,
    a_model_manifest,
    a_plan,
    a_point,
    a_score,
    an_audit,
    an_op,
    options,
    three_schemes,
    two_units,
    with_estimates,
)
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.decide.ranking import aggregated
from auto_quantize_model.escape import CONTROLS, one_line
from auto_quantize_model.files import InputError, canonical_json
from auto_quantize_model.records import Answers, Excluded, NotMeasured, digest_of_record
from auto_quantize_model.report.document import build_report, markdown_cell, render, tables, top_table

UNMEASURED = NotMeasured("not_measured", "decide.heldout_batches is 0")
PROFILES = build_profiles(UNMEASURED, a_plan(), Target())
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NAMES = ["visual.proj", "layers.0.mlp", "layers.1.mlp", "lm_head"]
ERRORS = dict(zip(NAMES, ((3.0, 1.0), (0.5, 0.5), (0.5, 0.5), (8.0, 4.0)), strict=True))  # on two batches
LEFT_OUT = [{"pattern": "norm|x", "class": "RMSNorm", "count": 1, "weights": 9, "bytes": 36}]
PLAN = {
    "coverage": COVERAGE | {"weights_total": 1000, "weights_planned": 991, "share": 0.991, "left_out": LEFT_OUT},
    "config_digest": "3" * 64,
    "maps": ("isolated", "fallback", "requantize"),
    "excluded": [Excluded("norm|x", "RMSNorm", "kept")],
}


def record(mse_value):
    """What replay measures of one op: a tenth of the error at image tokens."""
    at = {"image_error": mse_value / 10, "text_error": mse_value * 0.9}
    return {"mse_value": mse_value, **at, "divergence": 0.25, "top1_agreement": 0.5}


def parts(
    *,
    stand_in=None,
    rounded=None,
    calibration=None,
    plan=None,
    executions=None,
    scores=None,
    all_int8=(10.0, 10.0),
    audit=None,
    frontier=UNMEASURED,
    target=None,
    **capture,
):
    """What `build_report` takes: four ops on two batches, in three maps.

    Args:
        calibration, plan, audit, capture: what is different in each.
        executions: {op: how often it runs on each batch}, where that is not once.
        scores: {map: {op: a record per batch}}, where they are not those of `ERRORS`.
        all_int8: of each batch, the squared error or the record with every op in INT8.
        frontier, target: what was measured on held-out samples, and what profiles must reach.
    """
    runs = dict.fromkeys(NAMES, (1, 1)) | (executions or {})
    planned = a_plan([an_op(name, executions=runs[name]) for name in NAMES], **PLAN | (plan or {}))
    usual = {name: [record(value) for value in errors] for name, errors in ERRORS.items()}
    measured = {label: usual | (scores or {}).get(label, {}) for label in planned.maps}
    ran = {
        label: {
            name: [found if count else None for found, count in zip(records, runs[name], strict=True)]
            for name, records in of_one.items()
        }
        for label, of_one in measured.items()
    }
    together = [record(value) if isinstance(value, float) else value for value in all_int8]
    return (
        a_model_manifest(stand_in=stand_in, rounded=rounded),
        a_calibration_manifest(**calibration or {}),
        planned,
        a_capture(planned, ran, together, **capture),
        an_audit(**audit or {}),
        frontier,
        build_profiles(frontier, planned, target or Target()),
    )


def by_inc():
    """The scores of `ERRORS` as INC measures them, in every map: it gives no metric but its own."""
    of_one = {name: [{"mse_value": value} for value in errors] for name, errors in ERRORS.items()}
    return dict.fromkeys(PLAN["maps"], of_one)


def test_rank_1_is_the_most_sensitive_op_and_a_running_total_has_no_ranks():
    maps = build_report(*parts())["maps"]
    by_value = ["layers.0.mlp", "layers.1.mlp", "visual.proj", "lm_head"]
    assert [row["op_name"] for row in maps["isolated"]["ops"]] == by_value[::-1]
    assert [row["tied"] for row in maps["isolated"]["ops"]] == [False, False, True, True]
    assert [row["op_name"] for row in maps["fallback"]["ops"]] == by_value
    for label in ("isolated", "fallback"):
        assert [row["rank"] for row in maps[label]["ops"]] == [1, 2, 3, 4]
    assert [row["op_name"] for row in maps["requantize"]["ops"]] == NAMES
    assert [(row["rank"], row["tied"]) for row in maps["requantize"]["ops"]] == [(None, False)] * 4


def test_the_primary_table_runs_from_least_to_most_sensitive_and_says_so():
    markdown, _ = render(build_report(*parts()))
    section = markdown.split("## Isolated map")[1].split("\n## ")[0]
    assert "the last op is the most sensitive, and `rank` counts from the least sensitive op, 1." in section
    rows = [line.split(" | ")[:2] for line in section.splitlines() if re.match(r"\| \d", line)]
    names = ["layers.0.mlp", "layers.1.mlp", "visual.proj", "lm_head"]
    assert rows == [[f"| {rank}", f"`{name}`"] for rank, name in zip(("1 =", "2 =", "3", "4"), names, strict=True)]
    assert "| 1 | `lm_head` |" in markdown.split("## The most sensitive ops")[1].split("\n## ")[0]
    assert "\n| op_name | op_type |" in markdown.split("## Requantize map")[1].split("\n## ")[0]


def test_scores_are_aggregated_over_batches():
    row = build_report(*parts())["maps"]["isolated"]["ops"][0]
    assert row["mse_value"] == 6.0
    assert math.isclose(row["mse_value_std"], math.sqrt(8))
    assert row["relative_error"] == 12 / 2000
    assert math.isclose(row["sqnr_db"], -10 * math.log10(0.006))
    assert math.isclose(row["image_relative_error"], 1.2 / 400)
    assert math.isclose(row["text_relative_error"], 10.8 / 1600)
    assert (row["divergence"], row["top1_agreement"]) == (0.25, 0.5)


def test_the_ten_most_sensitive_come_first():
    report = build_report(*parts())
    assert [row["op_name"] for row in report["most_sensitive"]][:2] == ["lm_head", "visual.proj"]
    assert top_table(report).splitlines()[1].split()[:2] == ["1", "lm_head"]


def test_answers_that_were_not_located_are_a_warning():
    answers = {"calibration": Answers(given=2, located=2), "heldout": Answers(given=8, located=0)}
    report = build_report(*parts(calibration={"answers": answers}))
    assert report["warnings"][0].startswith("Answers were located in 0 of 8 held-out samples; accuracy is measured on")


def test_an_op_that_never_ran_has_a_status_and_no_score():
    report = build_report(*parts(executions={"visual.proj": (0, 0)}, calibration={"text_only": True}))
    assert {op["op_name"]: op["status"] for op in report["ops"]}["visual.proj"] == "not_exercised"
    assert all("visual.proj" not in {row["op_name"] for row in part["ops"]} for part in report["maps"].values())
    markdown, _ = render(report)
    assert "The vision tower was not exercised" in "".join(markdown.splitlines()[:4])


def test_an_op_that_ran_in_one_batch_is_scored_on_that_batch():
    positions = {"image_positions": 0.0, "text_positions": 24.0}
    references = [positions | {"all": size, "image": 0.0, "text": size} for size in (1.0, 50.0)]
    row = aggregated([None, a_score(**record(5.0))], references)
    assert (row["mse_value"], row["relative_error"], row["sqnr_db"]) == (5.0, 0.1, 10.0)
    assert row["image_relative_error"] is None  # no image tokens


def test_what_inc_alone_measured_has_no_other_metrics():
    report = build_report(*parts(scores=by_inc()))
    row = report["maps"]["isolated"]["ops"][0]
    assert row["divergence"] is row["top1_agreement"] is row["image_relative_error"] is None
    assert "| KL (nats) |" not in render(report)[0]


def test_where_both_engines_measured_the_metrics_of_the_replay_are_shown_and_the_others_are_dashes():
    one_by_inc = {"layers.0.mlp": [{"mse_value": 0.5}, {"mse_value": 0.5}]}  # first in the table
    markdown, _ = render(build_report(*parts(scores={"isolated": one_by_inc})))
    table = markdown.split("## Isolated map")[1].split("\n## ")[0]
    first, second = (line for line in table.splitlines() if line[:3] in ("| 1", "| 2"))
    assert first.count("–") == 4 and "0.25" in second


@pytest.mark.parametrize(
    ("reduced", "by", "sentence"),
    [
        (True, "inc", "to 7 bits of 8: Intel Neural Compressor's choice on a CPU without VNNI."),
        (False, "inc", "to all 8 bits: Intel Neural Compressor's choice on a CPU with VNNI."),
        (True, "config", "to 7 bits of 8: set by sensitivity.reduce_range."),
    ],
)
def test_the_head_says_how_many_bits_activations_have_and_who_chose_them(reduced, by, sentence):
    report = build_report(*parts(plan={"reduce_range": reduced, "reduce_range_by": by}))
    markdown, _ = render(report)
    assert f"Activations are quantized {sentence}\n" in markdown.split("## The decision")[0]
    assert report["measurement"]["reduce_range"] is reduced


def test_a_model_that_inc_cannot_measure_is_the_first_warning():
    cannot = {"status": "cannot", "reason": "with no op in INT8, INC's model differs"}
    markdown, _ = render(build_report(*parts(plan={"inc_check": cannot}, audit={"by": "torch"})))
    head = markdown.split("## The decision")[0]
    assert "> **Warning:** Intel Neural Compressor cannot measure this model: with no op in INT8, INC's model" in head
    assert "measured again by torch's own quantized modules in the FP32 model: every one is the same" in head


@pytest.mark.parametrize(
    ("audit", "sentence"),
    [
        ({"status": "bit_identical", "compared": 18}, "18 values (1 op, maps isolated, batch 0) were measured again"),
        ({"status": "not_needed"}, "**Audit:** Not needed: Intel Neural Compressor itself measured every op"),
        (
            {"status": "sites_bit_identical", "rank_agreement": {"isolated": 0.94}},
            "over these ops (batch 0): isolated 0.94.",
        ),
    ],
)
def test_the_audit_stands_in_the_report(audit, sentence):
    markdown, _ = render(build_report(*parts(audit=audit)))
    assert sentence in markdown


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_name(value):
    broken = {"lm_head": [record(8.0), record(4.0) | {"mse_value": value}]}
    with pytest.raises(InputError, match="map fallback, batch 1: the mse_value of lm_head"):
        build_report(*parts(scores={"fallback": broken}))


def test_a_capture_of_another_plan_is_refused():
    with pytest.raises(InputError, match="made from another plan"):
        build_report(*parts(plan_digest="4" * 64))


def test_a_low_all_int8_sqnr_warns_of_the_fallback_map():
    (warning,) = build_report(*parts(all_int8=(900.0, 900.0)))["warnings"]
    assert "fallback map is mostly noise" in warning


def test_an_op_without_error_has_no_sqnr_and_is_still_valid_json():
    report = build_report(*parts(scores={"isolated": {"visual.proj": [record(0.0), record(0.0)]}}))
    assert report["maps"]["isolated"]["ops"][-1]["sqnr_db"] is None
    render(report)


def test_renderings_are_the_same_bytes_each_time_and_the_json_is_the_document():
    report = build_report(*parts())
    assert render(report) == render(build_report(*parts()))
    _, document = render(report)
    assert document == canonical_json(report)
    assert json.loads(document) == report


def test_every_markdown_table_has_as_many_cells_in_each_row_as_in_its_head():
    markdown, _ = render(build_report(*parts()))
    widths = []
    for line in markdown.splitlines():
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
        else:
            assert len(set(widths)) <= 1
            widths = []
    for heading in ("Isolated map", "Fallback map", "Requantize map", "Excluded ops", "Ops not exercised"):
        assert f"## {heading}" in markdown
    assert "the lowest is the most sensitive" in markdown
    assert "\n\n\n\n" not in markdown


STRANGERS = [
    "</code><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![](https://example.org/x.png)",
    "a|b`c\\|d\n\n# Heading",
    "\x1b[31m\u202ered",
    "www.example.org @someone #1 a@example.org",
    "**bold** _soft_ ~~gone~~ $x$ <!--",
]


@pytest.mark.parametrize("text", STRANGERS)
def test_no_text_of_a_stranger_is_markup_in_the_markdown_and_the_json_holds_it_raw(text):
    plain = build_report(*parts(stand_in="STRANGER", rounded="STRANGER"))
    plain["frontier"]["reason"] = "STRANGER"
    for block, key in (
        ("model", "model"),
        ("model", "architecture"),
        ("calibration", "name"),
        ("measurement", "device"),
    ):
        plain[block][key] = "STRANGER"
    plain["profiles"]["missed"] = {"smallest": "STRANGER"}
    plain["audit"] |= {"ops": ["STRANGER"], "maps": ["STRANGER"]}
    plain["versions"] = {"STRANGER": "STRANGER"}
    plain["excluded"] = [dict.fromkeys(("op_name", "op_type", "reason"), "STRANGER")]
    plain["ops"][0] |= {"op_name": "STRANGER", "op_type": "STRANGER", "status": "not_exercised"}
    for rows in (plain["maps"]["isolated"]["ops"], plain["most_sensitive"]):
        rows[0] |= {"op_name": "STRANGER", "op_type": "STRANGER"}
    for batch in plain["batches"]:
        batch["sample_ids"] = ["STRANGER"]
    hostile = json.loads(json.dumps(plain).replace("STRANGER", json.dumps(text)[1:-1]))
    shown_alike(plain, hostile, text, 20)
    assert json.loads(render(hostile)[1])["batches"][0]["sample_ids"] == [text]


@pytest.mark.parametrize("text", STRANGERS)
def test_no_name_of_a_scheme_or_a_unit_is_markup_in_the_markdown(text):
    plain = build_report(*parts(frontier=with_strangers("STRANGER"), target=Target(max_divergence=1)))
    hostile = build_report(*parts(frontier=with_strangers(text), target=Target(max_divergence=1)))
    plain["model"]["stand_in"] = hostile["model"]["stand_in"] = None
    plain["model"]["model"], hostile["model"]["model"] = "STRANGER (stand-in)", f"{text} (stand-in)"
    shown_alike(plain, hostile, text, 8)


def with_strangers(name):
    """A frontier whose units, scheme and control have a name that someone else gave."""
    points = [a_point([name, "unquantized"], 0.01), a_point(["unquantized"] * 2, 0.0)]
    units = [options(unit, **{name: (8, 0.01)}) for unit in (name, "b")]
    return replace(
        a_frontier("", points, [replace(points[0], kind="uniform", name=name)]), units=units, candidates=(name,)
    )


def shown_alike(plain, hostile, text, times):
    """Assert that the Markdown of two reports has the same markup, and that it holds a text and STRANGER alike."""
    rendered = [MARKDOWN.render(render(report)[0]) for report in (plain, hostile)]
    inline = ("<wbr>", "<code>", "</code>")
    tags = [[tag for tag in re.findall("<[^>]*>", html) if tag not in inline] for html in rendered]
    assert tags[0] == tags[1] and rendered[0].count("STRANGER") > times
    # A sentence begins with a capital letter.
    assert html_text(rendered[1]).lower().count(one_line(text).lower()) == rendered[0].count("STRANGER")
    assert "STRANGER (stand-in)</h1>" in rendered[0]
    assert not CONTROLS.search(rendered[1]) and "<script" not in render(hostile)[0]


def html_text(html):
    return unescape(re.sub("<[^>]*>", "", html))


def test_tables_hold_no_formula():
    report = build_report(*parts())
    report["maps"]["isolated"]["ops"][0] |= {"op_name": "=cmd|' /C calc'!A0", "op_type": "+x", "mse_value": -1.0}
    lines = tables(report)["ranking"].to_csv(index=False).splitlines()
    assert lines[1].startswith("1,False,'=cmd|' /C calc'!A0,'+x,-1.0,")


def a_decision(**changes):
    """A report with the frontier of the units a and b, and its profiles."""
    return of_three_schemes(frontier=two_units(**changes), target=Target(max_divergence=0.02, max_bits=15))


def test_a_report_with_a_frontier_matches_its_schema_and_holds_no_value_of_a_sample():
    report = a_decision()
    markdown, document = render(report)
    assert json.loads(document) == report and "divergence_by_sample" not in document and '"assignment"' not in document
    assert [row["name"] for row in report["frontier"]["comparisons"]] == ["random_0", "first and last layers"]
    assert report["frontier"]["prediction"]["compared"] == 5
    assert list(report["profiles"]["profiles"]) == ["smallest", "safest"]
    assert report["profiles"]["profiles"]["smallest"]["kept"] == ["b", "c"]
    assert report["profiles"]["missed"] == {"balanced": "the measured curve has no knee: each byte buys about the same"}


def test_the_markdown_has_the_frontier_its_controls_and_the_scheme_of_each_unit():
    markdown, _ = render(a_decision())
    frontier = markdown.split("## Frontier")[1].split("\n## ")[0]
    assert "a scheme for each of 2 units of ops, measured on 2 held-out samples with 48 tokens" in frontier
    assert "\n| frontier | 2 W8A8 | 8.00 |" in frontier and "\n| random&#95;0 |" in frontier.replace("_", "&#95;")
    assert "\n| frontier | 2 unquantized | 16.00 | 0.000132 | 0 | 0 to 0 |" in frontier
    profiles = markdown.split("## Profiles")[1].split("\n## ")[0]
    assert "\n| smallest | 12.00 |" in profiles and "- balanced: none, because the measured curve" in profiles
    assert "| `a` | W8A8 |\n| `b` | unquantized |\n" in profiles
    widths = [line.count("|") for line in frontier.splitlines() if line.startswith("|")]
    assert len(widths) == 8 and len(set(widths)) == 1


def test_tables_have_a_row_for_each_choice_and_each_profile():
    found = tables(a_decision())
    assert list(found) == ["ranking", "frontier", "profiles"]
    assert list(found["frontier"]["kind"]) == ["frontier"] * 3 + ["uniform", "random", "edges"]
    assert list(found["frontier"]["schemes"][:3]) == ["W8A8:2", "W8A8:1 unquantized:1", "unquantized:2"]
    assert list(found["profiles"]["profile"]) == ["smallest", "safest"]
    assert list(found["profiles"]["kept"]) == ["b c"] * 2
    nothing = tables(of_three_schemes())
    assert nothing["frontier"].empty and nothing["profiles"].empty


def test_a_map_that_was_not_measured_says_so():
    report = build_report(*parts(plan={"maps": ("isolated",)}))
    assert list(report["maps"]) == ["isolated"]
    assert render(report)[0].count("Not measured.") == 2


@given(st.text())
def test_a_cell_never_breaks_its_row(text):
    cell = markdown_cell(text).replace("\\\\", "").replace("\\|", "")
    assert "|" not in cell
    assert "\n" not in cell


def of_three_schemes(made=three_schemes, frontier=UNMEASURED, target=None):
    """A report of three ops in three schemes."""
    plan, capture = made()
    audit = an_audit(served={"W8A8": 5, "NVFP4": 1})
    profiles = build_profiles(frontier, plan, target or Target())
    return build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, audit, frontier, profiles)


def test_schemes_stand_in_tables_with_the_reason_of_each_refusal():
    markdown, _ = render(of_three_schemes())
    assert "| NVFP4 | 2 | 6 | – | – |" in markdown and "| 0.5 | `a` | 5 |" in markdown
    assert "| inc_int8 | W8A8 | 3 | -1 | 3 of 3 |" in markdown
    assert "- 1 op cannot have NVFP4, such as b: its 8 columns do not divide." in markdown
    assert "compressed-tensors gave the same bits on the CPU: 5 values of W8A8 and 1 value of NVFP4." in markdown
    assert "## Schemes" not in render(build_report(*parts()))[0]


def test_an_estimate_is_marked_with_its_error_wherever_it_stands():
    report = of_three_schemes(with_estimates)
    markdown, _ = render(report)
    assert "Of 8 scores of the isolated map 3 were measured. The others are estimates by 16 Fisher probes" in markdown
    assert "| W8A8 | 3 |" in markdown and "| `c` | ≈ 1.5 ± 0.2 |" in markdown
    assert "≈ marks an estimate" in markdown and "`b` | Linear | – | – | – | ≈ 1 ± 0.2 | – |" in markdown
    table = tables(report)["ranking"]
    assert list(table["measured"]) == [True, False, False] and "estimate" not in table["op_name"][0]
    assert "standard_error" in top_table(report) and "False" in top_table(report)
    assert report["stability"]["additivity"] is None


def test_an_audit_of_estimates_says_that_the_replay_measured_for_it():
    plan, capture = with_estimates()
    none = replace(capture, effort=replace(capture.effort, exact="none"))
    documents = a_model_manifest(), a_calibration_manifest(), plan
    sentence = "The scores of these ops alone are estimates, so the replay measured them for the audit."
    for made, said in ((none, True), (capture, False)):
        report = build_report(*documents, made, an_audit(), UNMEASURED, PROFILES)
        assert (sentence in render(report)[0]) == said


def test_one_scheme_with_estimates_says_so_too():
    plan, capture = with_estimates()
    plan = replace(plan, schemes={"inc_int8": {}})
    capture = replace(capture, plan_digest=digest_of_record(plan))
    report = build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, an_audit(), UNMEASURED, PROFILES)
    markdown, _ = render(report)
    assert "Of 3 scores of the isolated map 1 were measured." in markdown and "in INC's order" not in markdown


def test_a_scheme_that_no_op_can_have_has_no_numbers():
    plan, capture = three_schemes()
    ops = tuple(replace(op, schemes=tuple(name for name in op.schemes if name != "NVFP4")) for op in plan.ops)
    plan = replace(plan, ops=ops)
    capture = replace(capture, plan_digest=digest_of_record(plan))
    report = build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, an_audit(), UNMEASURED, PROFILES)
    assert "| NVFP4 | 0 | – | – | – | – | – | – | – |" in render(report)[0]


def test_without_estimates_nothing_speaks_of_errors_of_estimates():
    report = of_three_schemes()
    markdown, _ = render(report)
    assert "Fisher" not in markdown and "≈" not in markdown
    assert not {"measured", "standard_error", "split_half"} & set(tables(report)["ranking"])


def test_a_warning_of_a_checkpoint_is_one_of_the_report():
    plan, capture = three_schemes()
    fields = plan.schemes | {"W8A8": {"warnings": ["the weights of a are scaled"]}}
    plan = replace(plan, schemes=fields)
    capture = replace(capture, plan_digest=digest_of_record(plan))
    report = build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, an_audit(), UNMEASURED, PROFILES)
    assert "W8A8: the weights of a are scaled." in report["warnings"]
