"""Why units break: planted causes are found, cures regain what they should, and only held-out data confirms them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from build import a_cause, a_frontier, a_plan, a_point, a_why, an_op, profiles_of
from quick_inc import token_batches

from auto_quantize_model.decide.causes import explain, skipped, subjects_of
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Cause, Cure, Frontier, Op, Options, Plan, Profile, Profiles, Why, body_of
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.report.explanations import explained as sentences_of

STATIC = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
}
SCHEMES: dict[str, Any] = {
    "inc_int8": {},
    "STATIC": STATIC,
    "W8A8": {},
    "FP8_DYNAMIC": {},
    "W4": {"weights": {"num_bits": 4, "strategy": "tensor"}},
}
WIDTH, CHANNEL = 32, 21


class Model(torch.nn.Module):
    """A norm, two Linears that form a unit, and a head. `positive` makes the inputs of the head one-sided."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(61, WIDTH)
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.gate_proj, self.up_proj = torch.nn.Linear(WIDTH, 48), torch.nn.Linear(WIDTH, 48)
        self.lm_head = torch.nn.Linear(48, 61)
        self.positive = False

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.norm(self.embed_tokens(input_ids))
        gated = torch.sigmoid(self.gate_proj(hidden)) * self.up_proj(hidden)
        return SimpleNamespace(logits=self.lm_head(gated.abs() + 1 if self.positive else gated))


UNIT = ("gate_proj", "up_proj")


def planted(change: Callable[[Any], None] = lambda model: None) -> Any:
    torch.manual_seed(0)
    model: Any = Model().eval().requires_grad_(False)
    for module in (model.gate_proj, model.up_proj, model.lm_head):
        module.weight.data *= 3
    change(model)
    return model


def outlier(model: Any) -> None:
    """One channel of the norm is large, and the columns that read it are small: the same function."""
    model.norm.weight.data[CHANNEL] *= 100
    for module in (model.gate_proj, model.up_proj):
        module.weight.data[:, CHANNEL] /= 100


def planned(model: Any) -> Plan:
    modules, ops = dict(model.named_modules()), list[Op]()
    for name in (*UNIT, "lm_head"):
        shape = tuple(modules[name].weight.shape)
        unit = "gate_proj+up_proj" if name in UNIT else name
        ops.append(an_op(name, schemes=tuple(SCHEMES), shape=shape, unit=unit))
    return a_plan(ops, schemes=SCHEMES, measured_op="lm_head")


def unit_in(ops: tuple[str, ...], scheme: str, loss: float = 1.0) -> Options:
    return Options("+".join(ops), ops, 8, {scheme: 8, "unquantized": 16}, {scheme: loss, "unquantized": 0.0}, {})


Explain = Callable[..., Why]


@pytest.fixture
def explained(tmp_path: Path) -> Explain:
    """Explains units of a model in one scheme, in which the profile `smallest` has them."""

    def run(model: Any, scheme: str, *units: tuple[str, ...], **changes: Any) -> Why:
        plan, calibration, heldout = planned(model), token_batches(4), token_batches(8)[4:]
        with Replay(model, plan.ops, plan.measured_op) as replay:
            scales = replay.calibrate(*calibration)
        store, answers = ScoreStore(tmp_path / "scores"), [[None]] * len(heldout)
        assignment = {name: scheme for ops in units for name in ops}
        with HeldOut(model, plan, scales, heldout, answers, store) as on_heldout:
            (found,) = on_heldout.measure([assignment])
        point = a_point([scheme] * len(units), **found)
        frontier = replace(
            a_frontier((), [point]), candidates=(scheme,), units=tuple(unit_in(ops, scheme) for ops in units)
        )
        profiles = profiles_of({"smallest": Profile(point, assignment, ())})
        seen = {name: (of.input.percentiles if of.input else None) or {} for name, of in scales.items()}
        data = (model, plan, frontier, profiles, scales, seen, calibration, heldout, store)
        return explain(*data, **changes)

    return run


def cure_of(cause: Cause, kind: str) -> Cure:
    return next(cure for cure in cause.cures if cure.kind == kind)


def test_a_planted_outlier_channel_is_named_and_smoothing_regains_most_of_the_loss(explained: Explain) -> None:
    why = explained(planted(outlier), "STATIC", UNIT)
    (cause,) = why.causes
    assert [channel.index for channel in cause.inputs.outliers] == [CHANNEL]
    damage = [part.heldout.divergence for part in (cause.whole, cause.inputs_alone, cause.weight_alone) if part.heldout]
    assert damage[1] > 0.5 * damage[0] > 10 * damage[2]
    cure = cure_of(cause, "smoothing")
    assert cure.folds_into == "norm" and cure.is_free and cure.regained and cure.regained > 0.9 * damage[0]
    assert set(cause.strengths) == {"0.3", "0.5", "0.65", "0.8"}
    assert cause.cure and "smoothing" in cause.cure.settings
    cured = why.cured["smallest"]
    assert cured.units == (cause.unit,) and cured.is_confirmed
    assert cured.divergence is not None and cured.divergence < 0.2 * cured.before
    assert cured.before == pytest.approx(damage[0], rel=1e-6)


def test_the_whole_is_the_score_of_the_unit_alone(explained: Explain) -> None:
    model = planted()
    (cause,) = explained(model, "FP8_DYNAMIC", UNIT).causes
    plan = planned(model)
    with Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(SCHEMES, model)) as replay:
        reference = Reference(replay.begin(token_batches(1)[0]).clone(), None)
        found = reference.compare(replay.run(dict.fromkeys(UNIT, "FP8_DYNAMIC")))
    assert cause.whole.calibration.divergence == pytest.approx(found["divergence"], rel=1e-12)


def test_a_scheme_of_weights_alone_costs_nothing_at_its_inputs(explained: Explain) -> None:
    def far_out(model: Any) -> None:
        model.lm_head.weight.data[7, 5] = 4.0

    (cause,) = explained(planted(far_out), "W4", ("lm_head",)).causes
    assert cause.weight_alone == cause.whole
    assert cause.inputs_alone.heldout and cause.inputs_alone.heldout.divergence == 0
    assert cause.inputs_alone.heldout.sqnr_db is None
    assert (cause.weight.worst_op, cause.weight.worst_row) == ("lm_head", 7)
    clipped = cure_of(cause, "mse_weight")
    assert clipped.is_confirmed and clipped.extra_bytes == 0
    assert cure_of(cause, "percentile_inputs").reason == "the scheme does not quantize inputs"
    assert cure_of(cause, "smoothing").folds_into == "up_proj"


def test_one_sided_inputs_are_cured_by_asymmetric_ranges(explained: Explain) -> None:
    (cause,) = explained(planted(lambda model: setattr(model, "positive", True)), "STATIC", ("lm_head",)).causes
    cure = cure_of(cause, "asymmetric_inputs")
    assert cure.is_confirmed and cure.extra_bytes == 1  # the zero_point of the static inputs
    smoothing = cure_of(cause, "smoothing")
    assert smoothing.at_run_time.endswith("comes directly before the op") and not smoothing.is_free
    assert smoothing.extra_bytes == 2 * 48  # a scale in BF16 for each column
    assert (
        cause.chosen != "smoothing" and cure_of(cause, "percentile_inputs").damage and cause.inputs.image_range is None
    )


def test_a_cure_that_a_scheme_cannot_have_has_a_reason(explained: Explain) -> None:
    (cause,) = explained(planted(), "FP8_DYNAMIC", UNIT).causes
    assert cure_of(cause, "asymmetric_inputs").reason == "floating-point values have no zero_point"
    assert cure_of(cause, "percentile_inputs").reason.startswith("each input has its own scale")


def test_a_second_run_takes_all_from_the_store_and_the_model_stays_as_it_was(
    explained: Explain, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counts = planted(outlier), list[tuple[int, int]]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = explained(model, "W8A8", UNIT, on_progress=lambda done, total: counts.append((done, total)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert counts[-1][0] <= counts[-1][1] and counts[-1][0] == len(counts)
    again = "a state was measured again"
    monkeypatch.setattr(Replay, "run_each", lambda _, states: pytest.fail(again) if states else iter(()))
    assert explained(model, "W8A8", UNIT) == first


def test_the_worst_units_and_those_of_each_profile_are_explained() -> None:
    units = [
        Options(name, (name,), 8, {"A": 4, "B": 8}, {"A": loss, "B": loss / 100, "C": 0.0}, {})
        for name, loss in zip("abcdefg", (1.0, 7.0, 3.0, 6.0, 5.0, 4.0, 2.0), strict=True)
    ]
    frontier: Frontier = replace(a_frontier((), []), units=tuple(units), candidates=("A", "B", "C"))
    plan = a_plan(["a"], schemes={"A": {}, "B": {}, "C": {"checkpoint": "folder"}})
    profiles: Profiles = profiles_of(
        {"smallest": Profile(a_point(["A", "B", "A", "B", "B", "B", "unquantized"]), {}, ())}
    )
    found = [(subject.unit.name, subject.scheme, subject.profiles) for subject in subjects_of(plan, frontier, profiles)]
    assert found == [("b", "A", ()), ("d", "A", ()), ("e", "A", ()), ("c", "A", ("smallest",))]


def test_experts_are_not_explained_and_that_is_said() -> None:
    """Their loss is the largest, in their scheme and in that of a profile."""
    experts = tuple(f"layers.0.experts.up_proj.{number}" for number in (0, 1))
    ops = [an_op(name, unit="layers.0.experts", expert=True) for name in experts]
    plan = a_plan([*ops, an_op("lm_head")], schemes={"W8A8": {}, "C": {"checkpoint": "folder"}})
    rows = (unit_in(experts, "W8A8", 9.0), unit_in(("lm_head",), "W8A8", 0.5))
    units = (replace(rows[0], name="layers.0.experts"), rows[1])
    frontier: Frontier = replace(a_frontier((), []), units=units, candidates=("W8A8", "C"))
    profiles = profiles_of({"smallest": Profile(a_point(["W8A8", "W8A8"]), {}, ())})
    assert [subject.unit.name for subject in subjects_of(plan, frontier, profiles)] == ["lm_head"]
    of_experts = "Each expert has other inputs, so the experts of 1 block are not explained"
    of_checkpoint = "C is the scheme of a checkpoint, whose tool has chosen its ranges, so that scheme is not explained"
    assert skipped(plan, frontier) == (of_checkpoint, of_experts)
    assert skipped(a_plan(["lm_head"], schemes={"W8A8": {}}), replace(frontier, candidates=("W8A8",))) == ()
    why = replace(a_why(a_cause()), skipped=skipped(plan, frontier))
    assert sentences_of({"why": body_of(why)}).endswith(f"They do not rank units. {of_checkpoint}. {of_experts}.")
