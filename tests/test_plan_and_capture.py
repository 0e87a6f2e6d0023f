"""The plan is INC's, measured at the model's output; the capture follows it and counts what really ran."""

import json

import pytest
import torch

from auto_quantize_model.capture import capture_sensitivity
from auto_quantize_model.digits import LIMITS, digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.plan import SensitivitySpec, build_plan, identify
from auto_quantize_model.samples import Sample, collate, encode
from auto_quantize_model.snapshot import load_model

pytestmark = pytest.mark.slow
KEPT = "model.visual.patch_embed.proj"
IDENTITY = ({"model": "tiny", "digest": "0"}, {"calibration": "set", "digest": "1"}, "2")


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


@pytest.fixture(scope="module")
def batches(processor):
    return [collate([encode(sample, processor, LIMITS)]) for sample in digit_samples([0, 1])]


def spec(**changes):
    return SensitivitySpec(**{"confidence_batches": 1, "maps": ["isolated"], **changes})


def test_the_plan_holds_every_op_and_measures_at_the_output(model, batches):
    plan = build_plan(model, batches, spec())
    assert plan["measured_op"] == "lm_head"
    assert plan["ops"][-1]["op_name"] == "lm_head"
    assert {op["op_type"] for op in plan["ops"]} == {"Linear", "Conv3d", "Embedding"}
    modules = dict(model.named_modules())
    assert all(op["op_name"] in modules for op in plan["ops"] + plan["excluded"])
    assert plan["ops"][0]["weight"] == {
        "dtype": "int8",
        "scheme": "sym",
        "granularity": "per_channel",
        "algorithm": "minmax",
    }
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize("entry", [{"op_name_dict": {KEPT: "fp32"}}, {"op_type_dict": {"Conv3d": "fp32"}}])
def test_a_kept_op_is_excluded_with_its_reason_and_the_output_stays_the_measured_op(model, batches, entry):
    plan = build_plan(model, batches, spec(**entry))
    (kept,) = [op for op in plan["excluded"] if op["op_name"] == KEPT]
    assert kept["reason"].startswith("kept in FP32 by sensitivity.op_")
    assert plan["measured_op"] == plan["ops"][-1]["op_name"] == "lm_head"


def test_the_output_op_itself_may_be_kept(model, batches):
    plan = build_plan(model, batches, spec(op_name_dict={"lm_head": "fp32"}))
    assert plan["measured_op"] == "lm_head"
    assert "lm_head" not in {op["op_name"] for op in plan["ops"]}


@pytest.mark.parametrize("entry", [{"op_name_dict": {"lm_haed": "fp32"}}, {"op_type_dict": {"Conv9d": "fp32"}}])
def test_a_keep_entry_that_matches_no_op_is_refused(model, batches, entry):
    with pytest.raises(InputError, match=r"(lm_haed|Conv9d)'\] matches no op of the model; ops are "):
        build_plan(model, batches, spec(**entry))


def test_keeping_everything_is_refused(model, batches):
    with pytest.raises(InputError, match="nothing is left to measure"):
        build_plan(model, batches, spec(op_name_dict={".*": "fp32"}))


def test_more_confidence_batches_than_batches_are_refused(model, batches):
    with pytest.raises(InputError, match="confidence_batches is 3, but the calibration set makes 2 batches"):
        build_plan(model, batches, spec(confidence_batches=3))


def test_output_that_is_not_finite_is_refused(tiny_snapshot, batches):
    broken = load_model(tiny_snapshot)
    broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        build_plan(broken, batches, spec())


def test_the_capture_has_a_value_for_each_op_and_batch(model, batches):
    keep = {f"model.{part}.*": "fp32" for part in ("visual.blocks", "language_model.layers")}
    plan = identify(build_plan(model, batches, spec(confidence_batches=2, op_name_dict=keep)), *IDENTITY)
    capture, record = capture_sensitivity(model, batches, plan)
    names = [op["op_name"] for op in plan["ops"]]
    assert list(capture["maps"]["isolated"]) == names
    assert all(value > 0 for values in capture["maps"]["isolated"].values() for value in values)
    assert set(map(tuple, capture["executions"].values())) == {(1, 1)}
    assert capture["batches"][0]["all_int8_mse_value"] > 0
    assert record["ops"] == len(names)
    assert "host" not in json.dumps(capture)


def test_an_op_that_text_does_not_reach_has_no_score(model, processor):
    texts = [collate([encode(Sample("text", "Which digit is this?"), processor, LIMITS)])]
    keep = {f"model.{part}.*": "fp32" for part in ("visual.blocks", "language_model.layers")}
    plan = identify(build_plan(model, texts, spec(op_name_dict=keep)), *IDENTITY)
    capture, _ = capture_sensitivity(model, texts, plan)
    for name, (value,) in capture["maps"]["isolated"].items():
        assert (value is None) == name.startswith("model.visual."), name


def test_a_plan_that_inc_would_not_make_is_refused(model, batches):
    plan = identify(build_plan(model, batches, spec()), *IDENTITY)
    with pytest.raises(InputError, match="the plan's ops are not what INC plans"):
        capture_sensitivity(model, batches, plan | {"ops": plan["ops"][1:]})
