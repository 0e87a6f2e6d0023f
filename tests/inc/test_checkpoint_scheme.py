"""Which layers of a quantized model do the damage: the scheme of a checkpoint, from the plan to the audit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from build import IDENTITY
from quantized import Modules, tiny_language_model, token_batches, write_checkpoint
from quick_inc import plans_unchecked

from auto_quantize_model.config import OwnScheme, PlanSpec
from auto_quantize_model.data import local_sources
from auto_quantize_model.data.local_sources import why_other_checkpoint
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import build_plan, identify
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.served_audit import MIXED, audit_served
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Capture, Plan, body_of
from auto_quantize_model.schemes.compressed import scheme_of

SPOILED = "model.layers.1.self_attn.v_proj"
SMOOTHED = "model.layers.0.post_attention_layernorm"
FIELDS = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
pytestmark = pytest.mark.slow


def smooth(modules: Modules) -> None:
    """Move a factor of 4 from the input of two ops into their weights, as AWQ does."""
    modules[SMOOTHED].weight.data /= 4
    for name in ("gate_proj", "up_proj"):
        modules[f"model.layers.0.mlp.{name}"].weight.data *= 4


def spoil(modules: Modules) -> None:
    """Swap the two groups of columns of one op, as a tool with a wrong order of activations would."""
    modules[SPOILED].weight.data = modules[SPOILED].weight.data.unflatten(1, (2, 32)).flip(1).flatten(1)


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("gptq") / "checkpoint"
    return write_checkpoint(model, where, scheme_of("mine", FIELDS), before=smooth, after=spoil)


@pytest.fixture(scope="module")
def plan(model, folder: Path) -> Plan:
    schemes = ("inc_int8", OwnScheme(name="my_gptq", checkpoint=str(folder)), "W8A8")
    spec = PlanSpec(schemes=schemes, maps=("isolated",), confidence_batches=1)
    with plans_unchecked():
        return identify(build_plan(model, token_batches(), spec), *IDENTITY)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ScoreStore:
    return ScoreStore(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def capture(model, plan: Plan, store) -> Capture:
    return capture_sensitivity(model, token_batches(), plan, store)[0]


def test_the_plan_names_the_checkpoint_its_files_and_the_ops_that_lack(plan: Plan, folder: Path) -> None:
    fields = plan.schemes["my_gptq"]
    assert list(plan.schemes) == ["inc_int8", "my_gptq", "W8A8"]
    assert [file["name"] for file in fields["files"]] == ["config.json", "model.safetensors"]
    assert (fields["checkpoint"], fields["warnings"]) == (str(folder), [])
    assert fields["norms"] == {SMOOTHED: ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]}
    refused = {op.op_name: op.refused["my_gptq"] for op in plan.ops if "my_gptq" in op.refused}
    assert refused["lm_head"] == "the checkpoint leaves the op unquantized"
    assert set(refused) == {"lm_head", *(op.op_name for op in plan.ops if op.op_type == "Embedding")}


def test_the_op_that_was_spoiled_is_the_most_sensitive_by_far(capture: Capture) -> None:
    scores = capture.of_map("isolated", "my_gptq")
    worst, second = sorted((score.divergence, name) for name, (score,) in scores.items())[::-1][:2]
    assert worst[1] == SPOILED and worst[0] > 3 * second[0]
    assert len(scores) == 14


def test_estimates_find_that_op_too_and_give_an_op_the_norm_that_goes_with_it(
    model, plan: Plan, capture: Capture, tmp_path: Path
) -> None:
    estimated, _ = capture_sensitivity(model, token_batches(), plan, ScoreStore(tmp_path), exact="none")
    found = {name: made.divergence for name, made in estimated.estimates_of("my_gptq").items()}
    assert max(found, key=found.__getitem__) == SPOILED
    for name in plan.schemes["my_gptq"]["norms"][SMOOTHED]:
        (measured,) = capture.of_map("isolated", "my_gptq")[name]
        assert measured.divergence / 3 < found[name] < 3 * measured.divergence


def test_the_library_finds_the_same_bits_in_its_own_modules(model, plan: Plan, capture: Capture) -> None:
    compared = audit_served(model, token_batches(), 0, plan, capture, 4, {})
    assert compared == {"my_gptq": 35, "W8A8": 35, MIXED: 7}
    wrong = tuple(
        replace(score, mse_value=score.mse_value * 2)
        if (score.scheme, score.op_name) == ("my_gptq", SPOILED)
        else score
        for score in capture.scores
    )
    with pytest.raises(InputError, match=rf"^audit: batch 0, scheme my_gptq, {SPOILED}: the mse_value is"):
        audit_served(model, token_batches(), 0, plan, replace(capture, scores=wrong), 4, {})


def test_another_checkpoint_at_the_same_place_is_planned_and_measured_again(
    model, plan: Plan, capture: Capture, store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "plan.json"
    write_document(document, "plan", body_of(plan))
    assert why_other_checkpoint(document) == ""
    # The same files elsewhere are the same checkpoint.
    copied = shutil.copytree(folder, tmp_path / "copy")
    elsewhere = {"checkpoint": "another/place", "folder": str(copied)}
    moved = replace(plan, schemes=plan.schemes | {"my_gptq": plan.schemes["my_gptq"] | elsewhere})
    _, record = capture_sensitivity(model, token_batches(), moved, store)
    assert record["resumed_scores"] == len(capture.scores)
    kept = folder.rename(tmp_path / "before")
    assert why_other_checkpoint(document) == ""  # the results may lie on another machine
    write_checkpoint(model, folder, scheme_of("mine", FIELDS))
    other = f"{folder}/model.safetensors is not the file that {document} lists"
    assert why_other_checkpoint(document) == other
    # A large file of the same size counts by its content where it is newer than the plan.
    monkeypatch.setattr(local_sources, "HASHED_BYTES", 0)
    assert why_other_checkpoint(document) == other
    with pytest.raises(InputError, match="differs from the sha256 in the plan"):
        capture_sensitivity(model, token_batches(), plan, store)
    spec = PlanSpec(schemes=("inc_int8", OwnScheme(name="my_gptq", checkpoint=str(folder))), confidence_batches=1)
    with plans_unchecked():
        again = identify(build_plan(model, token_batches(), spec.model_copy(update={"maps": ("isolated",)})), *IDENTITY)
    scores = capture_sensitivity(model, token_batches(), again, store)[0].of_map("isolated", "my_gptq")
    ((now,), (before,)) = scores[SPOILED], capture.of_map("isolated", "my_gptq")[SPOILED]
    assert now.mse_value < before.mse_value / 3
    kept.rename(tmp_path / "after")
