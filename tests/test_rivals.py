"""The comparison with rivals: bytes, partners, what is kept, and the table."""

from types import SimpleNamespace

import pytest
import rivals

from auto_quantize_model.files import InputError, write_json
from auto_quantize_model.records import Options

SIZES = {"NVFP4": 57, "FP8_DYNAMIC": 101, "unquantized": 200}  # of 100 weights


def space() -> rivals.Space:
    """Two units: `a` and `b` together, and `c`, whose loss is the larger one."""
    losses = {"a+b": {"NVFP4": 0.1, "FP8_DYNAMIC": 0.01, "unquantized": 0.0}}
    losses["c"] = {scheme: 5 * loss for scheme, loss in losses["a+b"].items()}
    units = [
        Options(name, tuple(names), 100 * len(names), {key: len(names) * size for key, size in SIZES.items()}, loss, {})
        for name, names, loss in (("a+b", "ab", losses["a+b"]), ("c", "c", losses["c"]))
    ]
    ops = [SimpleNamespace(op_name=name, stored_bytes=SIZES, weight_bytes=400) for name in "abc"]
    return rivals.Space(SimpleNamespace(ops=ops), units)


def test_a_state_takes_the_bytes_of_its_options():
    state = {"a": "NVFP4", "b": "NVFP4"}
    assert space().bytes(state) == 2 * 57 + 200
    assert space().bits(state) == pytest.approx(8 * 314 / 300)
    assert space().state(("NVFP4", "unquantized")) == state


def test_a_unit_in_two_schemes_has_no_predicted_loss():
    assert space().predicted({"a": "NVFP4", "b": "NVFP4", "c": "NVFP4"}) == pytest.approx(0.6)
    assert space().predicted({"a": "NVFP4"}) is None


def test_this_project_takes_no_more_bytes_than_any_rival():
    few, many = {"a": "NVFP4", "b": "NVFP4", "c": "NVFP4"}, {"a": "FP8_DYNAMIC", "b": "FP8_DYNAMIC", "c": "NVFP4"}
    found = {"32": {"choices": {"5.0": few, "6.0": many}, "seconds": 7.0}}
    assert space().sizes([found]) == {"5.0": 3 * 57, "6.0": int(6.0 * 300 / 8)}
    assert space().sizes([]) == {"5.0": int(5.0 * 300 / 8), "6.0": int(6.0 * 300 / 8)}


def test_a_rival_is_compared_with_this_projects_choice_for_the_budget():
    choice, own = {"a": "FP8_DYNAMIC", "b": "FP8_DYNAMIC", "c": "NVFP4"}, {"c": "FP8_DYNAMIC"}
    found = {"32": {"choices": {"5.0": choice}, "seconds": 7.0}}
    (method,) = space().by_rival("rival", found, {5.0: own, 6.0: {}})
    assert (method.budget, method.samples, method.seconds, method.state) == (5.0, 32, 7.0, choice)
    assert method.partner == own


def test_rules_without_a_budget_have_no_partner():
    rules = space().by_rules({5.0: {"c": "NVFP4"}, 6.0: {}})
    assert {rule.name: rule.partner for rule in rules if rule.budget is None} == dict.fromkeys(
        ("all NVFP4", "all FP8_DYNAMIC")
    )
    assert {rule.budget for rule in rules if rule.partner == {"c": "NVFP4"}} == {5.0}


def test_a_rival_that_quantizes_another_module_is_refused():
    with pytest.raises(InputError, match="rival quantized lm_head"):
        space().by_rival("rival", {"32": {"choices": {"5.0": {"lm_head": "NVFP4"}}, "seconds": 7.0}}, {})


def test_the_same_task_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "FOLDER", tmp_path)
    done = []

    def make(of, made):
        done.append(of)
        write_json(made, {"32": {"done": len(done)}})

    assert rivals.kept("rival", {"bits": [5.0]}, make) == rivals.kept("rival", {"bits": [5.0]}, make)
    assert rivals.kept("rival", {"bits": [6.0]}, make) == {"32": {"done": 2}}


def test_the_table_has_the_best_choice_first_and_the_difference():
    row = {
        "budget": 5.0,
        "samples": 2,
        "seconds": 9.4,
        "bits": 5.0,
        "predicted": 0.2,
        "divergence_low": 0.1,
        "divergence_high": 0.3,
    }
    worse = row | {"method": "rival", "divergence": 0.25, "partner_bits": 4.99}
    worse |= {"more": 0.05, "more_low": 0.04, "more_high": 0.06}
    lines = rivals.table([worse, row | {"method": "ours", "divergence": 0.2}]).splitlines()
    assert lines[1] == "At 5.0 bits:"
    assert lines[-2] == "| ours | 2 | 9 | 5.0000 | 0.2000 | 0.2000 | 0.1000 to 0.3000 |  |  |"
    assert lines[-1].endswith("| 4.9900 | +0.0500 (+0.0400 to +0.0600) |")
