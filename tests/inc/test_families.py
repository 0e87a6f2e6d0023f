"""Plans of models that are no plain transformer: other heads, fused ReLUs, ops without a site, and models without INC."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from build import IDENTITY, a_calibration_manifest, a_model_manifest
from quick_inc import VOCABULARY, WIDTH, few_ops_model, token_batches

from auto_quantize_model.config import PlanSpec, Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.files import InputError
from auto_quantize_model.inc import plan as planning
from auto_quantize_model.inc.audit import audit_capture
from auto_quantize_model.inc.engine import measure_by_inc
from auto_quantize_model.inc.plan import build_plan, find_output_op, identify
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import output_at, squared_error
from auto_quantize_model.measure.served_audit import audit_served
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Audit, Capture, NotMeasured, Plan
from auto_quantize_model.replay.calibrate import calibrate
from auto_quantize_model.replay.scales import ALL_BATCHES
from auto_quantize_model.report.document import build_report, render

MAPS = ("isolated", "fallback", "requantize")
Batches = list[dict[str, torch.Tensor]]


def spec(**changes: Any) -> PlanSpec:
    return PlanSpec(**{"confidence_batches": 1, "maps": ("isolated",), **changes})


def captured(model: Any, batches: Batches, plan: Plan, path: Any) -> Capture:
    return capture_sensitivity(model, batches, plan, ScoreStore(path), by_inc=measure_by_inc)[0]


def mse_values(capture: Capture) -> dict[tuple[str, str], float]:
    return {(score.map, score.op_name): score.mse_value for score in capture.scores}


def reported(plan: Plan, capture: Capture, audit: Audit) -> dict[str, Any]:
    missing = NotMeasured("not_measured", "decide.heldout_batches is 0")
    profiles = build_profiles(missing, plan, Target())
    return build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, audit, missing, profiles)


class Seer(torch.nn.Module):
    """Patches of an image, then Linears with ReLUs, as in an older vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, WIDTH, 4, stride=4)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.relu = torch.nn.ReLU()
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        out: torch.Tensor = torch.nn.functional.relu(self.down(self.relu(self.up(seen))))
        return out


class SeesAndReads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Seer()
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> SimpleNamespace:
        hidden = torch.cat([self.visual(pixel_values), self.embed_tokens(input_ids)], dim=1)
        return SimpleNamespace(logits=self.lm_head(hidden))


def frozen(model: torch.nn.Module) -> Any:
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_a_patch_embedding_and_fused_relus_have_incs_values_in_every_map(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = frozen(SeesAndReads())
    batches = [token_batches(1)[0] | {"pixel_values": torch.randn(1, 3, 16, 16)}]
    plan = identify(build_plan(model, batches, spec(maps=MAPS)), *IDENTITY)
    patterns = {op.op_name: op.inc_int8.pattern for op in plan.ops if op.inc_int8}
    assert patterns == {
        "visual.patches": "Conv2d",
        "visual.up": "LinearReLU",
        "visual.down": "LinearReLU",
        "embed_tokens": "Embedding",
        "lm_head": "Linear",
    }
    replayed = captured(model, batches, plan, tmp_path / "a")
    by_inc = captured(model, batches, replace(plan, engine="inc"), tmp_path / "b")
    assert mse_values(replayed) == mse_values(by_inc)
    assert len(mse_values(replayed)) == 3 * 5 + 1 and min(mse_values(replayed).values()) > 0
    # torch's own modules, which audit where INC cannot, have these values too.
    by_torch = replace(plan, inc_check={"status": "cannot", "reason": "a test"})
    audit = audit_capture(model, batches, by_torch, captured(model, batches, by_torch, tmp_path / "c"), 5)
    assert (audit.status, audit.by, audit.compared) == ("bit_identical", "torch", 15)
