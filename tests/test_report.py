"""The report ranks by the isolated map, says what each map means, and never gives a number to what did not run."""

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.files import InputError, canonical_json, digest_of
from auto_quantize_model.report import build_report, markdown_cell, render, score, top_table

TEMPLATES = Path(__file__).parents[1] / "workflow" / "templates"
NAMES = ["visual.proj", "layers.0.mlp", "layers.1.mlp", "lm_head"]


def parts(**changes):
    """Manifest, calibration manifest, plan and capture of four ops on two batches."""
    observers = {"dtype": "int8", "scheme": "sym", "granularity": "per_channel", "algorithm": "minmax"}
    manifest = {"model": "tiny", "source": "local", "architecture": "Qwen2_5_VL", "digest": "0" * 64, "details": {}}
    sample = {"id": "a|b", "sha256": "1" * 64, "tokens": 24, "image_tokens": 4}
    calibration = {
        "calibration": "set",
        "source": "local",
        "seed": 0,
        "batch_size": 1,
        "text_only": False,
        "digest": "2" * 64,
        "samples": {"calibration": [sample, sample], "heldout": []},
    }
    ops = [
        {"op_name": name, "inc_name": name, "op_type": "Linear", "activation": observers, "weight": observers}
        for name in NAMES
    ]
    plan = {
        "model": "tiny",
        "calibration": "set",
        "config_digest": "3" * 64,
        "maps": ["isolated", "fallback", "requantize"],
        "measured_op": "lm_head",
        "ops": ops,
        "excluded": [{"op_name": "norm|x", "op_type": "RMSNorm", "reason": "kept"}],
    }
    plan.update(changes.pop("plan", {}))
    values = dict(zip(NAMES, ([3.0, 1.0], [0.5, 0.5], [0.5, 0.5], [8.0, 4.0]), strict=True))
    capture = {
        "plan_digest": digest_of(plan),
        "engine": "inc",
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "batches": [
            {
                "batch": index,
                "sample_ids": ["a|b"],
                "tokens": 24,
                "image_tokens": 4,
                "reference_sum_of_squares": 1000.0,
                "all_int8_mse_value": 10.0,
            }
            for index in range(2)
        ],
        "executions": {name: [1, 1] for name in NAMES},
        "maps": {label: copy.deepcopy(values) for label in plan["maps"]},
        "second_pass": [{}, {}],
    }
    capture.update(changes)
    return manifest, calibration, plan, capture


def test_the_primary_table_runs_from_least_to_most_sensitive_with_ties_in_plan_order():
    rows = build_report(*parts())["maps"]["isolated"]["ops"]
    assert [row["op_name"] for row in rows] == ["layers.0.mlp", "layers.1.mlp", "visual.proj", "lm_head"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]


def test_scores_are_aggregated_over_batches():
    row = build_report(*parts())["maps"]["isolated"]["ops"][-1]
    assert row["mse_value"] == 6.0
    assert row["relative_error"] == 12 / 2000
    assert math.isclose(row["sqnr_db"], -10 * math.log10(0.006))


def test_the_ten_most_sensitive_come_first():
    report = build_report(*parts())
    assert [row["op_name"] for row in report["most_sensitive"]][:2] == ["lm_head", "visual.proj"]
    assert top_table(report).splitlines()[1].split()[:2] == ["1", "lm_head"]


def test_an_op_that_never_ran_has_a_status_and_no_score():
    manifest, calibration, plan, capture = parts()
    capture["executions"]["visual.proj"] = [0, 0]
    for per_op in capture["maps"].values():
        per_op["visual.proj"] = [None, None]
    report = build_report(manifest, calibration | {"text_only": True}, plan, capture)
    assert {op["op_name"]: op["status"] for op in report["ops"]}["visual.proj"] == "not_exercised"
    assert all("visual.proj" not in {row["op_name"] for row in part["ops"]} for part in report["maps"].values())
    markdown, _ = render(report, TEMPLATES)
    assert "The vision tower was not exercised" in "".join(markdown.splitlines()[:4])


def test_an_op_that_ran_in_one_batch_is_scored_on_that_batch():
    assert score([None, 5.0], [1.0, 50.0]) == {"mse_value": 5.0, "relative_error": 0.1, "sqnr_db": 10.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_name(value):
    manifest, calibration, plan, capture = parts()
    capture["maps"]["fallback"]["lm_head"][1] = value
    with pytest.raises(InputError, match="map fallback, batch 1: the score of lm_head"):
        build_report(manifest, calibration, plan, capture)


def test_a_capture_of_another_plan_is_refused():
    with pytest.raises(InputError, match="made from another plan"):
        build_report(*parts(plan_digest="4" * 64))


def test_a_low_all_int8_sqnr_warns_of_the_fallback_map():
    manifest, calibration, plan, capture = parts()
    for batch in capture["batches"]:
        batch["all_int8_mse_value"] = 900.0
    (warning,) = build_report(manifest, calibration, plan, capture)["warnings"]
    assert "fallback map is mostly noise" in warning


def test_an_op_without_error_has_no_sqnr_and_is_still_valid_json():
    manifest, calibration, plan, capture = parts()
    capture["maps"]["isolated"]["visual.proj"] = [0.0, 0.0]
    report = build_report(manifest, calibration, plan, capture)
    assert report["maps"]["isolated"]["ops"][0]["sqnr_db"] is None
    render(report, TEMPLATES)


def test_renderings_are_the_same_bytes_each_time_and_the_json_is_the_document():
    report = build_report(*parts())
    assert render(report, TEMPLATES) == render(build_report(*parts()), TEMPLATES)
    _, document = render(report, TEMPLATES)
    assert document == canonical_json(report)
    assert json.loads(document) == report


def test_every_markdown_table_has_as_many_cells_in_each_row_as_in_its_head():
    markdown, _ = render(build_report(*parts()), TEMPLATES)
    widths = []
    for line in markdown.splitlines():
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
        else:
            assert len(set(widths)) <= 1
            widths = []
    for heading in ("Isolated map", "Fallback map", "Requantize map", "Excluded ops", "Ops not exercised"):
        assert f"## {heading}" in markdown
    assert "The lowest is the most sensitive" in markdown
    assert "\n\n\n\n" not in markdown


def test_a_map_that_was_not_measured_says_so():
    manifest, calibration, plan, capture = parts(plan={"maps": ["isolated"]})
    report = build_report(manifest, calibration, plan, capture)
    assert list(report["maps"]) == ["isolated"]
    assert render(report, TEMPLATES)[0].count("Not measured.") == 2


@given(st.text())
def test_a_cell_never_breaks_its_row(text):
    cell = markdown_cell(text).replace("\\\\", "").replace("\\|", "")
    assert "|" not in cell
    assert "\n" not in cell
