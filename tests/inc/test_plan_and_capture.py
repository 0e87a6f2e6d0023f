"""The plan is INC's, measured at the model's output; the capture follows it and counts what really ran."""

import json
import subprocess
import sys
from dataclasses import replace

import neural_compressor.adaptor.pytorch as nc_pytorch
import pytest
import torch
from build import IDENTITY
from quick_inc import few_ops_model, plans_unchecked, token_batches

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.data.digits import LIMITS
from auto_quantize_model.files import InputError, canonical_json
from auto_quantize_model.inc.engine import measure_by_inc, require_same_plan
from auto_quantize_model.inc.plan import build_plan, identify, matching
from auto_quantize_model.measure.capture import capture_sensitivity, require_finite
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.sample import Sample
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Plan, as_record, body_of
from auto_quantize_model.schemes.inc_int8 import build_observer

pytestmark = pytest.mark.slow
KEPT = "model.visual.patch_embed.proj"
MAPS = ["isolated", "fallback", "requantize"]


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


def spec(**changes):
    return PlanSpec(**{"confidence_batches": 1, "maps": ["isolated"], **changes})


@pytest.fixture(scope="module")
def plan(model, batches):
    return build_plan(model, batches, spec(confidence_batches=2))


@pytest.fixture
def unchecked():
    with plans_unchecked():
        yield


def test_the_plan_holds_every_op_and_measures_at_the_output(model, plan):
    assert plan.measured_op == plan.op_names[-1] == "lm_head"
    assert plan.inc_check == {"status": "reproduces_fp32"}
    assert {op.op_type for op in plan.ops} == {"Linear", "Conv3d", "Embedding"}
    modules = dict(model.named_modules())
    assert {*plan.op_names, *(module.op_name for module in plan.excluded)} <= set(modules)
    weight = plan.ops[0].inc_int8.weight
    assert (weight.dtype, weight.scheme, weight.granularity, weight.algorithm) == (
        "int8",
        "sym",
        "per_channel",
        "minmax",
    )
    assert weight.observer == {
        "name": "PerChannelMinMaxObserver",
        "dtype": "qint8",
        "qscheme": "per_channel_symmetric",
        "reduce_range": False,
        "quant_min": None,
        "quant_max": None,
    }
    assert {op.inc_int8.pattern for op in plan.ops} == {"Linear", "Conv3d", "Embedding"}
    assert as_record(Plan, json.loads(canonical_json(body_of(plan)))) == plan


def test_the_plan_is_an_inventory(model, plan):
    by_name = {op.op_name: op for op in plan.ops}
    q_proj = by_name["model.language_model.layers.0.self_attn.q_proj"]
    assert q_proj.unit == "model.language_model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert (q_proj.tower, by_name[KEPT].tower) == ("language", "vision")
    for op in plan.ops:
        weight = model.get_submodule(op.op_name).weight
        assert (op.shape, op.weight_bytes) == (tuple(weight.shape), weight.nbytes)
        assert op.executions == (1, 1)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert ("+" in by_name["lm_head"].unit) == tied


@pytest.mark.parametrize(("reduced", "quant_max"), [(True, 127), (False, 255)])
def test_reduce_range_reaches_the_observers_of_activations_alone(model, batches, reduced, quant_max, unchecked):
    before = nc_pytorch.REDUCE_RANGE
    plan = build_plan(model, batches, spec(reduce_range=reduced))
    assert (plan.reduce_range, plan.reduce_range_by) == (reduced, "config")
    assert nc_pytorch.REDUCE_RANGE == before
    for op in plan.ops:
        if op.op_type != "Embedding":
            assert build_observer(op.inc_int8.activation.observer).quant_max == quant_max
            assert build_observer(op.inc_int8.weight.observer).quant_max == 127


def test_the_choice_is_incs_own_where_the_config_makes_none(model, batches, unchecked, monkeypatch):
    for choice in (True, False):
        monkeypatch.setattr(nc_pytorch, "REDUCE_RANGE", choice)
        plan = build_plan(model, batches, spec())
        assert (plan.reduce_range, plan.reduce_range_by) == (choice, "inc")
    # The plan keeps what it was made with on a CPU where INC would choose otherwise.
    monkeypatch.setattr(nc_pytorch, "REDUCE_RANGE", True)
    require_same_plan(model, batches, plan)


@pytest.mark.parametrize("entry", [{"op_name_dict": {KEPT: "fp32"}}, {"op_type_dict": {"Conv3d": "fp32"}}])
def test_a_kept_op_is_excluded_with_its_reason_and_the_output_stays_the_measured_op(model, batches, unchecked, entry):
    plan = build_plan(model, batches, spec(**entry))
    (kept,) = [module for module in plan.excluded if module.op_name == KEPT]
    assert kept.reason.startswith("kept in FP32 by sensitivity.op_")
    assert plan.measured_op == plan.op_names[-1] == "lm_head"


def test_the_output_op_itself_may_be_kept(model, batches, unchecked):
    plan = build_plan(model, batches, spec(op_name_dict={"lm_head": "fp32"}))
    assert plan.measured_op == "lm_head"
    assert "lm_head" not in plan.op_names


@pytest.mark.parametrize("entry", [{"op_name_dict": {"lm_haed": "fp32"}}, {"op_type_dict": {"Conv9d": "fp32"}}])
def test_a_keep_entry_that_matches_no_op_is_refused(model, batches, entry):
    with pytest.raises(InputError, match=r"(lm_haed|Conv9d)'\] matches no op of the model; ops are "):
        build_plan(model, batches, spec(**entry))


def test_a_regular_expression_is_that_of_re_and_one_that_backtracks_without_end_is_stopped():
    names = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"]
    assert matching(r"model\.layers\.1\..*|(?i:LM_HEAD)", names) == {"lm_head", "model.layers.1.mlp.down_proj"}
    assert matching("model", names) == set()
    with pytest.raises(InputError, match=r"op_name_dict\['.*'\]: did not match 3 names within 0.5 s, so it backtracks"):
        matching(r"(.*)*\d(.*)*(.*)*!", names, seconds=0.5)
    for pattern in ("(", "a{99999999999}", "(" * 5000 + ")" * 5000):
        with pytest.raises(InputError, match="not a regular expression"):
            matching(pattern, names)


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


def captured(model, batches, plan, path, on_progress=lambda done, total: None):
    return capture_sensitivity(model, batches, plan, ScoreStore(path), on_progress=on_progress, by_inc=measure_by_inc)


def planned_few(**changes):
    """The model of seven ops, two batches, and their plan with 7 bits of activation."""
    model, batches = few_ops_model(), token_batches(2)
    return model, batches, identify(build_plan(model, batches, spec(reduce_range=True, **changes)), *IDENTITY)


@pytest.mark.parametrize("engine", ["replay", "inc"])
def test_the_capture_has_a_record_for_each_op_and_batch(tmp_path, engine):
    model, batches, plan = planned_few(engine=engine, confidence_batches=2)
    seen = []
    capture, record = captured(model, batches, plan, tmp_path / "j", lambda done, total: seen.append(done / total))
    assert list(capture.of_map("isolated")) == plan.op_names
    assert [(score.map, score.scheme) for score in capture.scores[:2]] == [("isolated", "inc_int8")] * 2
    assert len(capture.scores) == 2 * (len(plan.ops) + 1)
    assert all(score.mse_value > 0 for score in capture.scores)
    assert record["seconds"] > 0
    assert "host" not in canonical_json(body_of(capture))
    assert seen == sorted(seen) and seen[-1] == 1


@pytest.mark.parametrize("engine", ["replay", "inc"])
def test_a_capture_that_was_stopped_resumes_and_ends_the_same(tmp_path, engine):
    maps = MAPS if engine == "replay" else MAPS[:2]
    model, batches, plan = planned_few(engine=engine, maps=maps)
    whole, _ = captured(model, batches, plan, tmp_path / "whole")

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured(model, batches, plan, tmp_path / "stopped", stop)
    again, record = captured(model, batches, plan, tmp_path / "stopped")
    assert again == whole
    assert record["resumed_scores"] >= len(plan.ops) / 2


def test_a_second_pass_that_a_kill_lost_is_measured_again(tmp_path):
    model, batches, plan = planned_few(engine="inc", maps=["fallback"])
    whole, _ = captured(model, batches, plan, tmp_path)
    assert whole.second_pass[0]
    (shelf,) = tmp_path.glob("*.jsonl")
    lines = shelf.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"key": "second_pass"' not in line]
    assert len(kept) == len(lines) - 1
    shelf.write_text("".join(kept))
    assert captured(model, batches, plan, tmp_path)[0] == whole
    assert '"key": "second_pass"' in shelf.read_text()


def test_an_op_that_text_does_not_reach_has_no_score(model, processor, unchecked, tmp_path):
    texts = [collate([encode(Sample("text", "Which digit is this?"), processor, LIMITS)])]
    # Two ops are left: INC takes most of a second for each.
    most = {rf"model\.{part}\..*": "fp32" for part in (r"visual\.(blocks|merger)", "language_model")}
    plan = identify(build_plan(model, texts, spec(engine="inc", op_name_dict=most)), *IDENTITY)
    assert plan.op_names == [KEPT, "lm_head"]
    capture, _ = captured(model, texts, plan, tmp_path / "j")
    assert {score.op_name for score in capture.scores if score.map == "isolated"} == {"lm_head"}


def test_a_plan_that_inc_would_not_make_is_refused(model, batches, plan, tmp_path):
    plan = identify(replace(plan, engine="inc"), *IDENTITY)
    with pytest.raises(InputError, match="the plan's ops are not what INC plans"):
        captured(model, batches, replace(plan, ops=plan.ops[1:]), tmp_path / "j")


def test_an_op_whose_score_is_not_finite_is_named(tmp_path):
    with pytest.raises(InputError, match="batch 1, map fallback: mse_value of lm_head is inf"):
        require_finite({"mse_value": float("inf")}, 1, "fallback", "lm_head")


def test_replay_needs_no_inc():
    code = (
        "import sys\n"
        "import auto_quantize_model.measure.capture, auto_quantize_model.models.snapshot\n"
        "import auto_quantize_model.data.batches\n"
        "sys.exit(any(name.startswith('neural_compressor') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
