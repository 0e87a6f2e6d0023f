"""INC's own steps give the same with weights that stay in their files: its plan, its scores, and the model it makes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from build import IDENTITY
from quick_inc import plans_unchecked
from tiny_models import LIMITS, noise, sample, stored_in

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.export.inc_int8 import FP32
from auto_quantize_model.inc.audit import audit_capture
from auto_quantize_model.inc.engine import measure_by_inc
from auto_quantize_model.inc.plan import build_plan, identify
from auto_quantize_model.inc.quantize import load_quantized, logits, quantize
from auto_quantize_model.made.tiny import write_tiny
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import encode
from auto_quantize_model.models.snapshot import load_model, load_processor

pytestmark = pytest.mark.slow


def found_by_inc(directory: Path, mapped: bool, folder: Path) -> dict[str, Any]:
    """INC's plan, its audit of a capture, its own scores as the engine, and the logits of the model that it makes."""
    model: Any = load_model(directory, mapped=mapped)
    batch = encode(sample(noise(60, 40)), load_processor(directory), LIMITS)
    spec = PlanSpec(confidence_batches=1, maps=("isolated", "fallback"), schemes=("inc_int8",))
    plan = identify(build_plan(model, [batch], spec), *IDENTITY)
    by_replay, _ = capture_sensitivity(model, [batch], plan, ScoreStore(folder / "replay"))
    audit = audit_capture(model, [batch], plan, by_replay, 2)
    others = plan.op_names[2:-1]
    by_hand = {re.escape(name): "fp32" for name in others}
    alone = PlanSpec(
        confidence_batches=1, maps=("isolated",), schemes=("inc_int8",), engine="inc", op_name_dict=by_hand
    )
    with plans_unchecked():
        plan_of_two = identify(build_plan(model, [batch], alone), *IDENTITY)
    by_inc, _ = capture_sensitivity(model, [batch], plan_of_two, ScoreStore(folder / "inc"), by_inc=measure_by_inc)
    (folder / "model").mkdir()
    with torch.no_grad():
        quantize(model, [batch], {re.escape(plan.op_names[-1]): FP32}, folder / "model")
    return {
        "plan": plan,
        "scores": by_replay.scores,
        "audit": audit,
        "by_inc": by_inc.scores,
        "logits": logits(load_quantized(folder / "model", directory), batch).tolist(),
    }


def test_all_that_inc_does_has_the_bits_of_the_fp32_model(tmp_path: Path) -> None:
    directory = stored_in(torch.bfloat16, write_tiny("qwen2_5_vl", tmp_path / "snapshot"))
    in_memory, in_files = (found_by_inc(directory, mapped, tmp_path / str(mapped)) for mapped in (False, True))
    assert in_files["audit"].status == "bit_identical" and in_files["audit"].compared == 4
    assert in_files == in_memory


def test_a_file_that_is_saved_from_mapped_weights_needs_nothing_of_this_project(tmp_path: Path) -> None:
    directory = stored_in(torch.bfloat16, write_tiny("qwen2_5_vl", tmp_path / "snapshot"))
    weights = load_model(directory, mapped=True).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {type(weight) for weight in loaded.values()} == {torch.Tensor}
    expected = load_model(directory).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
