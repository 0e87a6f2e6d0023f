"""Schemes are compared by the KL divergence of each op alone."""

import math

from build import a_capture, a_plan, three_schemes, with_estimates

from auto_quantize_model.decide.ranking import most_sensitive_first
from auto_quantize_model.decide.schemes import agreements, of_schemes


def test_an_op_is_ranked_by_kl_in_each_scheme_that_it_can_have() -> None:
    found = of_schemes(*three_schemes())
    assert {name: [row["op_name"] for row in scheme["ops"]] for name, scheme in found.items()} == {
        "inc_int8": ["a", "b", "c"],
        "W8A8": ["c", "b", "a"],
        "NVFP4": ["a", "c"],
    }
    assert [row["rank"] for row in found["W8A8"]["ops"]] == [1, 2, 3]
    assert found["NVFP4"]["all"]["divergence"] == 6.0
    assert found["NVFP4"]["refused"] == {"b": "its 8 columns do not divide"} and found["W8A8"]["refused"] == {}


def test_two_schemes_agree_by_kendalls_tau_on_the_ops_that_both_have() -> None:
    found = agreements(of_schemes(*three_schemes()))
    assert [(pair["first"], pair["second"], pair["ops"], pair["tau"]) for pair in found] == [
        ("inc_int8", "W8A8", 3, -1.0),
        ("inc_int8", "NVFP4", 2, 1.0),
        ("W8A8", "NVFP4", 2, -1.0),
    ]
    assert [(pair["top"], pair["top_shared"]) for pair in found] == [(3, 3), (2, 2), (2, 2)]


def test_one_scheme_is_compared_with_nothing() -> None:
    plan = a_plan(["a"])
    assert of_schemes(plan, a_capture(plan, {}, [{"mse_value": 1.0}])) == {} and agreements({}) == []


def test_an_op_without_a_score_is_ranked_by_its_estimate() -> None:
    plan, capture = with_estimates()
    found = of_schemes(plan, capture)
    rows = {row["op_name"]: row for row in found["W8A8"]["ops"]}
    assert list(rows) == ["c", "b", "a"]  # 1.5 and 1 are estimates, 1 is a score
    assert [row["measured"] for row in rows.values()] == [False, False, True]
    assert (rows["c"]["divergence"], rows["c"]["standard_error"], rows["c"]["split_half"]) == (1.5, 0.25, 0.5)
    assert rows["c"]["mse_value"] is rows["a"]["standard_error"] is None
    check = found["W8A8"]["estimates"]
    assert check["compared"] == 1 and math.isclose(check["ratio"], 0.5) and check["tau"] is None
    assert most_sensitive_first(plan, capture) == ["a", "b", "c"]
    assert [pair["ops"] for pair in agreements(found)] == [3, 2, 2]


def test_scores_without_estimates_are_checked_against_nothing() -> None:
    assert {scheme["estimates"] for scheme in of_schemes(*three_schemes()).values()} == {None}
