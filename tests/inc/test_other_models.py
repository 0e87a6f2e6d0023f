"""Plans of other models: heads whose output is changed, fused ReLUs, ops without a site, and models without INC."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from build import a_calibration_manifest, a_model_manifest
from quick_inc import VOCABULARY, WIDTH, FewOps, few_ops_model, plans_unchecked, token_batches

from auto_quantize_model.config import PlanSpec, Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.files import InputError
from auto_quantize_model.inc import plan as planning
from auto_quantize_model.inc.audit import audit_capture
from auto_quantize_model.inc.engine import measure_by_inc
from auto_quantize_model.inc.plan import build_plan, find_output_op, identify
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.served_audit import audit_served
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Audit, Capture, NotMeasured, Plan, digest_of_record
from auto_quantize_model.replay.calibrate import calibrate
from auto_quantize_model.replay.scales import ALL_BATCHES
from auto_quantize_model.report.document import build_report, render

MAPS = ("isolated", "fallback", "requantize")
IDENTITY = a_model_manifest(), a_calibration_manifest(), "3" * 64
Batches = list[dict[str, torch.Tensor]]


def spec(**changes: Any) -> PlanSpec:
    return PlanSpec(**{"confidence_batches": 1, "maps": ("isolated",), **changes})


def captured(model: Any, batches: Batches, plan: Plan, path: Any) -> Capture:
    return capture_sensitivity(model, batches, plan, ScoreStore(path), by_inc=measure_by_inc)[0]


def mse_values(capture: Capture) -> dict[tuple[str, str], float]:
    return {(score.map, score.op_name): score.mse_value for score in capture.scores}


def reported(plan: Plan, capture: Capture, audit: Audit) -> dict[str, Any]:
    missing = NotMeasured("not_measured", "decide.heldout_batches is 0")
    capture = replace(capture, batches=tuple(replace(batch, sample_ids=("a",)) for batch in capture.batches))
    profiles = build_profiles(missing, plan, Target())
    return build_report(a_model_manifest(), a_calibration_manifest(), plan, capture, audit, missing, profiles)


class Seer(torch.nn.Module):
    """Patches of an image, then Linears with ReLUs, as in an older vision tower."""

    def __init__(self, patches: torch.nn.Conv2d) -> None:
        super().__init__()
        self.patches = patches
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.relu = torch.nn.ReLU()
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        out: torch.Tensor = torch.nn.functional.relu(self.down(self.relu(self.up(seen))))
        return out


class SeesAndReads(torch.nn.Module):
    def __init__(self, patches: torch.nn.Conv2d) -> None:
        super().__init__()
        self.visual = Seer(patches)
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> SimpleNamespace:
        hidden = torch.cat([self.visual(pixel_values), self.embed_tokens(input_ids)], dim=1)
        return SimpleNamespace(logits=self.lm_head(hidden))


def seeing(**changes: Any) -> tuple[Any, Batches]:
    """The model and one batch; `changes` are those of the convolution, which cuts patches of 4 x 4."""
    torch.manual_seed(0)
    patches = torch.nn.Conv2d(**{"in_channels": 3, "out_channels": WIDTH, "kernel_size": 4, "stride": 4, **changes})
    model = SeesAndReads(patches).eval().requires_grad_(False)
    return model, [token_batches(1)[0] | {"pixel_values": torch.randn(1, 3, 16, 16)}]


@pytest.mark.slow
def test_a_patch_embedding_and_fused_relus_have_incs_values_in_every_map(tmp_path: Any) -> None:
    model, batches = seeing()
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


@pytest.mark.slow
def test_an_op_that_no_site_reproduces_stays_in_fp32_with_its_reason_and_inc_agrees(tmp_path: Any) -> None:
    model, batches = seeing(kernel_size=3, stride=2, padding=1)
    plan = identify(build_plan(model, batches, spec(maps=MAPS[:2])), *IDENTITY)
    assert plan.op_names == ["visual.up", "visual.down", "embed_tokens", "lm_head"]
    (left,) = (module for module in plan.excluded if module.op_name == "visual.patches")
    reason = "a Conv2d whose stride is not its kernel, or that has padding, dilation or groups"
    assert (left.op_type, left.reason) == ("Conv2d", reason)
    assert plan.keep == {"op_type_dict": {}, "op_name_dict": {r"visual\.patches": "fp32"}}
    assert plan.coverage["weights_kept"] == 0  # the user did not choose it
    group = next(group for group in plan.coverage["left_out"] if group["pattern"] == "visual.patches")
    assert (group["class"], group["reason"]) == ("Conv2d", reason)
    capture = captured(model, batches, plan, tmp_path)
    audit = audit_capture(model, batches, plan, capture, 4)
    assert (audit.status, audit.by, audit.compared) == ("bit_identical", "inc", 8)
    assert render(reported(plan, capture, audit))[0].count(reason) == 2


@pytest.mark.slow
def test_with_auto_the_same_op_stays_in_the_plan_for_inc() -> None:
    model, batches = seeing(kernel_size=3, stride=2, padding=1)
    with plans_unchecked():
        assert "visual.patches" in build_plan(model, batches, spec(engine="auto")).op_names


class Changed(FewOps):
    """A model that changes what its head returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.passing = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout())

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = self.lm_head(self.model(input_ids))
        changes = {
            "capped": lambda: 3 * torch.tanh(logits / 3),
            "scaled": lambda: logits / 8,
            "viewed": lambda: logits,
            "cut": lambda: logits[:, :, :-1],
            "passed": lambda: self.passing(logits),
        }
        return SimpleNamespace(logits=changes[self.kind]())


def changed(kind: str) -> Any:
    model = Changed(kind).eval().requires_grad_(False)
    model.load_state_dict(few_ops_model().state_dict())
    return model


@pytest.mark.parametrize(
    ("kind", "head_only"), [("capped", True), ("scaled", True), ("viewed", False), ("passed", False)]
)
def test_a_model_that_changes_its_logits_is_measured_at_its_head(kind: str, head_only: bool) -> None:
    assert find_output_op(changed(kind), token_batches(1)[0]) == ("lm_head", head_only)


def test_logits_of_another_shape_than_the_heads_output_are_refused() -> None:
    with pytest.raises(InputError, match="the model's logits come from no single module"):
        find_output_op(changed("cut"), token_batches(1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capped", "scaled"])
def test_such_a_model_has_the_scores_of_the_model_that_changes_nothing_and_the_report_says_so(
    kind: str, tmp_path: Any
) -> None:
    batches = token_batches(1)
    model = changed(kind)
    plan = identify(build_plan(model, batches, spec()), *IDENTITY)
    assert (plan.measured_op, plan.head_only) == ("lm_head", True)
    capture = captured(model, batches, plan, tmp_path / "a")
    plain = replace(plan, head_only=False)
    assert mse_values(capture) == mse_values(captured(few_ops_model(), batches, plain, tmp_path / "b"))
    audit = audit_capture(model, batches, plan, capture, 2)
    assert (audit.status, audit.by) == ("bit_identical", "inc")
    report = reported(plan, capture, audit)
    said = "The model scales or caps what lm_head returns. Errors and divergences are those of the output of that op"
    assert any(warning.startswith(said) for warning in report["warnings"])
    assert report["measurement"]["head_only"] and "The model scales or caps what lm" in render(report)[0]
    again = reported(plain, replace(capture, plan_digest=digest_of_record(plain)), audit)
    assert said not in " ".join(again["warnings"])


def refuse(*_: Any) -> Any:
    raise AttributeError("no such thing\nand a long story")


SERVED = ("FP8_DYNAMIC", "W8A8", "FP8", "NVFP4")


@pytest.fixture(scope="module")
def without_inc() -> tuple[Any, Batches, Plan]:
    model, batches = few_ops_model(), token_batches(2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_strategy", "check_inc", "run_planned_pass"):
            patch.setattr(planning, name, refuse)
        plan = build_plan(model, batches, spec(schemes=SERVED, confidence_batches=2, maps=MAPS))
    return model, batches, identify(plan, *IDENTITY)


def test_without_incs_scheme_inc_is_not_called_and_every_linear_is_an_op(
    without_inc: tuple[Any, Batches, Plan],
) -> None:
    _, _, plan = without_inc
    assert plan.inc_check == {"status": "not_asked"}
    blocks = [f"model.blocks.{number}.{name}" for number in (0, 1) for name in ("up", "down")]
    assert plan.op_names == [*blocks, "model.project", "lm_head"] and plan.measured_op == "lm_head"
    assert all(op.inc_int8 is None and "inc_int8" not in (*op.schemes, *op.refused) for op in plan.ops)
    assert all("inc_int8" not in op.stored_bytes and op.executions == (1, 1) for op in plan.ops)
    reason = "schemes of compressed-tensors quantize a Linear, and this is none"
    assert [(module.op_name, module.reason) for module in plan.excluded] == [("model.embed_tokens", reason)]
    assert plan.main_scheme == "FP8_DYNAMIC" and "inc_int8" not in plan.schemes


@pytest.mark.slow
def test_without_incs_scheme_all_is_measured_and_audited_by_the_library_alone(
    without_inc: tuple[Any, Batches, Plan], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, plan = without_inc
    monkeypatch.setattr(planning, "build_strategy", refuse)
    scales = calibrate(model, plan, batches, whole_set=True)
    of_batches, of_all = [scales["batch_0"], scales["batch_1"]], scales[ALL_BATCHES]
    capture, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), of_batches, of_all=of_all)
    assert {score.scheme for score in capture.scores} == {*SERVED}
    assert {score.map for score in capture.scores} == {"isolated", "all"}
    audit = audit_capture(model, batches, plan, capture, 2)
    assert (audit.status, audit.compared) == ("not_measured", 0)
    compared = audit_served(model, batches, 0, plan, capture, 2, of_all)
    assert {*compared} == {*SERVED, "a mixed assignment"} and all(compared.values())
    report = reported(plan, capture, replace(audit, served=compared))
    assert report["main_scheme"] == "FP8_DYNAMIC" and not any("Intel" in warning for warning in report["warnings"])
    assert [row["op_name"] for row in report["maps"]["isolated"]["ops"]] != plan.op_names
    markdown, _ = render(report)
    assert "The sensitivity of each op in FP8_DYNAMIC, by its KL divergence: 6 of 6 planned ops" in markdown


def test_without_incs_scheme_what_the_config_keeps_is_kept() -> None:
    plan = build_plan(few_ops_model(), token_batches(1), spec(schemes=SERVED, op_name_dict={".*up": "fp32"}))
    assert not [name for name in plan.op_names if name.endswith("up")] and len(plan.op_names) == 4
    kept = {module.op_name: module.reason for module in plan.excluded}
    assert kept["model.blocks.0.up"] == "kept in FP32 by sensitivity.op_name_dict['.*up']"
    assert plan.coverage["weights_kept"] == 2 * 2 * WIDTH * WIDTH
    for wanted, message in (
        ({"op_name_dict": {"lm_haed": "fp32"}}, r"lm_haed'\] matches no op of the model; ops are model.blocks"),
        ({"op_type_dict": {"Linear": "fp32"}}, "nothing is left to measure"),
        ({"confidence_batches": 3}, "confidence_batches is 3, but the calibration set makes 1 batches"),
        ({"engine": "inc"}, "engine inc measures with INC, and inc_int8 is not measured here; set it to replay"),
    ):
        with pytest.raises(InputError, match=message):
            build_plan(few_ops_model(), token_batches(1), spec(schemes=SERVED, **wanted))


def test_where_inc_cannot_plan_the_other_schemes_are_measured_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(planning, "build_strategy", refuse)
    model, batches = few_ops_model(), token_batches(1)
    plan = identify(build_plan(model, batches, spec(schemes=("inc_int8", "W8A8"))), *IDENTITY)
    why = "INC cannot plan this model: INC raises AttributeError (no such thing)"
    assert plan.inc_check == {"status": "no_plan", "reason": why}
    assert list(plan.schemes) == ["W8A8"] and plan.main_scheme == "W8A8" and len(plan.ops) == 6
    capture = captured(model, batches, plan, tmp_path)
    report = reported(plan, capture, audit_capture(model, batches, plan, capture, 2))
    said = f"inc_int8 is not measured: {why}. The other schemes need no plan of Intel Neural Compressor."
    assert report["warnings"][1:] == [said]  # the first names the Embedding, which no other scheme quantizes
    assert "not measured: INC cannot plan this model: INC raises AttributeError" in render(report)[0]


def test_with_incs_scheme_alone_an_error_of_incs_plan_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "build_strategy", refuse)
    with pytest.raises(InputError) as refused:
        build_plan(few_ops_model(), token_batches(1), spec())
    assert str(refused.value) == (
        "INC cannot plan this model: INC raises AttributeError (no such thing); add a scheme of compressed-tensors,"
        " such as W8A8, to sensitivity.schemes, because such schemes need no plan of INC"
    )


@pytest.mark.slow
def test_where_the_replay_has_another_int8_than_inc_the_other_schemes_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.functional, "silu", torch.tanh)  # INC computes it in INT8
    plan = build_plan(few_ops_model(), token_batches(1), spec(schemes=("inc_int8", "W8A8")))
    assert plan.inc_check["status"] == "no_plan" and list(plan.schemes) == ["W8A8"]
    assert plan.inc_check["reason"].startswith("with every op in INT8, the replay has a sum of squared errors of")
