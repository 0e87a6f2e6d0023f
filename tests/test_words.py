"""The report says in sentences what was measured, what was not, and what speaks against the ranking."""

import pytest
from test_figures import point, report_of, tradeoff
from test_report import PROFILES, UNMEASURED, parts, record

from auto_quantize_model import words
from auto_quantize_model.profiles import Target
from auto_quantize_model.report import build_report


def said(found):
    return dict(words.certainty(report_of(found)))


def test_a_control_that_does_better_is_named_as_such():
    text = said(tradeoff())["Against chance"]
    assert "+1.5 dB over random ones, +2.5 dB over the ranking reversed, -0.5 dB over the largest weights first" in text
    assert "worse than the largest weights first at 1, 2 kept." in text and "the mean of" not in text
    assert "Against the largest weights first the ranking does not earn its place here." in text


def test_without_a_curve_to_compare_nothing_is_said_of_chance():
    none = dict.fromkeys(("random", "inverse", "weight_bytes"))
    assert "Against chance" not in said(tradeoff(gains_db=none))
    assert words.certainty(report_of())[0][0] == "Between batches"  # no trade-off at all


@pytest.mark.parametrize(("gained", "words_of_it"), [(0.5, "better than"), (-0.5, "no better than")])
def test_the_greedy_refinement_is_judged_against_the_ranking(gained, words_of_it):
    curves = tradeoff()["curves"]
    found = tradeoff(greedy_gain_db=gained, curves=curves | {"greedy": curves["ranking"][:2]})
    text = said(found)["Greedy refinement"]
    assert f"of up to 1 op are {words_of_it} those along the ranking ({gained:+.2f} dB)" in text


def test_the_refinement_helps_where_one_keep_list_of_it_does_better():
    curves = tradeoff()["curves"]
    same = tradeoff(curves=curves | {"greedy": curves["ranking"][:2]})
    assert not words.refinement_helps(report_of(same)) and not words.refinement_helps(report_of(tradeoff()))
    better = [curves["ranking"][0], point(1, 26.0, ["layers.1.mlp"])]
    found = report_of(tradeoff(curves=curves | {"greedy": better}), Target(min_sqnr_db=26))
    assert words.refinement_helps(found)
    assert words.decision(found) == (
        "Keep 1 of 4 ops in FP32.",
        "They are the fewest of the measured keep-lists that reach the target (min_sqnr_db 26), found by the"
        " greedy refinement.",
    )


def test_what_int8_does_on_held_out_samples_stands_beside_what_it_does_on_its_own():
    text = said(tradeoff())["Held-out"]
    assert "an SQNR of 20.00 dB on the scored batches" in text and "(the worst batch 20.00 dB)" in text


def test_a_fallback_map_on_which_batches_disagree_is_warned_of():
    manifest, calibration, plan, capture, audit, *_ = parts()
    values = {"visual.proj": (1.0, 4.0), "layers.0.mlp": (2.0, 3.0), "layers.1.mlp": (3.0, 2.0), "lm_head": (4.0, 1.0)}
    capture["maps"]["fallback"] = {name: [record(value) for value in pair] for name, pair in values.items()}
    (warning,) = build_report(manifest, calibration, plan, capture, audit, UNMEASURED, PROFILES)["warnings"]
    assert "agree on its order with a Kendall's tau of -1.00" in warning


def test_held_out_samples_that_fare_far_worse_are_warned_of():
    found = tradeoff()
    assert report_of(found)["warnings"] == []
    found["curves"]["ranking"][0] |= {"sqnr_db": 13.0}
    (warning,) = report_of(found)["warnings"]
    assert "20.0 dB on the samples that set its scales and 13.0 dB on held-out ones" in warning


@pytest.mark.parametrize(("maps", "warned"), [(["isolated"], False), (["isolated", "fallback"], True)])
def test_of_a_fallback_map_without_information_is_warned_where_there_is_one(maps, warned):
    low = {"mse_value": 900.0, "image_error": 90.0, "text_error": 810.0, "kl_divergence": 1.0, "top1_agreement": 0.1}
    batches = [
        {
            "batch": 0,
            "sample_ids": ["a"],
            "tokens": 24,
            "image_tokens": 4,
            "reference": {"all": 1000.0, "image": 200.0, "text": 800.0},
            "all_int8": low,
        }
    ] * 2
    found = report_of(plan={"maps": maps}, batches=batches)["warnings"]
    assert any("fallback map is mostly noise" in warning for warning in found) is warned
