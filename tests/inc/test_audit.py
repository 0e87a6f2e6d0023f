"""The audit finds a single wrong bit, and says of which op."""

import math
from dataclasses import replace

import pytest
from build import IDENTITY, a_capture, a_plan
from quick_inc import plans_unchecked

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc import audit as auditing
from auto_quantize_model.inc.audit import audit_capture, rank_agreement, sample_ops
from auto_quantize_model.inc.plan import build_plan, identify
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Effort, Estimate, digest_of_record


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


@pytest.fixture(scope="module")
def plan(model, batches):
    maps = ("isolated", "fallback", "requantize")
    with plans_unchecked():
        return identify(build_plan(model, batches, PlanSpec(confidence_batches=2, maps=maps)), *IDENTITY)


@pytest.fixture(scope="module")
def capture(model, batches, plan, tmp_path_factory):
    return capture_sensitivity(model, batches, plan, ScoreStore(tmp_path_factory.mktemp("audit")))[0]


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """What INC gave for the same plan and ops in an earlier test of this file is not measured again."""
    measured = {}
    measure = auditing._by_inc

    def remembered(model, batches, batch, plan, names, on_op):
        key = digest_of_record(plan), batch, tuple(names)
        if key not in measured:
            measured[key] = measure(model, batches, batch, plan, names, on_op)
        return measured[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "_by_inc", remembered)
        yield


@pytest.fixture(scope="module")
def audited(model, batches, plan, capture):
    """An audit of the capture, and the progress that it told."""
    calls = []
    result = audit_capture(model, batches, plan, capture, 2, on_op=lambda done, total: calls.append((done, total)))
    return result, calls


@pytest.mark.slow
def test_a_true_capture_is_bit_identical_in_every_map(audited):
    result, calls = audited
    assert result.status == "bit_identical"
    assert (len(result.ops), result.compared) == (2, 6)
    assert calls == [(done, 6) for done in range(7)]


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [True, False])
def test_a_capture_is_bit_identical_with_7_and_with_8_bits_of_activation(model, batches, tmp_path, reduced):
    """Whatever INC itself would choose on this CPU. Of two values of this map, one at least has each op in INT8."""
    spec = PlanSpec(confidence_batches=1, maps=("fallback",), reduce_range=reduced)
    with plans_unchecked():
        planned = identify(build_plan(model, batches, spec), *IDENTITY)
    captured, _ = capture_sensitivity(model, batches, planned, ScoreStore(tmp_path))
    assert audit_capture(model, batches, planned, captured, 2).status == "bit_identical"


@pytest.mark.slow
@pytest.mark.parametrize("label", ["isolated", "fallback", "requantize"])
def test_one_wrong_bit_fails_and_names_op_values_and_batch(model, batches, plan, capture, audited, label):
    name, batch = audited[0].ops[0], audited[0].batch
    (score,) = [score for score in capture.scores if (score.map, score.op_name, score.batch) == (label, name, batch)]
    changed = replace(score, mse_value=math.nextafter(score.mse_value, math.inf))
    wrong = replace(capture, scores=tuple(changed if found is score else found for found in capture.scores))
    with pytest.raises(InputError) as error:
        audit_capture(model, batches, plan, wrong, 2)
    for part in (f"batch {batch}", f"map {label}", name, repr(score.mse_value), repr(changed.mse_value)):
        assert part in str(error.value)


def test_the_sample_has_both_extremes_and_is_drawn_by_the_seed():
    values = {f"op{number}": [{"mse_value": float(number * 7 % 20)}] for number in range(20)}
    capture, other = (
        a_capture(a_plan(values), {"isolated": values}, [{"mse_value": 1.0}], plan_digest=digit * 64) for digit in "12"
    )
    plan = a_plan(values)
    first = sample_ops(plan, capture, 0, 6)
    assert len(first) == 6
    assert {"op0", "op17"} <= set(first)  # 0 and 19
    assert first == sample_ops(plan, capture, 0, 6)
    assert first != sample_ops(plan, other, 0, 6)
    assert len(sample_ops(plan, capture, 0, 100)) == 20


def test_rank_agreement_goes_by_name_and_is_none_without_ranks():
    assert rank_agreement({"a": 1.0, "b": 2.0, "c": 3.0}, {"c": 30.0, "b": 20.0, "a": 10.0}) == pytest.approx(1.0)
    assert rank_agreement({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}) == pytest.approx(-1.0)


def test_an_op_that_did_not_run_is_not_audited():
    values = {"a": [{"mse_value": 1.0}], "b": [None], "c": [{"mse_value": 2.0}]}
    plan = a_plan(values)
    capture = a_capture(plan, {"isolated": values}, [{"mse_value": 1.0}])
    assert sample_ops(plan, capture, 0, 3) == ["a", "c"]


@pytest.mark.slow
def test_ops_that_were_only_estimated_are_audited_by_a_replay(model, batches, plan, capture, audited):
    batch = audited[0].batch
    of_batch = [score for score in capture.scores if (score.map, score.batch) == ("isolated", batch)]
    estimates = tuple(Estimate("inc_int8", score.op_name, score.mse_value, 0.0, 0.0) for score in of_batch)
    scores = tuple(score for score in capture.scores if score.map != "isolated")
    estimated = replace(capture, scores=scores, estimates=estimates, effort=Effort("none", 16))
    assert audit_capture(model, batches, plan, estimated, 2) == audited[0]


@pytest.mark.slow
def test_where_inc_measured_nothing_is_left_to_audit(model, batches, plan, capture):
    assert audit_capture(model, batches, plan, replace(capture, engine="inc"), 3).status == "not_needed"


@pytest.mark.slow
def test_a_capture_of_another_plan_is_refused(model, batches, plan, capture):
    with pytest.raises(InputError, match="made from another plan"):
        audit_capture(model, batches, replace(plan, confidence_batches=1), capture, 3)
