"""The sentences about causes and cures promise what held-out samples confirm, and nothing else."""

import json
from dataclasses import replace
from typing import Any

import pytest
from build import a_cause, a_cure, a_damage, a_why, two_units
from test_document import parts

from auto_quantize_model.config import Target
from auto_quantize_model.records import Cause, Cured, NotMeasured, Why, body_of
from auto_quantize_model.report import explanations
from auto_quantize_model.report.document import build_report, render
from auto_quantize_model.report.page import render_page

CURED = Cured(("a",), ("a",), 0.04, 0.012, 0.028, 0.02, 0.03)


def report_with(why: Why | NotMeasured) -> dict[str, Any]:
    return build_report(*parts(frontier=two_units(), target=Target(max_divergence=1)), why)


def told(cause: Cause, kind: str) -> str:
    row = body_of(cause)
    return explanations.of_cure(row, next(cure for cure in row["cures"] if cure["kind"] == kind))


def test_a_cure_that_helps_says_how_much_of_the_loss_in_nats_and_decibels_for_how_many_bytes() -> None:
    assert told(a_cause(), "smoothing") == (
        "Smoothing 0.8 regains 0.03 of 0.04 nats (95 % interval 0.025 to 0.035), for 0 bytes. The SQNR regains 5.1 of"
        " the 6.0 dB that the quantized inputs cost. The scale folds into norm."
    )


def test_a_cure_that_does_not_help_on_held_out_samples_is_said_so() -> None:
    assert "MSE ranges of the weight cost 0.01 nats more than the 0.04 before (95 % interval 0.005 to 0.015)" in told(
        a_cause(), "mse_weight"
    )
    assert "Asymmetric inputs show no sure gain on 0.04 nats" in told(a_cause(), "asymmetric_inputs")
    assert told(a_cause(), "percentile_inputs") == (
        "Inputs clipped at the percentile: not applicable, because each input has its own scale, so the calibration"
        " sets no range."
    )


def test_a_scale_without_a_place_says_that_it_costs_time() -> None:
    cost = {"folds_into": "", "extra_bytes": 64, "at_run_time": "the inputs must be multiplied by a scale"}
    cause = a_cause(cures=(a_cure("smoothing", **cost),))
    assert ", for 64 bytes." in told(cause, "smoothing")
    assert told(cause, "smoothing").endswith(" But the inputs must be multiplied by a scale.")


@pytest.mark.parametrize(
    ("sqnr_db", "sentence"),
    [
        (30.01, "The SQNR stays the same."),
        (29.0, "The SQNR falls by 1.0 dB."),
        (33.0, "The SQNR regains 3.0 of the 6.0"),
    ],
)
def test_decibels_are_told_as_they_are(sqnr_db: float, sentence: str) -> None:
    assert sentence in told(a_cause(cures=(a_cure("smoothing", damage=a_damage(0.01, sqnr_db)),)), "smoothing")


def test_the_cause_names_the_side_the_channel_and_the_row() -> None:
    text = " ".join(explanations.of_cause(body_of(a_cause())))
    for part in (
        "Alone in W8A8 the unit costs 0.04 nats on held-out samples and 0.044 on calibration samples.",
        "The profile smallest has the unit in this scheme.",
        "The weight alone costs 0.002 nats and the inputs alone 0.038: the inputs break the unit.",
        "Outlier channels, against the largest magnitude of the median channel: 3 (40 times).",
        "1.00 % of the held-out values lie beyond.",
        "the inputs reach from -1.5 to 1 at image positions and from -1 to 0.5 at text positions.",
        "excess kurtosis of 4, so its tails are heavy. Row 7 of a has the highest, 20.",
    ):
        assert part in text
    alone = body_of(a_cause(inputs_alone=a_damage(0.0, None)))
    assert explanations.of_sides(alone) == "The scheme leaves inputs unquantized, so the weight costs all."


def test_the_report_and_the_page_hold_causes_and_cures() -> None:
    report = report_with(a_why(a_cause(), smallest=CURED))
    markdown, document = render(report)
    assert json.loads(document)["why"]["causes"][0]["inputs"]["outliers"] == [{"index": 3, "ratio": 40.0}]
    assert "### `a` in W8A8" in markdown and "- Smoothing 0.8 regains 0.03 of 0.04 nats" in markdown
    assert "- Without a cure, unquantized takes 8 bytes more and costs 0 nats on calibration samples." in markdown
    whole = "In the whole profile, on all its held-out samples, the cure of a regains 0.028 of 0.04 nats"
    assert whole in markdown
    page = render_page(report, {"files": {}, "exports": {}, "texts": {}})
    assert whole in page and '<section id="why"' in page and 'data-op="a"' in page


def test_what_was_not_explained_has_a_reason() -> None:
    markdown, _ = render(report_with(NotMeasured("not_measured", "the candidate is inc_int8")))
    assert "Not explained: the candidate is inc_int8." in markdown
    assert "No unit loses anything in a candidate scheme" in render(report_with(a_why()))[0]


def test_cures_that_do_not_help_the_whole_are_not_promised() -> None:
    none = explanations.of_cured(body_of(Cured(("a", "b"), (), 0.04)))
    assert none.startswith("Cures help a and b alone. In the whole profile they do not help")
    unsure = explanations.of_cured(body_of(replace(CURED, low=-0.01)))
    assert "shows no sure gain" in unsure and unsure.endswith(", so nothing is exported.")
