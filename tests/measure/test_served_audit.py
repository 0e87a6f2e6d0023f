"""Ops are scored in each scheme of the plan, and the modules of compressed-tensors find the same bits."""

import math
from dataclasses import replace

import pytest
import torch
from build import IDENTITY
from quick_inc import plans_unchecked

from auto_quantize_model.config import Inputs, OwnScheme, PlanSpec, Weights
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import build_plan, identify
from auto_quantize_model.machine import with_threads
from auto_quantize_model.measure import served_audit
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.served_audit import MIXED, audit_served
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Capture, Effort, Estimate, Plan, Scales
from auto_quantize_model.replay import served
from auto_quantize_model.replay.calibrate import calibrate
from auto_quantize_model.replay.scales import ALL_BATCHES, read_scales, write_scales

OWN = OwnScheme(
    name="W4A8_G32",
    weights=Weights(num_bits=4, symmetric=False, strategy="group", group_size=32),
    input_activations=Inputs(num_bits=8, strategy="tensor"),
)
SCHEMES = ("inc_int8", "W8A8", "FP8", "W4A16", "NVFP4", OWN.name)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


@pytest.fixture(scope="module")
def plan(model, batches) -> Plan:
    spec = PlanSpec(schemes=(*SCHEMES[:-1], OWN), maps=("isolated", "fallback"), confidence_batches=2)
    with plans_unchecked():
        return identify(build_plan(model, batches, spec), *IDENTITY)


@pytest.fixture(scope="module")
def scales(model, plan, batches, tmp_path_factory) -> dict[str, Scales]:
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    write_scales(path, calibrate(model, plan, batches, whole_set=True))
    return read_scales(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ScoreStore:
    return ScoreStore(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def capture(model, plan, batches, scales, store) -> Capture:
    of_batches = [scales["batch_0"], scales["batch_1"]]
    of_all = scales[ALL_BATCHES]
    return capture_sensitivity(model, batches, plan, store, of_batches, of_all=of_all, candidates=("NVFP4",))[0]


def test_each_op_has_the_schemes_that_fit_and_a_reason_against_each_other(plan: Plan) -> None:
    ops = {op.op_name: op for op in plan.ops}
    assert ops["lm_head"].schemes == ("inc_int8", "W8A8", "FP8", "NVFP4", OWN.name)
    assert ops["lm_head"].refused == {
        "W4A16": "its 32 columns do not divide into the weight's groups of 128; NVFP4A16 can hold the op"
    }
    assert ops["model.visual.merger.mlp.0"].schemes == SCHEMES
    embedding = next(op for op in plan.ops if op.op_type == "Embedding")
    assert embedding.schemes == ("inc_int8",)
    assert set(embedding.refused.values()) == {
        "compressed-tensors quantizes a Linear, and this op is of the type Embedding"
    }
    assert list(plan.schemes) == list(SCHEMES) and plan.schemes["inc_int8"] == {}
    assert plan.schemes["W4A16"]["weights"]["group_size"] == 128
    assert plan.schemes[OWN.name]["weights"]["group_size"] == 32


def test_every_op_is_scored_in_every_scheme_that_it_can_have(plan: Plan, capture: Capture) -> None:
    for scheme in SCHEMES:
        able = [op.op_name for op in plan.ops if scheme in op.schemes]
        scores = capture.of_map("isolated", scheme)
        assert list(scores) == able and all(
            score and score.mse_value > 0 for of_op in scores.values() for score in of_op
        )
        assert len(capture.all_in(scheme)) == 2
    # INC defines `fallback` for its own scheme.
    assert {score.scheme for score in capture.scores if score.map == "fallback"} == {"inc_int8"}


def test_one_more_scheme_costs_only_its_own_scores(model, plan, batches, scales, store, capture: Capture) -> None:
    less = replace(plan, schemes={name: fields for name, fields in plan.schemes.items() if name != "W8A8"})
    of_batches, of_all = [scales["batch_0"], scales["batch_1"]], scales[ALL_BATCHES]
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    again, _ = capture_sensitivity(model, batches, less, store, of_batches, of_all=of_all)
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == before
    assert set(again.scores) == {score for score in capture.scores if score.scheme != "W8A8" and score.map != "units"}


def test_the_modules_of_the_library_find_the_same_bits(model, plan, batches, scales, capture: Capture) -> None:
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    compared = audit_served(model, batches, 1, plan, capture, 3, scales[ALL_BATCHES])
    # Three ops, or the two that W4A16 fits, and all of them together: seven metrics each. A candidate has a unit too.
    assert compared == {"W8A8": 28, "FP8": 28, "W4A16": 21, "NVFP4": 35, OWN.name: 28, MIXED: 7}
    assert all(vars(module).keys() == before[name].keys() for name, module in model.named_modules())


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_one_wrong_bit_fails_the_audit_and_is_named(
    model, plan, batches, scales, capture: Capture, scheme: str
) -> None:
    worst = max(
        (score for score in capture.scores if (score.map, score.scheme, score.batch) == ("isolated", scheme, 0)),
        key=lambda score: score.mse_value,
    )
    assert worst.divergence is not None
    wrong = replace(worst, divergence=math.nextafter(worst.divergence, 1))
    scores = tuple(wrong if score is worst else score for score in capture.scores)
    with pytest.raises(InputError, match=rf"^audit: batch 0, scheme {scheme}, {worst.op_name}: the divergence is"):
        audit_served(model, batches, 0, plan, replace(capture, scores=scores), 2, scales[ALL_BATCHES])


def test_a_replay_that_differs_in_a_mixed_assignment_is_found(
    model, plan, batches, scales, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = served.quantized_weight
    monkeypatch.setattr(served, "quantized_weight", lambda *args: exact(*args) * (1 + 2**-20))
    with pytest.raises(InputError, match=f"^audit: batch 0, scheme {MIXED}, an op in a scheme each: the mse_value is"):
        audit_served(model, batches, 0, plan, capture, 2, scales[ALL_BATCHES])


def test_the_audit_has_the_threads_of_the_capture(model, plan, batches, scales, capture: Capture, monkeypatch) -> None:
    seen, measure = set(), served_audit.Library.logits

    def logits(*args):
        seen.add(torch.get_num_threads())
        return measure(*args)

    monkeypatch.setattr(served_audit.Library, "logits", logits)
    with with_threads(capture.arithmetic.threads + 1):
        audit_served(model, batches, 0, plan, capture, 2, scales[ALL_BATCHES])
        assert torch.get_num_threads() == capture.arithmetic.threads + 1
    assert seen == {capture.arithmetic.threads}


def test_the_scores_of_a_gpu_are_not_compared_with_the_cpus(model, plan, batches, scales, capture: Capture) -> None:
    scores = tuple(replace(score, mse_value=score.mse_value * 1.001) for score in capture.scores)
    there = replace(capture, scores=scores, arithmetic=replace(capture.arithmetic, device="cuda"))
    assert audit_served(model, batches, 0, plan, there, 2, scales[ALL_BATCHES])["W8A8"] == 21


def test_ops_that_were_only_estimated_are_audited_by_a_replay(model, plan, batches, scales, capture: Capture) -> None:
    made = tuple(
        Estimate(score.scheme, score.op_name, score.mse_value, 0.0, 0.0)
        for score in capture.scores
        if (score.map, score.batch) == ("isolated", 0)
    )
    scores = tuple(score for score in capture.scores if score.map not in ("isolated", "units"))
    estimated = replace(capture, scores=scores, estimates=made, effort=Effort("none", 16))
    assert audit_served(model, batches, 0, plan, estimated, 2, scales[ALL_BATCHES])["NVFP4"] == 21


def test_the_fallback_map_is_measured_in_the_schemes_that_ask_for_it(model, plan, batches, scales, store) -> None:
    asked = replace(plan, fallback_schemes=("W8A8",))
    of_batches = [scales["batch_0"], scales["batch_1"]]
    capture, _ = capture_sensitivity(model, batches, asked, store, of_batches, of_all=scales[ALL_BATCHES])
    able = {op.op_name for op in plan.ops if "W8A8" in op.schemes}
    assert capture.of_map("fallback", "W8A8").keys() == able and not capture.of_map("fallback", "FP8")
    with_all = [score.mse_value for score in capture.all_in("W8A8")]
    errors = capture.of_map("fallback", "W8A8")["lm_head"]
    assert all(score and 0 < score.mse_value < whole for score, whole in zip(errors, with_all, strict=True))
