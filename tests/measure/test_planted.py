"""Fragility that is planted is found: an op whose input is given large outlier channels comes out on top and is kept.

The rescaling does not change the model's function. A norm's weight grows in some channels, and the columns of the op
that reads them shrink as much. In FP32 nothing changes; in INT8 one scale has to serve channels far apart.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_inc import plans_unchecked

from auto_quantize_model.config import DecideSpec, PlanSpec, Target
from auto_quantize_model.decide.frontier import measure_frontier
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.decide.ranking import most_sensitive_first
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.made.digits import build_snapshot
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Frontier, Plan, Point
from auto_quantize_model.replay.model import Replay

# The op and the norm before it, of which it is the only reader.
CHOICES = {
    "model.visual.blocks.0.attn.qkv": "model.visual.blocks.0.norm1",
    "model.visual.blocks.1.attn.qkv": "model.visual.blocks.1.norm1",
    "model.visual.merger.mlp.0": "model.visual.merger.ln_q",
}
FACTOR = 1000.0
Batches = list[dict[str, torch.Tensor]]
NO_TARGET = Target()


def model_of(snapshot: Path) -> torch.nn.Module:
    """The model with blocks that weigh against what passes by them, as in a trained one."""
    model: torch.nn.Module = load_model(snapshot)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".blocks." in name or ".layers." in name):
            module.weight.data *= 5
    return model


def plant(model: torch.nn.Module, op: str, norm: str, seed: int) -> None:
    """Scale two channels of the norm up, and the op's columns for them down."""
    modules: dict[str, Any] = dict(model.named_modules())
    width = modules[norm].weight.numel()
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:2]
    modules[norm].weight.data[channels] *= FACTOR
    # The merger joins patches side by side, so a channel has a column in each.
    columns = modules[op].weight.data.view(modules[op].weight.shape[0], -1, width)
    columns[:, :, channels] /= FACTOR


def measured(
    model: torch.nn.Module, plan: Plan, batches: Batches, directory: Path, target: Target = NO_TARGET
) -> tuple[list[str], Frontier]:
    """The ranking on the first batch, and the frontier on the second."""
    store, spec = ScoreStore(directory), DecideSpec(heldout_batches=1, points=6)
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = replay.calibrate(batches[0])
    capture, _ = capture_sensitivity(model, batches, plan, store)
    data = (model, plan, capture, ("inc_int8",), scales, batches[1:], [[None]], store, spec, target)
    return most_sensitive_first(plan, capture), measure_frontier(*data)


def all_int8(frontier: Frontier) -> Point:
    (point,) = (point for point in frontier.controls if point.kind == "uniform")
    return point


def written(directory: Path, seed: int) -> Path:
    build_snapshot(directory / "snapshot", depth=2, hidden=32, seed=seed)
    return directory / "snapshot"


@pytest.fixture(scope="module")
def shared_plan(batches: Batches, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """INC's plan, which does not depend on the weights."""
    model = model_of(written(tmp_path_factory.mktemp("plan"), 0))
    with plans_unchecked():
        return build_plan(model, batches, PlanSpec(confidence_batches=1, maps=("isolated",)))


@pytest.fixture(scope="module", params=[0, 1])
def usual(
    request: pytest.FixtureRequest, shared_plan: Plan, batches: Batches, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Plan, list[str], float]:
    """Of a model before anything is planted: seed, snapshot, plan, ranking, and SQNR of all-INT8 in dB."""
    directory = tmp_path_factory.mktemp("usual")
    snapshot, plan = written(directory, request.param), replace(shared_plan, model_digest=f"seed {request.param}")
    model = model_of(snapshot)
    ranking, frontier = measured(model, plan, batches, directory / "scores")
    sqnr_db = all_int8(frontier).sqnr_db
    assert sqnr_db is not None
    return request.param, snapshot, plan, ranking, sqnr_db


@pytest.mark.slow
@pytest.mark.parametrize("op", CHOICES)
def test_a_planted_op_is_ranked_first_and_the_smallest_profile_keeps_it(
    op: str, usual: tuple[int, Path, Plan, list[str], float], batches: Batches, tmp_path: Path
) -> None:
    seed, snapshot, plan, ranking, sqnr_db = usual
    assert ranking.index(op) > 2
    model = model_of(snapshot)
    with torch.no_grad():
        before = model(**batches[0]).logits
        plant(model, op, CHOICES[op], seed)
        assert torch.allclose(model(**batches[0]).logits, before, rtol=1e-3, atol=1e-3)
    # As good as it was before: that takes this op in FP32 and no other.
    target, plan = Target(min_sqnr_db=sqnr_db - 0.5), replace(plan, model_digest=op)
    planted, frontier = measured(model, plan, batches, tmp_path, target)
    assert planted[0] == op
    broken = all_int8(frontier).sqnr_db
    assert broken is not None and broken < sqnr_db - 1
    assert build_profiles(frontier, plan, target).profiles["smallest"].kept == (op,)
