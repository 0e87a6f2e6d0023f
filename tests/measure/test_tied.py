"""An embedding and a head with one weight are decided together, so INC's INT8 of both has a score or an estimate."""

from pathlib import Path

import pytest
import torch
from quick_inc import plans_unchecked
from transformers import AutoModelForCausalLM

from auto_quantize_model.config import DecideSpec, PlanSpec
from auto_quantize_model.decide.frontier import options_of
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.engine import measure_by_inc
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.made.tiny_text import small_config
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.states import UNITS
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Plan
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.scheme import INC_INT8, assigned

pytestmark = pytest.mark.slow
BOTH = ("model.embed_tokens", "lm_head")
BATCH: Batch = {"input_ids": torch.arange(3, 27)[None]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    directory = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = small_config("llama", 61, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return load_model(directory)


def planned(model: torch.nn.Module, engine: str) -> Plan:
    spec = PlanSpec(confidence_batches=1, maps=("isolated",), schemes=(INC_INT8,), engine=engine)
    with plans_unchecked():
        return build_plan(model, [BATCH], spec)


def losses(plan: Plan, model: torch.nn.Module, folder: Path, exact: str) -> tuple[float, dict[str, float]]:
    """The loss of both ops, and the measured divergences of units in INC's INT8."""
    capture, _ = capture_sensitivity(model, [BATCH], plan, ScoreStore(folder), exact=exact, by_inc=measure_by_inc)
    _, options = options_of(plan, capture, (INC_INT8,), DecideSpec())
    (unit,) = (found for found in options if len(found.ops) > 1)
    assert unit.ops == BOTH
    measured = {score.op_name: score.divergence for score in capture.scores if score.map == UNITS}
    return unit.loss[INC_INT8], {name: value for name, value in measured.items() if value is not None}


def test_both_are_measured_together(model: torch.nn.Module, tmp_path: Path) -> None:
    plan = planned(model, "replay")
    loss, measured = losses(plan, model, tmp_path, "all")
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(BATCH)
        reference = Reference.of(replay.begin(BATCH), BATCH, plan.measured_op)
        expected = reference.compare(replay.run(assigned(BOTH)))["divergence"]
    assert measured == {"+".join(BOTH): expected} and loss == expected


def test_both_are_estimated_together(model: torch.nn.Module, tmp_path: Path) -> None:
    plan = planned(model, "replay")
    (exact, _), (estimate, measured) = (losses(plan, model, tmp_path, which) for which in ("all", "none"))
    assert not measured and estimate == pytest.approx(exact, rel=0.5)


def test_inc_as_the_engine_measures_no_two_ops_and_the_error_says_so(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="INC as the engine measures each op alone; set sensitivity.engine to replay"):
        losses(planned(model, "inc"), model, tmp_path, "all")
