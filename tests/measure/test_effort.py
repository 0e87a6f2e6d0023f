"""What is measured and what is estimated follows from the config, from the model's size, or from a time budget."""

from dataclasses import replace

import pytest

from auto_quantize_model.measure.effort import CHEAP, Costs, chosen, described_effort, in_words, selected
from auto_quantize_model.records import Effort, Estimate

# 100 isolated states in each of two schemes, which run 50 forwards of a second each.
COSTS = Costs(
    batches=1,
    forward=1.0,
    comparison=0.0,
    isolated=200,
    isolated_forwards=100.0,
    others=2,
    other_forwards=2.0,
    schemes=2,
)


@pytest.mark.parametrize(
    ("exact", "budget", "multiply_adds", "expected"),
    [
        ("all", None, 1e30, ("all", 0)),
        ("none", None, 1.0, ("none", 16)),
        ("top:7", None, 1.0, ("top:7", 16)),
        ("auto", None, CHEAP["cpu"], ("all", 0)),
        ("auto", None, 1.1 * CHEAP["cpu"], ("top:40", 16)),
        ("auto", "104s", 1e30, ("all", 0)),  # 100 s of isolated states and 4 s of others
        (
            "auto",
            "90s",
            1.0,
            ("top:28", 16),
        ),  # 30 s of probes and 4 s of others leave 56 of 100 ops, half near the border
        ("auto", "20s", 1.0, ("top:2", 4)),
        ("auto", "10s", 1.0, ("none", 4)),
        ("none", "10m", 1.0, ("none", 64)),
    ],
)
def test_an_effort_follows_from_the_config_and_the_costs(exact, budget, multiply_adds, expected):
    found = chosen(exact, budget, COSTS, 100, multiply_adds, "cpu")
    assert (found.exact, found.probes) == expected and found.reason


def test_a_gpu_measures_more():
    assert chosen("auto", None, COSTS, 100, 10 * CHEAP["cpu"], "cuda").exact == "all"


def test_a_budget_is_chosen_for_where_nothing_is_to_measure():
    nothing = replace(COSTS, isolated=0, isolated_forwards=0.0, other_forwards=100.0)
    assert chosen("auto", "1s", nothing, 1, 0.0, "cpu").exact == "none"


def test_the_largest_estimates_are_measured_and_those_within_two_standard_errors_of_them():
    made = [
        Estimate("W8A8", name, kl, error, 0.0)
        for name, kl, error in zip("abcde", (9, 8, 7, 6, 1), (0.5,) * 5, strict=True)
    ]
    assert selected(Effort("top:2", 16), made) == {"W8A8": {"a", "b", "c"}}
    wide = [replace(one, standard_error=9.0) for one in made]
    assert selected(Effort("top:2", 16), wide) == {"W8A8": {"a", "b", "c", "d"}}  # no more than twice as many
    assert selected(Effort("none", 16), wide) == {"W8A8": set()}
    assert selected(Effort("top:40", 16), wide) == {"W8A8": set("abcde")}


def test_the_time_is_said_before_the_work():
    text = described_effort(Effort("top:10", 16, "sensitivity.exact"), COSTS, 100)
    assert text == (
        "100 ops in 2 schemes on 1 batch: estimates by 16 probes, then exact scores of the top 10 in each scheme and of"
        " at most as many near them, in about 44 s to 54 s (sensitivity.exact)"
    )
    assert described_effort(Effort("all", 0, "why"), COSTS, 100).endswith(": all scores exactly, in about 2 min (why)")
    assert [in_words(seconds) for seconds in (0.2, 89, 300, 7200)] == ["1 s", "89 s", "5 min", "2.0 h"]
