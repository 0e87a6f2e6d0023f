"""The report says in sentences what was measured, what was not, and what speaks against the ranking."""

import pytest
from build import with_point
from test_document import NAMES, parts, record
from test_figures import point, report_of, tradeoff, with_greedy, without_images

from auto_quantize_model.config import Target
from auto_quantize_model.report import sentences
from auto_quantize_model.report.document import build_report, render, tables, top_table


def said(found):
    return dict(sentences.certainty(report_of(found)))


def test_a_control_that_does_better_is_named_as_such():
    text = said(tradeoff())["Against chance"]
    assert "+1.5 dB over random ones, +2.5 dB over the ranking reversed, -0.5 dB over the largest weights first" in text
    assert "worse than the largest weights first with 1, 2 kept ops." in text and "the mean of" not in text
    assert "In this mean the ranking is not better than the largest weights first." in text


def test_without_a_curve_to_compare_nothing_is_said_of_chance():
    none = dict.fromkeys(("random", "inverse", "weight_bytes"))
    assert "Against chance" not in said(tradeoff(gains_db=none))
    assert sentences.certainty(report_of())[0][0] == "Between batches"  # no trade-off at all


@pytest.mark.parametrize(("gained", "verdict"), [(0.5, "better than"), (-0.5, "not better than")])
def test_the_greedy_refinement_is_judged_against_the_ranking(gained, verdict):
    found = tradeoff(greedy_gain_db=gained)
    text = said(with_greedy(found, found.curves["ranking"][:2]))["Greedy refinement"]
    assert text.startswith("Keep-lists of up to 1 op, chosen op by op on a calibration batch, are")
    assert text.endswith(f"are {verdict} those along the ranking ({gained:+.2f} dB).")


def test_the_refinement_helps_where_one_keep_list_of_it_does_better():
    usual = tradeoff()
    same = with_greedy(usual, usual.curves["ranking"][:2])
    assert not sentences.refinement_helps(report_of(same)) and not sentences.refinement_helps(report_of(usual))
    better = [usual.curves["ranking"][0], point(1, 26.0, ["layers.1.mlp"])]
    found = report_of(with_greedy(usual, better), Target(min_sqnr_db=26))
    assert sentences.refinement_helps(found)
    assert sentences.decision(found) == (
        "Keep 1 of 4 ops in FP32.",
        "This is the shortest measured keep-list that reaches the target (min_sqnr_db 26), found by the greedy"
        " refinement.",
    )


def test_what_int8_does_on_held_out_samples_stands_beside_what_it_does_on_its_own():
    text = said(tradeoff())["Held-out"]
    assert "an SQNR of 20.00 dB on the scored batches" in text and "(the worst batch 20.00 dB)" in text


def test_a_fallback_map_on_which_batches_disagree_is_warned_of():
    values = {"visual.proj": (1.0, 4.0), "layers.0.mlp": (2.0, 3.0), "layers.1.mlp": (3.0, 2.0), "lm_head": (4.0, 1.0)}
    fallback = {name: [record(value) for value in pair] for name, pair in values.items()}
    (warning,) = report_of(scores={"fallback": fallback})["warnings"]
    assert "agree on its order with a Kendall's tau of -1.00" in warning


def test_held_out_samples_that_fare_far_worse_are_warned_of():
    found = tradeoff()
    assert report_of(found)["warnings"] == []
    (warning,) = report_of(with_point(found, "ranking", 0, sqnr_db=13.0))["warnings"]
    assert "20.0 dB on the samples that set its scales and 13.0 dB on held-out ones" in warning


@pytest.mark.parametrize(("maps", "warned"), [(("isolated",), False), (("isolated", "fallback"), True)])
def test_of_a_fallback_map_without_information_is_warned_where_there_is_one(maps, warned):
    found = report_of(plan={"maps": maps}, all_int8=(900.0, 900.0))["warnings"]
    assert any("fallback map is mostly noise" in warning for warning in found) is warned


def with_states(int8=None, fp32=None, **changes):
    """A measured trade-off whose all-INT8 and FP32 states differ as given; the other points as they are."""
    found = tradeoff(**changes)
    for order in found.curves:
        found = with_point(found, order, 0, **int8 or {})
        found = with_point(found, order, -1, **fp32 or {})
    return found


def rendered(report):
    return render(report)[0]


@pytest.mark.parametrize(
    ("int8", "fp32", "answers", "sentence"),
    [
        (0.0, 0.0, 64, "FP32 itself gives 0 of 64 held-out answers right, and INT8 0. These are too few"),
        (0.03125, 0.0, 64, "FP32 itself gives 0 of 64 held-out answers right, and INT8 2. These are too few"),
        (0.0, 0.0625, 64, "FP32 itself gives only 4 of 64 held-out answers right, and INT8 0. These are too few"),
        (1.0, 1.0, 1, "FP32 itself gives only 1 of 1 held-out answer right, and INT8 1. These are too few"),
        (0.5, 0.5, 64, "INT8 costs nothing measurable in accuracy here: 50.00 % of 64"),
        (0.5, 0.5, 64, "as many as in FP32. The trade-off therefore shows the SQNR"),
        (0.75, 0.5, 64, "with every op in INT8, more than the 50.00 % in FP32."),
        (0.5, 0.75, 64, "50.00 % of 64 held-out answers are right with every op in INT8, 75.00 % in FP32."),
    ],
)
def test_the_accuracy_is_judged_only_where_fp32_answers_enough_right(int8, fp32, answers, sentence):
    found = with_states({"accuracy": int8}, {"accuracy": fp32}, answers=answers)
    said_of_it = " ".join(sentences.costs(report_of(found)))
    assert sentence in said_of_it
    assert ("nothing measurable in accuracy" in said_of_it) is (int8 >= fp32 and fp32 * answers >= sentences.FEW_RIGHT)


def test_equal_answers_do_not_hide_a_broken_output():
    found = with_states({"accuracy": 0.9, "sqnr_db": 4.0, "top1_agreement": 0.4}, {"accuracy": 0.9})
    assert "as many as in FP32. The answers do not show how much INT8 changes the output." in " ".join(
        sentences.costs(report_of(found))
    )


def test_without_any_error_there_is_nothing_to_gain_in_sqnr():
    found = with_states({"sqnr_db": None, "relative_error": 0.0, "accuracy": 0.9, "top1_agreement": 1.0})
    said = sentences.costs(report_of(found))
    assert said[0].endswith("as many as in FP32.")
    assert said[1] == "INT8 costs nothing measurable in top-1 here: no position's most likely token changes."


BROKEN = {"sqnr_db": 4.0, "relative_error": 0.398, "top1_agreement": 0.412, "accuracy": 0.1}


def test_that_int8_breaks_the_model_is_said_with_values_and_limits():
    report = report_of(with_states(BROKEN), Target(min_sqnr_db=45))
    assert sentences.breaks(report) == [
        "INT8 breaks this model (every op in INT8, on held-out samples). The SQNR is 4 dB (limit 10 dB). The most"
        " likely token stays the same at 41.2 % of the positions (limit 75 %). 10.00 % of the answers are right, in"
        " FP32 90.00 % (limit 75 % of that)."
    ]
    assert "\n\n**INT8 breaks this model (every op" in rendered(report)
    assert (
        sentences.breaks(report_of(tradeoff(), Target(min_sqnr_db=45))) == []
    )  # 20 dB, 75 %, 80 % where FP32 has 90 %


def test_a_target_that_a_broken_model_reaches_is_said_to_be_too_low():
    report = report_of(with_states(BROKEN), Target(min_sqnr_db=3))
    assert sentences.decision(report)[0] == "Keep nothing: INT8 reaches the target as it is."
    assert sentences.breaks(report)[1] == "The target is too loose to show that: choose a stricter one."
    low = with_states(BROKEN)
    low = with_point(low, "ranking", 1, sqnr_db=9.0, relative_error=10**-0.9)
    low = with_point(low, "weight_bytes", 1, sqnr_db=8.0, relative_error=10**-0.8)
    report = report_of(low, Target(min_sqnr_db=8.5))
    assert sentences.breaks(report)[1] == (
        "The recommended profile does not repair that. The SQNR is 9 dB (limit 10 dB). Choose a stricter target."
    )


def test_without_held_out_samples_the_calibration_batches_say_whether_int8_breaks_the_model():
    (sentence,) = sentences.breaks(report_of(all_int8=(400.0, 400.0)))
    assert "on the calibration batches). The SQNR is 3.979 dB (limit 10 dB). The most likely" in sentence
    by_inc = {"mse_value": 10.0}  # INC's engine gives no top-1
    assert sentences.breaks(report_of(all_int8=(by_inc, by_inc))) == []


CURVE = [point(0, 4.0), point(1, 10.0, ["a"]), point(2, 14.0, ["b"]), point(3, 15.0, ["c"]), point(4, 15.5, ["d"])]
CURVE += [point(6, 30.0, ["e", "f"]), point(8, None, ["g", "h"])]


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        (
            {"min_sqnr_db": 45.0},
            "keep-list nearest to the target keeps 6 of 8 ops, along the ranking. It has an SQNR of 30.00 dB"
            " and misses the target by 15 dB.",
        ),
        (
            {"min_sqnr_db": 45.0, "max_weight_bytes": 3000},
            "keep-list nearest to the target keeps 2 of 8 ops, along the ranking. It has an SQNR of 14.00 dB"
            " and misses the target by 31 dB.",
        ),
        (
            {"max_weight_bytes": 100},
            "keep-list nearest to the target keeps no op. It has an SQNR of 4.00 dB and misses the target by 0.0009"
            " MB.",
        ),
        (
            {"max_accuracy_drop": 0.0},
            "keep-list nearest to the target keeps 1 of 8 ops, along the ranking. It has an SQNR of 10.00 dB"
            " and misses the target by 5 percentage points of accuracy.",
        ),
    ],
)
def test_where_the_target_is_missed_the_nearest_list_and_the_knee_are_given(target, nearest):
    found = with_states(None, {"accuracy": 0.95}, curve=CURVE)
    report = report_of(found, Target(**target))
    headline, why = sentences.decision(report)
    assert headline == "No profile is recommended." and nearest in why
    assert why.endswith(
        "The knee of the measured curve is at 2 ops of 8, along the ranking. There the output has an SQNR of 14.00 dB,"
        " 10.00 dB more than with every op in INT8. Each further doubling of the list gains less."
    )
    assert "\nThe ops kept at the knee:\n\n1. `a`\n2. `b`\n" in rendered(report)
    assert "| 8 | `h` | 0.009 | no error | no error | no error |" in rendered(report)


def test_without_a_target_the_knee_is_given_and_nothing_is_missed():
    report = report_of(tradeoff(CURVE))
    assert sentences.decision(report)[1].startswith(
        "The config's profiles block sets no target. The knee of the measured"
    )
    assert "nearest" not in sentences.decision(report)[1]


def test_a_drop_of_accuracy_is_not_asked_of_a_model_that_answers_nothing_right():
    found = with_states({"accuracy": 0.0}, {"accuracy": 0.0})
    headline, why = sentences.decision(report_of(found, Target(max_accuracy_drop=0.01)))
    assert headline == "No profile is recommended."
    assert why.startswith("FP32 itself answers no held-out sample right, so no drop shows")


def test_a_byte_budget_says_its_bytes_and_that_keeping_nothing_is_best_within_it():
    report = report_of(tradeoff(), Target(max_weight_bytes=1_234_567))
    assert "(max_weight_bytes 1234567)" in sentences.decision(report)[1]
    report = report_of(tradeoff(), Target(max_weight_bytes=1999))
    assert sentences.decision(report)[0].startswith(
        "Keep nothing: no measured keep-list within the budget has less error"
    )


def test_a_profile_worse_than_all_int8_in_another_metric_is_remarked_where_it_stands():
    found = with_point(tradeoff(), "ranking", 1, top1_agreement=0.7, kl_divergence=0.500001)
    found = with_point(found, "weight_bytes", 1, relative_error=0.5)
    report = report_of(found, Target(min_sqnr_db=24))
    sentence = "is worse than all-INT8 in top-1 (0.7, all-INT8 0.75) and KL divergence (0.500001, all-INT8 0.5)."
    assert f"recommended {sentence}" in sentences.remarks(report)
    assert report["profiles"]["profiles"]["recommended"]["worse"] == {"top1_agreement": 0.75, "kl_divergence": 0.5}
    assert f"\n- recommended {sentence}\n" in rendered(report)
    assert sentences.remarks(report_of(tradeoff(), Target(min_sqnr_db=24))) == []


def test_a_text_model_has_no_columns_of_images():
    report = without_images()
    markdown = rendered(report)
    assert ", with 48 tokens." in markdown and "image token" not in markdown
    assert "image error" not in markdown.lower()
    assert ", with 8 image tokens among 48." in rendered(report_of())
    assert "| KL (nats) | top-1 |\n" in markdown
    assert not {"image_relative_error", "text_relative_error"} & set(tables(report)["ranking"])
    assert {"image_relative_error", "text_relative_error"} < set(tables(report_of())["ranking"])
    assert "| image error | text error |" in rendered(report_of())


STABILITY = {"batches": 2, "rank_tau": 0.9, "rank_tau_lowest": 0.9, "top": 1, "top_shared": 1, "ties": 0}
STABILITY |= {"metric_tau": None, "additivity": None}


@pytest.mark.parametrize(
    ("changes", "ops", "name", "sentence"),
    [
        (
            {},
            4,
            "Between batches",
            "0.90 (1 is the same order, 0 is chance). The most sensitive op is the same in every",
        ),
        ({"top_shared": 0}, 4, "Between batches", "The most sensitive op is not the same in every batch."),
        ({"batches": 3, "rank_tau_lowest": 0.5}, 4, "Between batches", "(lowest 0.50; 1 is the same order"),
        ({"rank_tau": -0.001}, 4, "Between batches", "a Kendall's tau of 0.00 ("),
        ({"rank_tau": None}, 4, "Between batches", "Unknown: fewer than two ops ran in every batch, or"),
        ({"rank_tau": None, "batches": 1}, 4, "Between batches", "Unknown, because only one batch was scored; raise"),
        ({"ties": 4}, 4, "Ties", "4 of 4 ops share their value with another"),
        ({"additivity": 1.0}, 4, "As a sum", "1 times the error with every op in INT8: nearly a sum."),
        ({"additivity": 1.0}, 1, "As a sum", None),  # of one op it says nothing
    ],
)
def test_what_is_said_of_the_ranking_fits_what_is_known_of_it(changes, ops, name, sentence):
    found = dict(sentences.between(STABILITY | changes, ops, ops))
    assert sentence in found[name] if sentence else name not in found


def test_where_no_op_ran_that_is_said_and_no_map_is_called_unmeasured():
    never = dict.fromkeys(NAMES, (0, 0))
    report = build_report(*parts(executions=never, audit={"ops": (), "compared": 0}))
    assert sentences.certainty(report) == [("Ranking", "No op ran on the scored batches, so there is no ranking.")]
    assert sentences.audited(report) == "Nothing was measured again: no op ran on batch 0."
    assert top_table(report) == "no op ran on the scored batches: no ranking"
    assert "4 ops never ran on the scored batches, so nothing is known of them." in rendered(report)


def test_gains_that_round_to_nothing_are_none():
    text = said(tradeoff(gains_db={"random": 0.04, "inverse": -0.04, "weight_bytes": 2.0}))["Against chance"]
    assert "+0.0 dB over random ones, +0.0 dB over the ranking reversed, +2.0 dB over the largest" in text
    assert "In this mean the ranking is not better than random ones and the ranking reversed." in text


def test_one_batch_has_no_worst_one():
    assert "worst batch" not in said(tradeoff(batches=1))["Held-out"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100.00 %"), (0.99999, "over 99.99 %"), (0.00001, "under 0.01 %"), (0.0, "0.00 %"), (None, "–")],
)
def test_a_share_is_rounded_to_all_or_nothing_only_where_it_is(value, text):
    assert sentences.percent(value) == text


def test_numbers_that_are_compared_have_the_digits_that_tell_them_apart():
    assert sentences.apart(9.99996, 10.0) == ("9.99996", "10")
    assert sentences.apart(0.5, 0.5) == ("0.5", "0.5")


@pytest.mark.parametrize(
    ("target", "configs", "step"),
    [
        (Target(min_sqnr_db=26), "", "make quantize PROFILE=recommended"),
        (Target(min_sqnr_db=26), "a.yaml b.yaml", 'make quantize PROFILE=recommended CONFIG="a.yaml b.yaml"'),
        (
            Target(min_sqnr_db=999),
            "a.yaml",
            "change the target in the config's profiles block, then `make run CONFIG=a.yaml`",
        ),
    ],
)
def test_a_run_ends_with_its_decision_its_page_and_the_next_step(target: Target, configs: str, step: str) -> None:
    found = report_of(tradeoff(), target) | {"warnings": ["Beware."]}
    *warnings, decision, page, last = sentences.closing(found, "page.html", "exports", configs)
    assert warnings[0] == "warning: Beware." and page == "The page: page.html" and last == f"Next: {step}"
    assert decision == f"Decision: {' '.join(sentences.decision(found))}"


def test_where_inc_cannot_quantize_the_model_the_next_step_is_an_export() -> None:
    found = report_of(tradeoff(), Target(min_sqnr_db=26))
    found["measurement"]["inc_check"] = {"status": "cannot", "reason": "no reason"}
    assert sentences.closing(found, "page.html", "exports", "")[-1] == "Next: use an export in exports"


def test_the_most_common_reason_against_a_scheme_is_named_with_an_op():
    refused = {"embed": "no Linear", "a": "its 576 columns", "b": "its 576 columns"}
    assert sentences.cannot("W4A16", refused) == (
        "3 ops cannot have W4A16, such as a: its 576 columns (1 op for other reasons)"
    )
    assert sentences.cannot("W4A16", {"a": "its 576 columns"}) == "1 op cannot have W4A16, such as a: its 576 columns"
