"""The frontier: options of each unit from its own scores, and choices that are measured on held-out batches."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import a_plan, an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.config import DecideSpec, Target
from auto_quantize_model.decide.frontier import measure_frontier, options_of
from auto_quantize_model.decide.refine import Budget
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.units import units_of
from auto_quantize_model.records import Capture, Frontier, Op, Plan, Scales, Unit
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.compressed import scheme_of, stored_bytes

CANDIDATES = ("NVFP4", "FP8_DYNAMIC")
UNIT, PAIR = "model.blocks.0.up+down", ("model.blocks.0.up", "model.blocks.0.down")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return few_ops_model()


@pytest.fixture(scope="module")
def plan(model: torch.nn.Module) -> Plan:
    """Six linears and an embedding; two of the linears form a unit."""
    modules: dict[str, Any] = dict(model.named_modules())
    ops: list[Op] = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            shape, kind = tuple(module.weight.shape), type(module).__name__
            able = CANDIDATES if kind == "Linear" else ()
            sizes = {scheme: stored_bytes(scheme_of(scheme), shape) for scheme in able}
            sizes["inc_int8"] = shape[0] * shape[1] + 4 * shape[0]
            unit = UNIT if name in PAIR else name
            refused = {} if able else dict.fromkeys(CANDIDATES, "an Embedding")
            fields = {"shape": shape, "weight_bytes": 4 * shape[0] * shape[1], "unit": unit, "stored_bytes": sizes}
            ops.append(an_op(name, kind, schemes=("inc_int8", *able), refused=refused, **fields))
    units = [Unit(UNIT, PAIR, False, CANDIDATES, {})]
    units += [unit for unit in units_of([op for op in ops if op.op_name not in PAIR], modules)]
    total = sum(parameter.numel() for parameter in model.parameters())
    coverage: Any = {
        "weights_total": total,
        "weights_planned": 0,
        "weights_kept": 0,
        "share": 1.0,
        "towers": {},
        "left_out": [],
    }
    schemes = dict.fromkeys(("inc_int8", *CANDIDATES), {})
    return a_plan(ops, units=tuple(units), schemes=schemes, measured_op="lm_head", coverage=coverage)


@pytest.fixture(scope="module")
def capture(model: torch.nn.Module, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    store = ScoreStore(tmp_path_factory.mktemp("scores"))
    found, _ = capture_sensitivity(model, token_batches(1), plan, store, candidates=CANDIDATES)
    return found


@pytest.fixture(scope="module")
def scales(model: torch.nn.Module, plan: Plan) -> Scales:
    with Replay(model, plan.ops, plan.measured_op) as replay:
        return replay.calibrate(*token_batches(1))


NO_TARGET = Target()
Measure = Callable[..., Frontier]


@pytest.fixture
def measure(model: torch.nn.Module, plan: Plan, capture: Capture, scales: Scales, tmp_path: Path) -> Measure:
    """Measures a frontier on two held-out batches; keywords are fields of the config."""

    def run(candidates: tuple[str, ...] = CANDIDATES, target: Target = NO_TARGET, **spec: Any) -> Frontier:
        store = ScoreStore(tmp_path / "scores")
        given = spec.pop("on_progress", lambda done, total: None)
        asked = DecideSpec(heldout_batches=2, **{"points": 4, **spec})
        answers: list[list[range | None]] = [[range(3, 5)], [None]]
        data = (model, plan, capture, candidates, scales, token_batches(3)[1:], answers, store, asked, target)
        return measure_frontier(*data, token_batches(1), given)

    return run


def test_a_limit_of_the_time_is_kept_where_the_config_has_times(measure: Measure) -> None:
    """NVFP4 is fast here, and FP8_DYNAMIC is as slow as an unquantized op; two ops of a unit take twice the time."""
    times = {".*": {"NVFP4": 1.0, "FP8_DYNAMIC": 3.0, "unquantized": 3.0}}
    found = measure(seconds=times, target=Target(max_seconds=15.5))
    ops = sum(len(unit.ops) for unit in found.units)
    assert found.points[-1].seconds == 3.0 * ops and {unit.seconds["NVFP4"] for unit in found.units} == {1.0, 2.0}
    fast = [point for point in found.points if point.seconds is not None and point.seconds <= 15.5]
    best = min(fast, key=lambda point: point.predicted)
    whole = [unit.bytes[scheme] for unit, scheme in zip(found.units, best.schemes, strict=True)]
    assert best.seconds > 12 and "unquantized" in best.schemes and sum(whole) + found.other_bytes == best.weight_bytes
    assert measure(seconds=times, target=Target(max_seconds=1.0)).points[0].seconds == 1.0 * ops


def test_the_choice_for_the_budget_is_refined_on_calibration_batches(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(max_bits=6.0)
    plain = measure(target=target)
    within = [point for point in plain.points if point.bits <= 6.0]
    asked: list[tuple[Any, Any, int]] = []

    def refined(self: Any, choice: Any, budget: Any) -> Any:
        asked.append((choice, budget, len(self.batches)))
        return within[0].schemes

    monkeypatch.setattr("auto_quantize_model.decide.refine.Refinement.refined", refined)
    found = measure(target=target, refine_batches=1)
    size = sum(unit.weights for unit in found.units)
    assert asked == [(within[-1].schemes, Budget(int(6.0 * size / 8)), 1)]
    (point,) = (point for point in found.points if point.name == "refined")
    assert point.divergence == within[0].divergence and len(found.points) == len(plain.points) + 1


def test_a_refined_choice_fits_and_counts_its_forwards(measure: Measure) -> None:
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    found = measure(target=Target(max_bits=6.0), refine_batches=1, on_progress=progress)
    assert seen[-1][0] <= seen[-1][1] and [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(point.bits <= 6.0 for point in found.points if point.name == "refined")


def test_an_op_without_a_time_is_named(measure: Measure) -> None:
    with pytest.raises(InputError, match=r"^decide.seconds: no time for lm_head in FP8_DYNAMIC; each op needs one"):
        measure(seconds={"model.*": {"NVFP4": 1.0, "FP8_DYNAMIC": 2.0, "unquantized": 3.0}, ".*": {"NVFP4": 1.0}})


def test_a_unit_has_the_loss_of_its_ops_together_and_their_bytes(plan: Plan, capture: Capture) -> None:
    by, units = options_of(plan, capture, CANDIDATES, DecideSpec())
    assert by == "divergence" and [unit.name for unit in units][0] == UNIT and len(units) == 5
    pair = units[0]
    (score,) = capture.of_map("units", "NVFP4")[UNIT]
    assert score and pair.loss == {
        "NVFP4": score.divergence,
        "FP8_DYNAMIC": capture.of_map("units", "FP8_DYNAMIC")[UNIT][0].divergence,  # type: ignore[union-attr]
        "unquantized": 0.0,
    }
    sizes = {op.op_name: op for op in plan.ops}
    assert pair.bytes["NVFP4"] == sum(sizes[name].stored_bytes["NVFP4"] for name in PAIR)
    assert pair.bytes["unquantized"] == sum(sizes[name].weight_bytes for name in PAIR) // 2
    assert pair.weights == 2 * 16 * 32 and pair.error == {}


def test_incs_int8_is_decided_op_by_op_next_to_fp32(plan: Plan, capture: Capture) -> None:
    _, units = options_of(plan, capture, ("inc_int8",), DecideSpec())
    assert [unit.name for unit in units] == [*PAIR, *(name for name in plan.op_names if name not in PAIR)]
    embedding = next(unit for unit in units if unit.name.endswith("embed_tokens"))
    assert embedding.bytes == {"inc_int8": 61 * 16 + 4 * 61, "unquantized": 4 * 61 * 16}


@pytest.mark.parametrize(
    ("asked", "op", "left"),
    [
        ({"fixed": {"lm_head": "unquantized"}}, "lm_head", ["unquantized"]),
        ({"fixed": {".*up": "FP8_DYNAMIC"}}, UNIT, ["FP8_DYNAMIC"]),
        ({"never": {".*project": ["NVFP4"]}}, "model.project", ["FP8_DYNAMIC", "unquantized"]),
        ({"at_least": {".*": "FP8_DYNAMIC"}}, "model.project", ["FP8_DYNAMIC", "unquantized"]),
    ],
)
def test_the_config_limits_the_options(plan: Plan, capture: Capture, asked: Any, op: str, left: list[str]) -> None:
    _, units = options_of(plan, capture, CANDIDATES, DecideSpec(**asked))
    assert list(next(unit for unit in units if unit.name == op).bytes) == left


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"fixed": {"head": "NVFP4"}},
            "decide.fixed: 'head' matches no op that can be quantized; patterns",
        ),
        (
            {"never": {"lm_head": [*CANDIDATES, "unquantized"]}},
            "decide: fixed, never and at_least together leave lm_",
        ),
        ({"fixed": {"lm_head": "inc_int8"}}, "decide.fixed: lm_head cannot have inc_int8: "),
    ],
)
def test_a_pattern_that_cannot_be_kept_is_refused(plan: Plan, capture: Capture, asked: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        options_of(plan, capture, CANDIDATES, DecideSpec(**asked))


def test_a_candidate_that_was_not_captured_is_refused(plan: Plan, capture: Capture) -> None:
    of_ops = replace(capture, scores=tuple(score for score in capture.scores if score.map != "units"))
    with pytest.raises(InputError, match=rf"^{re.escape(UNIT)} was not measured in NVFP4; capture again"):
        options_of(plan, of_ops, CANDIDATES, DecideSpec())


def test_each_choice_has_the_loss_of_its_own_state(
    measure: Measure, model: torch.nn.Module, plan: Plan, scales: Scales
) -> None:
    found = measure()
    assert found.points[-1].divergence == 0 and set(found.points[-1].schemes) == {"unquantized"}
    assert found.points[-1].weight_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    sizes = [point.weight_bytes for point in found.points]
    assert sizes == sorted(sizes) and len({point.schemes for point in found.points}) == len(sizes)
    assert {point.name for point in found.controls if point.kind == "uniform"} == set(CANDIDATES)
    assert (found.samples, found.tokens, found.answers) == (2, 48, 1)
    with Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(plan.schemes, model)) as replay:
        replay.set_scales(scales)
        losses: dict[tuple[str, ...], list[float]] = {}
        for batch in token_batches(3)[1:]:
            reference = Reference(replay.begin(batch).clone(), None)
            for point in found.points:
                record = reference.compare(replay.run(found.assignment(point)))
                losses.setdefault(point.schemes, []).append(record["divergence"])
    for point in found.points:
        assert point.divergence_by_sample == tuple(losses[point.schemes])
        assert point.divergence_low <= point.divergence <= point.divergence_high


def test_a_second_measurement_takes_all_from_the_store(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure()
    again = "a state was measured again"
    monkeypatch.setattr(Replay, "run_each", lambda _, states: pytest.fail(again) if states else iter(()))
    assert measure() == first


def test_the_smallest_choice_within_a_target_is_searched(measure: Measure) -> None:
    before = measure()
    middle = before.points[1].divergence
    target = Target(max_divergence=(before.points[0].divergence + middle) / 2)
    counts: list[tuple[int, int]] = []
    found = measure(target=target, on_progress=lambda done, total: counts.append((done, total)))
    between = [point for point in found.points if point not in before.points]
    assert between and all(point.weight_bytes < before.points[1].weight_bytes for point in between)
    assert counts[-1][0] == counts[-1][1]


def test_a_budget_of_the_config_is_a_point(measure: Measure) -> None:
    sizes = {point.bits for point in measure().points}
    (point,) = (point for point in measure(target=Target(max_bits=6.0)).points if point.bits not in sizes)
    assert 5.5 < point.bits <= 6.0


def test_nothing_to_decide_is_refused(plan: Plan, capture: Capture, measure: Measure) -> None:
    with pytest.raises(InputError, match=r"^no op that ran can have W8A8, so nothing can be decided; change decide"):
        measure(candidates=("W8A8",))
