"""Fragility that is planted is found: an op whose input is given large outlier channels comes out on top and is kept.

The rescaling leaves the model's function as it is: a norm's weight grows in some channels, and the columns of the op
that reads them shrink by as much. In FP32 nothing changes; in INT8 one scale has to serve channels far apart.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from auto_quantize_model.capture import capture_sensitivity
from auto_quantize_model.digits import build_snapshot
from auto_quantize_model.journal import Journal
from auto_quantize_model.plan import SensitivitySpec, build_plan
from auto_quantize_model.profiles import Target, build_profiles
from auto_quantize_model.ranking import most_sensitive_first
from auto_quantize_model.snapshot import load_model
from auto_quantize_model.tradeoff import measure_tradeoff

# The op and the norm before it, of which it is the only reader.
CHOICES = {
    "lm_head": "model.language_model.norm",
    "model.visual.merger.mlp.0": "model.visual.merger.ln_q",
}
FACTOR = 1000.0


def plant(model: torch.nn.Module, op: str, norm: str, seed: int) -> None:
    """Scale two channels of the norm up, and the op's columns for them down."""
    modules: dict[str, Any] = dict(model.named_modules())
    width = modules[norm].weight.numel()
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:2]
    modules[norm].weight[channels] *= FACTOR
    # The merger joins patches side by side, so a channel has a column in each.
    columns = modules[op].weight.view(modules[op].weight.shape[0], -1, width)
    columns[:, :, channels] /= FACTOR


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("op", CHOICES)
def test_a_planted_op_is_ranked_first_and_the_recommended_profile_keeps_it(
    op: str, seed: int, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    build_snapshot(tmp_path / "snapshot", depth=2, hidden=32, seed=seed)
    model: torch.nn.Module = load_model(tmp_path / "snapshot")
    with torch.no_grad():
        before = model(**batches[0]).logits
        plant(model, op, CHOICES[op], seed)
        assert torch.allclose(model(**batches[0]).logits, before, rtol=1e-3, atol=1e-4)
    plan = build_plan(model, batches, SensitivitySpec("replay", 1, ("isolated",)))
    plan |= dict.fromkeys(("model", "calibration"), "planted")
    with Journal(tmp_path / "capture", {}) as journal:
        capture, _ = capture_sensitivity(model, batches, plan, journal)
    ranking = most_sensitive_first(plan, capture)
    assert ranking[0] == op
    with Journal(tmp_path / "tradeoff", {}) as journal:
        tradeoff = measure_tradeoff(model, plan, ranking, batches[0], batches[1:], [[None]], journal)
    none, one = tradeoff["curves"]["ranking"][:2]
    assert one["sqnr_db"] > none["sqnr_db"] + 6
    target = Target(min_sqnr_db=(none["sqnr_db"] + one["sqnr_db"]) / 2)
    recommended = build_profiles({"status": "measured", **tradeoff}, target)["profiles"]["recommended"]
    assert recommended["kept"] == [op]
    assert tradeoff["gain_db"] > 0
