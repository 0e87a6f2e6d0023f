"""Schemes are compared by the KL divergence of each op alone."""

from build import a_capture, a_plan, three_schemes

from auto_quantize_model.decide.schemes import agreements, of_schemes


def test_an_op_is_ranked_by_kl_in_each_scheme_that_it_can_have() -> None:
    found = of_schemes(*three_schemes())
    assert {name: [row["op_name"] for row in scheme["ops"]] for name, scheme in found.items()} == {
        "inc_int8": ["a", "b", "c"],
        "W8A8": ["c", "b", "a"],
        "NVFP4": ["a", "c"],
    }
    assert [row["rank"] for row in found["W8A8"]["ops"]] == [1, 2, 3]
    assert found["NVFP4"]["all"]["kl_divergence"] == 6.0
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
