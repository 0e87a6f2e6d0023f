"""INC is checked before it measures; a model that it converts wrongly is replayed, and audited by torch's modules."""

import gc
import math
from dataclasses import replace

import pytest
import torch
import transformers
from build import IDENTITY, an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc import plan as planning
from auto_quantize_model.inc.audit import announce, audit_capture
from auto_quantize_model.inc.engine import require_inc
from auto_quantize_model.inc.plan import build_plan, described, identify, require_measurable
from auto_quantize_model.inc.torch_modules import quantized, torch_scores
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore

MAPS = ("isolated", "fallback", "requantize")
SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "bos_token_id": 1}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2}


def made(architecture: str, **config):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{architecture}ForCausalLM")
    return kind(kind.config_class(**config)).eval().requires_grad_(False)


def llama4():
    """Its router writes scores by an in-place `scatter_`, which FX drops."""
    return made("Llama4", **SHAPE, intermediate_size_mlp=24, num_local_experts=2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def scattering():
    return llama4()


@pytest.fixture(scope="module")
def ids():
    return [{"input_ids": torch.randint(3, 61, (1, 8), generator=torch.Generator().manual_seed(0))}]


@pytest.fixture(scope="module")
def scattering_plan(scattering, ids):
    return identify(build_plan(scattering, ids, PlanSpec(engine="auto", confidence_batches=1, maps=MAPS)), *IDENTITY)


@pytest.fixture(scope="module")
def scattering_capture(scattering, ids, scattering_plan, tmp_path_factory):
    return capture_sensitivity(scattering, ids, scattering_plan, ScoreStore(tmp_path_factory.mktemp("llama4")))[0]


@pytest.mark.slow
def test_a_model_whose_scatter_inc_drops_is_not_measured_by_inc(scattering, scattering_plan):
    check = scattering_plan.inc_check
    assert check["status"] == "cannot"
    assert check["reason"].startswith("with no op in INT8, INC's model differs from the FP32 model by a sum of squared")
    assert check["reason"].endswith("at lm_head on batch 0")
    with pytest.raises(InputError, match=r"INC cannot measure this model: .*; set sensitivity.engine to replay, and"):
        require_measurable(scattering, scattering_plan.ops, "inc", check)
    with pytest.raises(InputError, match=r"INC cannot quantize this model: .* apply the profile with another tool"):
        require_inc(scattering_plan)


@pytest.mark.slow
def test_such_a_model_is_measured_by_replay_and_audited_by_torchs_modules(
    scattering, ids, scattering_plan, scattering_capture
):
    count = len(scattering_plan.ops)
    audit = audit_capture(scattering, ids, scattering_plan, scattering_capture, count)
    assert (audit.status, audit.by, audit.compared) == ("bit_identical", "torch", 3 * count)
    values = [score.mse_value for score in scattering_capture.scores if score.map == "isolated"]
    assert len(set(values)) == count  # not INC's one constant for every op


@pytest.mark.slow
@pytest.mark.parametrize("label", MAPS)
def test_the_audit_by_torchs_modules_finds_one_wrong_bit(scattering, ids, scattering_plan, scattering_capture, label):
    name = scattering_plan.op_names[1]
    scores = [
        replace(score, mse_value=math.nextafter(score.mse_value, math.inf))
        if (score.map, score.op_name) == (label, name)
        else score
        for score in scattering_capture.scores
    ]
    wrong = replace(scattering_capture, scores=tuple(scores))
    with pytest.raises(InputError, match=f"map {label}, {name}: the capture has .*, and torch's own quantized modules"):
        audit_capture(scattering, ids, scattering_plan, wrong, len(scattering_plan.ops))


@pytest.mark.slow
def test_torchs_modules_leave_the_model_as_it_was(scattering, ids, scattering_plan):
    before = {name: dict(vars(module)) for name, module in scattering.named_modules()}
    called = []
    torch_scores(scattering, ids[0], scattering_plan, ["lm_head"], lambda *of: called.append(of))
    assert called == [(label, "lm_head") for label in MAPS]
    for name, module in scattering.named_modules():
        assert vars(module).keys() == before[name].keys() and not module._forward_hooks, name


@pytest.mark.slow
def test_a_number_of_audited_ops_above_that_of_all_ops_is_said(scattering_plan, scattering_capture):
    count = len(scattering_plan.ops)
    assert announce(scattering_plan, scattering_capture, 10**9) == (
        f"audit: {count} of {count} ops (sensitivity.audit_ops asks for 1000000000; no more ran) on batch 0,"
        f" {3 * count} values by torch's own quantized modules"
    )
    assert "(sensitivity" not in announce(scattering_plan, scattering_capture, count)
    assert "audit: 2 of" in announce(scattering_plan, scattering_capture, 2)
    by_inc = replace(scattering_plan, inc_check={"status": "reproduces_fp32"})
    assert announce(by_inc, scattering_capture, 2).endswith("6 values by INC")
    assert announce(by_inc, replace(scattering_capture, engine="inc"), 2) == (
        "audit: not needed, INC itself measured every op"
    )


@pytest.mark.slow
def test_mamba_is_refused_with_what_inc_raises_and_what_to_keep(ids):
    model = made("Mamba", vocab_size=61, hidden_size=16, state_size=2, num_hidden_layers=1, bos_token_id=1)
    with pytest.raises(InputError) as refused:
        build_plan(model, ids, PlanSpec(engine="auto", confidence_batches=1, maps=("isolated",)))
    assert str(refused.value).startswith(
        "INC cannot measure this model: with every op in INT8, INC's model ends with RuntimeError (empty_strided not"
    )
    assert str(refused.value).endswith(
        "The replay does not cover 1 of 7 ops, first backbone.layers.0.mixer.conv1d: a Conv1d whose stride is not its"
        " kernel, or that has padding, dilation or groups; keep them in FP32 with sensitivity.op_type_dict"
        " {Conv1d: fp32}, or add a scheme of compressed-tensors, such as W8A8, to sensitivity.schemes, because such"
        " schemes need no plan of INC"
    )
    plan = build_plan(
        model, ids, PlanSpec(engine="auto", confidence_batches=1, maps=("isolated",), op_type_dict={"Conv1d": "fp32"})
    )
    assert (len(plan.ops), plan.inc_check["status"]) == (6, "cannot")


@pytest.mark.slow
def test_a_function_that_inc_computes_in_int8_is_refused_to_the_replay_and_not_to_inc(monkeypatch):
    """A state with one op in INT8 has the same bits in both: there nothing lies between two ops in INT8."""
    monkeypatch.setattr(torch.nn.functional, "silu", torch.tanh)
    model, batches = few_ops_model(), token_batches(1)
    wanted = PlanSpec(confidence_batches=1, maps=("isolated",))
    for engine in ("replay", "auto"):
        with pytest.raises(InputError, match=r"^with every op in INT8, the replay has a .* on batch 0, and INC has "):
            build_plan(model, batches, wanted.model_copy(update={"engine": engine}))
    assert build_plan(model, batches, wanted.model_copy(update={"engine": "inc"})).ops


@pytest.mark.slow
def test_a_model_that_inc_converts_rightly_says_so(ids):
    plan = build_plan(made("Qwen2", **SHAPE), ids, PlanSpec(engine="inc", confidence_batches=1, maps=("isolated",)))
    assert plan.inc_check == {"status": "reproduces_fp32"}


def test_memory_that_ran_out_says_nothing_about_inc():
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="can't allocate"):
        described(error)
    assert described(KeyError()) == "KeyError"


def test_a_batch_of_each_set_of_inputs_is_checked(monkeypatch):
    """A batch without images runs no vision tower, so the first batch alone says nothing about it."""
    text, image = {"input_ids": torch.ones(1)}, {"input_ids": torch.ones(1), "pixel_values": torch.ones(1)}
    checked = []
    trial = lambda _, batch: (checked.append(batch) or "fails" * (len(batch) == 2), 1.0)  # noqa: E731
    monkeypatch.setattr(planning, "tried_by_inc", trial)
    assert planning.check_inc(None, [text, text]) == ({"status": "reproduces_fp32"}, {0: 1.0})
    checked.clear()
    found, errors = planning.check_inc(None, [text, text, image, image])
    assert [len(batch) for batch in checked] == [1, 2]
    assert (found, errors) == ({"status": "cannot", "reason": "fails on batch 2"}, {})


def quantized_modules():
    return sum(isinstance(found, torch.ao.nn.quantized.Linear) for found in gc.get_objects())


def test_incs_int8_model_has_left_the_memory_when_the_replay_is_checked(monkeypatch):
    seen = []
    monkeypatch.setattr(planning, "require_same_int8", lambda *_: seen.append(quantized_modules()))
    before = quantized_modules()
    gc.disable()
    try:
        build_plan(few_ops_model(), token_batches(1), PlanSpec(confidence_batches=1, maps=("isolated",)))
    finally:
        gc.enable()
    assert seen == [before]


def test_torchs_quantized_embedding_takes_ids_of_three_dimensions():
    """torch's kernel takes two at most."""
    torch.manual_seed(0)
    module, ids = torch.nn.Embedding(7, 8).requires_grad_(False), torch.arange(6).view(1, 2, 3)
    rows = quantized(module, an_op("table", "Embedding"), ())
    assert torch.equal(rows(ids), rows(ids.flatten()).view(1, 2, 3, 8))
    torch.testing.assert_close(rows(ids), module(ids), atol=0.02, rtol=0)
