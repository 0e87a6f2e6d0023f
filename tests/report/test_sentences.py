"""The report says in sentences what was measured, what was not, and what speaks against the ranking."""

import pytest
from build import a_frontier, a_point
from test_document import NAMES, of_three_schemes, parts, record
from test_figures import choice, measured, report_of, without_images

from auto_quantize_model.config import Target
from auto_quantize_model.report import sentences
from auto_quantize_model.report.document import build_report, render, tables, top_table


def rendered(report):
    return render(report)[0]


def of_mixed(divergence=0.02, **changes):
    """A frontier of two schemes; its smallest choice mixes both."""
    mixed = ["NVFP4", "NVFP4", "W8A8", "unquantized"]
    points = [a_point(mixed, divergence, **{"accuracy": 0.8, "answers_lost": 1, **changes}), choice(0, 0.0)]
    return measured(points, candidates=("W8A8", "NVFP4"))


def test_the_decision_names_each_scheme_and_says_the_loss_before_the_bytes():
    headline, why = sentences.decision(report_of(of_mixed(weight_bytes=82), Target(max_divergence=0.05)))
    assert headline == "Quantize to 10.00 bits a weight on average: 1 op in W8A8, 2 ops in NVFP4 and 1 unquantized."
    assert why == (
        "Of 9 answers that are right without quantization, 1 is lost (95 % interval 0 to 5). On held-out samples the KL"
        " divergence from the unquantized model is 0.02 nats per token (95 % interval 0.01 to 0.04). The most likely"
        " token stays the same at 90.00 % of the positions. The weights take 82 bytes, 50.00 % of those"
        " without quantization. This is the smallest"
        " measured choice that reaches the target (max_divergence 0.05)."
    )


def test_one_scheme_for_every_op_is_said_in_one_word():
    headline, _ = sentences.decision(report_of(measured(), Target(max_divergence=1)))
    assert headline == "Quantize to W8A8 every op that can have this scheme: 8.00 bits a weight."


@pytest.mark.parametrize(
    ("target", "name", "reason"),
    [
        ({"max_divergence": 0.05, "min_sqnr_db": 3}, "smallest", "(max_divergence 0.05, min_sqnr_db 3)."),
        ({"max_accuracy_drop": 0.0}, "smallest", "that reaches the target (max_accuracy_drop 0)."),
        ({}, "balanced", "This is the knee of the measured curve, beyond which more bytes bring less."),
        ({"max_bits": 12, "max_divergence": 1e-9}, "balanced", "beyond which more bytes bring less."),
    ],
)
def test_the_decision_is_the_first_profile_that_exists_with_its_reason(target, name, reason):
    report = report_of(measured(), Target(**target))
    assert sentences.decided(report)[0] == name
    assert sentences.decision(report)[1].endswith(reason)


def test_a_budget_alone_on_a_straight_curve_decides_by_the_safest():
    points = [choice(4, 0.08), choice(3, 0.04), choice(2, 0.02), choice(0, 0.0)]
    headline, why = sentences.decision(report_of(measured(points), Target(max_weight_bytes=145)))
    assert headline.startswith("Quantize to 10.00 bits a weight")
    assert why.endswith("the measured choice with the least loss within the budget (max_weight_bytes 145).")


def test_where_nothing_is_decided_each_reason_is_said_once():
    assert sentences.decision(report_of()) == (
        "Nothing is decided.",
        "Nothing was measured: decide.heldout_batches is 0.",
    )
    points = [choice(4, 0.08), choice(0, 0.0)]
    headline, why = sentences.decision(report_of(measured(points), Target(max_divergence=0.01)))
    assert headline == "Nothing is decided."
    assert "reaches the target (a divergence of at most 0.01); the best one has a divergence of 0.08" in why
    assert "The measured curve has no knee: each byte buys about the same." in why
    assert "The config's profiles block sets no budget." in why


@pytest.mark.parametrize(
    ("accuracy", "lost", "whole", "sentence"),
    [
        (0.9, 0, 0.9, "Of 9 answers that are right without quantization, none is lost (95 % interval 0 to 4). On"),
        (1.0, 0, 0.9, "without quantization, none is lost (95 % interval 0 to 4). 1 wrong one becomes right. On"),
        (0.7, 3, 0.9, "without quantization, 3 are lost (95 % interval 0 to 7). 1 wrong one becomes right. On"),
        (0.5, 4, 0.9, "Of 9 answers that are right without quantization, 4 are lost (95 % interval 1 to 8). On"),
        (0.4, 0, 0.4, "The unquantized model itself gives only 4 of 10 answers right, too few to judge by."),
    ],
)
def test_answers_are_judged_only_where_the_unquantized_model_has_enough_right(accuracy, lost, whole, sentence):
    points = [choice(4, 0.08, accuracy=accuracy, answers_lost=lost), choice(0, 0.0, accuracy=whole, answers_lost=0)]
    assert sentence in sentences.decision(report_of(measured(points), Target(max_divergence=1)))[1]


def test_a_choice_that_loses_fewer_answers_is_compared_with_the_smallest():
    report = report_of(measured(), Target(max_divergence=0.05))
    assert "The smallest measured choice, with 8.00 bits, loses 1." in sentences.decision(report)[1]


def test_without_answers_nothing_is_said_of_them():
    points = [choice(*pair, accuracy=None, answers_lost=None) for pair in ((4, 0.08), (0, 0.0))]
    report = report_of(measured(points, answers=0), Target(max_divergence=1))
    assert "answer" not in sentences.decision(report)[1] and "answers lost" not in rendered(report)
    assert "| answers lost | answers right |" in rendered(report_of(measured()))


def test_each_profile_has_a_line_and_each_that_is_missing_a_reason():
    assert sentences.of_profiles(report_of(measured(), Target(max_divergence=0.05))) == [
        "smallest: 10.00 bits a weight, 3 ops in W8A8 and 1 unquantized; KL 0.01 nats",
        "balanced: 10.00 bits a weight, 3 ops in W8A8 and 1 unquantized; KL 0.01 nats",
        "safest: none, because the config's profiles block sets no budget",
    ]


def test_the_frontier_is_proved_against_each_kind_of_control():
    found = dict(sentences.proof(report_of(measured())["frontier"]))
    assert found["Against random choices"] == (
        "At equal bytes 1 of 1 random choices loses more than the frontier, beyond the 95 % interval. The median"
        " divergence of these controls is 3 times that of the frontier."
    )
    edges = found["Against choices with the first and last layers first"]
    assert "0 of 1 choices with the first and last layers first" in edges
    assert edges.endswith("1 of them lost less than the frontier, at 12.00 bits.")
    assert found["Predicted"].startswith(
        "Sums of the units' losses order 7 measured choices with a Kendall's tau of 1.00."
    )
    assert "is 1.00 times the sum, as a geometric mean." in found["Predicted"]
    assert sentences.proof(report_of()["frontier"]) == []


def test_without_controls_and_without_predictions_nothing_is_proved():
    points = [choice(4, 0.08), choice(0, 0.0)]
    uniform = [choice(4, 0.08, kind="uniform", name="W8A8")]
    found = measured(points, uniform, loss="relative_error")
    names = [name for name, _ in sentences.proof(report_of(found)["frontier"])]
    assert not [name for name in names if name.startswith("Against")]


BROKEN = {"sqnr_db": 4.0, "top1_agreement": 0.412, "accuracy": 0.1}


def test_a_decided_profile_that_breaks_the_model_is_said_with_values_and_limits():
    works = [record(10.0) | {"top1_agreement": 1.0}] * 2
    points = [choice(4, 0.08, **BROKEN), choice(0, 0.0)]
    report = report_of(measured(points), Target(max_divergence=1), all_int8=works)
    assert sentences.breaks(report) == [
        "The profile smallest breaks the model. The SQNR is 4 dB (limit 10 dB). The most likely token stays the same at"
        " 41.2 % of the positions (limit 75 %). 10.00 % of the answers are right, and 90.00 % without quantization"
        " (limit 75 % of that). Choose a stricter target."
    ]
    assert "\n\n**The profile smallest breaks" in rendered(report)
    report = report_of(measured(), Target(max_divergence=1), all_int8=works)
    assert sentences.breaks(report) == []  # 30 dB, 90 %, 8 answers of 9
    assert not sentences.damages(report, {"sqnr_db": None, "top1_agreement": 1.0, "accuracy": 0.9})


def test_without_held_out_samples_the_calibration_batches_say_whether_int8_breaks_the_model():
    (sentence,) = sentences.breaks(report_of(all_int8=(400.0, 400.0)))
    assert "on the calibration batches). The SQNR is 3.979 dB (limit 10 dB). The most likely" in sentence
    by_inc = {"mse_value": 10.0}  # INC's engine gives no top-1
    assert sentences.breaks(report_of(all_int8=(by_inc, by_inc))) == []


def test_a_fallback_map_on_which_batches_disagree_is_warned_of():
    values = {"visual.proj": (1.0, 4.0), "layers.0.mlp": (2.0, 3.0), "layers.1.mlp": (3.0, 2.0), "lm_head": (4.0, 1.0)}
    fallback = {name: [record(value) for value in pair] for name, pair in values.items()}
    (warning,) = report_of(scores={"fallback": fallback})["warnings"]
    assert "agree on its order with a Kendall's tau of -1.00" in warning


@pytest.mark.parametrize(("maps", "warned"), [(("isolated",), False), (("isolated", "fallback"), True)])
def test_of_a_fallback_map_without_information_is_warned_where_there_is_one(maps, warned):
    found = report_of(plan={"maps": maps}, all_int8=(900.0, 900.0))["warnings"]
    assert any("fallback map is mostly noise" in warning for warning in found) is warned


def test_a_scheme_that_is_far_worse_on_held_out_samples_is_warned_of():
    def warnings(divergence):
        points = [a_point(["W8A8"] * 3, divergence), a_point(["unquantized"] * 3, 0.0)]
        uniform = [a_point(["W8A8"] * 3, divergence, kind="uniform", name="W8A8")]
        return of_three_schemes(frontier=a_frontier("abc", points, uniform))["warnings"]

    assert warnings(20.0) == []  # the scored samples have 6 nats
    assert warnings(25.0) == [
        "W8A8 has a KL divergence of 6 nats on the scored samples and 25 on held-out ones. Raise"
        " calibration.num_samples."
    ]


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
        ({"additivity": 1.0}, 4, "As a sum", "1 times the error with every op quantized: nearly a sum."),
        ({"additivity": 1.0}, 1, "As a sum", None),  # of one op it says nothing
    ],
)
def test_what_is_said_of_the_ranking_fits_what_is_known_of_it(changes, ops, name, sentence):
    found = dict(sentences.between(STABILITY | changes, ops, ops, "KL divergence"))
    assert sentence in found[name] if sentence else name not in found


def test_where_no_op_ran_that_is_said_and_no_map_is_called_unmeasured():
    never = dict.fromkeys(NAMES, (0, 0))
    report = build_report(*parts(executions=never, audit={"ops": (), "compared": 0}))
    assert sentences.certainty(report) == [("Ranking", "No op ran on the scored batches, so there is no ranking.")]
    assert sentences.audited(report) == "Nothing was measured again: no op ran on batch 0."
    assert top_table(report) == "no op ran on the scored batches: no ranking"
    assert "4 ops never ran on the scored batches, so nothing is known of them." in rendered(report)


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
        (Target(max_divergence=1), "", "make quantize PROFILE=smallest"),
        (Target(), "a.yaml b.yaml", 'make quantize PROFILE=balanced CONFIG="a.yaml b.yaml"'),
    ],
)
def test_a_run_ends_with_its_decision_its_page_and_the_next_step(target: Target, configs: str, step: str) -> None:
    found = report_of(measured(), target) | {"warnings": ["Beware."]}
    *warnings, decision, page, last = sentences.closing(found, "page.html", "exports", configs)
    assert warnings[0] == "warning: Beware." and page == "The page: page.html" and last == f"Next: {step}"
    assert decision == f"Decision: {' '.join(sentences.decision(found))}"


def test_a_run_in_another_folder_ends_with_a_command_that_works_there() -> None:
    there = "--snakefile /a/workflow/Snakefile --directory /b"
    lines = sentences.closing(report_of(measured(), Target()), "page.html", "exports", "a.yaml b.yaml", there)
    run = f"snakemake {there} --cores all --configfile a.yaml b.yaml"
    assert lines[-1] == f"Next: {run} --config quantize='{{profile: balanced}}' -- quantize_model"
    last = sentences.closing(report_of(), "page.html", "exports", "", there)[-1]
    assert last.endswith(f"`snakemake {there} --cores all`")


def test_without_a_decision_the_next_step_is_the_config() -> None:
    last = sentences.closing(report_of(), "page.html", "exports", "a.yaml")[-1]
    assert last == "Next: change the config's blocks decide and profiles, then `make run CONFIG=a.yaml`"


def test_where_inc_cannot_quantize_the_model_the_next_step_is_an_export_for_its_int8_alone() -> None:
    int8 = [a_point(["inc_int8"] * 4, 0.01, accuracy=0.9), choice(0, 0.0)]
    for found, step in (
        (measured(int8, candidates=("inc_int8",)), "use an export in exports"),
        (measured(), "make quantize PROFILE=smallest"),
    ):
        report = report_of(found, Target(max_divergence=1))
        report["measurement"]["inc_check"] = {"status": "cannot", "reason": "no reason"}
        assert sentences.closing(report, "page.html", "exports", "")[-1] == f"Next: {step}"


def test_the_most_common_reason_against_a_scheme_is_named_with_an_op():
    refused = {"embed": "no Linear", "a": "its 576 columns", "b": "its 576 columns"}
    assert sentences.cannot("W4A16", refused) == (
        "3 ops cannot have W4A16, such as a: its 576 columns (1 op for other reasons)"
    )
    assert sentences.cannot("W4A16", {"a": "its 576 columns"}) == "1 op cannot have W4A16, such as a: its 576 columns"
