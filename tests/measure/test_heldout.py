"""Keep-lists are measured on the model itself, with the scales of the calibration, and compared with controls."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.config import PlanSpec, TradeoffSpec
from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.measure.heldout import (
    _of_batch,
    gain,
    greedy_order,
    greedy_runs,
    keep_sizes,
    losses,
    measure_tradeoff,
    model_bytes,
    orders,
    summary,
)
from auto_quantize_model.measure.metrics import Reference, right_answers
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import Sample, answer_span, encode
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Plan
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.scheme import assigned


@pytest.fixture(scope="module")
def model(tiny_snapshot: Path) -> torch.nn.Module:
    return load_model(tiny_snapshot)


@pytest.fixture(scope="module")
def plan(model: torch.nn.Module, batches: Any) -> Plan:
    return build_plan(model, batches, PlanSpec(confidence_batches=1, maps=("isolated",)))


def lines_of(folder: Path) -> int:
    """How many scores a store holds."""
    return sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("*.jsonl"))


@given(st.integers(1, 2000))
def test_keep_lists_grow_from_none_to_all(ops: int) -> None:
    sizes = keep_sizes(ops)
    assert sizes == sorted(set(sizes)) and sizes[0] == 0 and sizes[-1] == ops
    assert all(after <= 1.5 * before for before, after in zip(sizes[3:], sizes[4:], strict=False))
    assert set(keep_sizes(ops, 5)) - set(sizes) <= {5}
    assert (5 in keep_sizes(ops, 5)) == (ops >= 5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_every_order_holds_every_op_once(sizes: list[int]) -> None:
    ranking = [f"op{number}" for number in range(len(sizes))]
    found = orders(ranking, dict(zip(ranking, sizes, strict=True)))
    assert all(sorted(names) == sorted(ranking) for names in found.values())
    assert found["inverse"] == ranking[::-1]
    weights = [sizes[ranking.index(name)] for name in found["weight_bytes"]]
    assert weights == sorted(sizes, reverse=True)


def curve(*values: float | None) -> list[tuple[int, float | None]]:
    return list(zip((0, 1, 3), values, strict=True))


def test_the_gain_is_the_area_between_two_curves_in_which_each_doubling_counts_the_same() -> None:
    # 1 + kept is 1, 2 and 4: two doublings.
    assert gain(curve(10, 20, 30), curve(10, 10, 30)) == pytest.approx(5)
    assert gain(curve(10, 20, 40), curve(10, 10, 10)) == pytest.approx((5 + 20) / 2)
    assert gain(curve(10, 20, None), curve(10, 10, None)) == 5
    assert gain(curve(10, 20, 90), curve(10, 10, 10), 1.5) == 5
    assert gain(curve(10, None, None), curve(10, None, None)) is None


def test_an_answer_is_found_where_the_template_puts_it(processor: Any) -> None:
    (sample,) = digit_samples([0])
    span = answer_span(sample, processor, LIMITS)
    assert span is not None
    ids = encode(sample, processor, LIMITS)["input_ids"][0, span.start : span.stop]
    assert processor.tokenizer.decode(ids) == sample.answer
    assert answer_span(Sample("words", "Which?"), processor, LIMITS) is None


def test_an_answer_is_right_where_each_of_its_tokens_is_the_most_likely_one() -> None:
    logits = torch.eye(5)[torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])]  # after each position the next number
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 4, 3]])}
    assert right_answers(logits, batch, [range(1, 3), range(1, 3)]) == 1
    assert right_answers(logits, batch, [None, range(3, 4)]) == 1


def test_a_batch_that_is_begun_keeps_the_scales_of_the_calibration(model: Any, plan: Any, batches: Any) -> None:
    everything = assigned(plan.op_names)
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batches[0])
        calibrated = replay.run(everything).clone()
        replay.calibrate(batches[1])
        other_scales = replay.run(everything).clone()
        replay.calibrate(batches[0])
        with torch.no_grad():
            assert torch.equal(replay.begin(batches[1]), model(**batches[1]).logits)
        assert not torch.equal(replay.run(everything), other_scales)
        replay.begin(batches[0])
        assert torch.equal(replay.run(everything), calibrated)


def test_scales_are_of_all_calibration_batches_and_an_op_counts_its_runs_of_one(
    model: Any, plan: Any, batches: Any
) -> None:
    everything = assigned(plan.op_names)
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batches[1])
        (alone, executions), order = (replay.run(everything).clone(), replay.executions), replay.order
        together = replay.calibrate(*batches)
        assert (replay.executions, replay.order) == (executions, order)
        assert not torch.equal(replay.run(everything), alone)
        first = replay.calibrate(*batches[::-1])
        # Histograms are merged in the order of the batches; they cover the same range.
        for name, scales in together.items():
            assert first[name].in_scale == pytest.approx(scales.in_scale, rel=0.05)


def test_the_worst_batch_stands_beside_the_sum_of_all() -> None:
    records = [{"mse_value": error, "kl_divergence": 0.1, "top1_agreement": 1.0, "right": 0} for error in (1.0, 4.0)]
    point = summary(records, [100.0, 40.0], 0)
    assert point["sqnr_db_lowest"] == pytest.approx(10) and point["relative_error"] == 5 / 140
    records[1]["mse_value"] = records[0]["mse_value"] = 0.0
    assert summary(records, [100.0, 40.0], 0)["sqnr_db_lowest"] is None


class Overflowing:
    """Stands for a replay whose FP32 output is ones, or another value, and whose INT8 output is infinite."""

    def __init__(self, value: float = 1.0) -> None:
        self.output = torch.full((1, 2, 3), value)

    def begin(self, batch: Any) -> torch.Tensor:
        return self.output

    def run(self, ops: Any) -> torch.Tensor:
        return self.output + math.inf


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "held-out batch 0, list ranking/4: mse_value of the model with a, b, c and 1 more in FP32 is inf; keep"),
        (0.0, "held-out batch 0: the sum of squares of the FP32 output is 0.0, so errors cannot be divided by the sum"),
        (math.nan, "held-out batch 0: the sum of squares of the FP32 output is nan, so errors cannot be divided"),
    ],
)
def test_a_value_that_is_no_number_is_named_with_its_list(tmp_path: Path, value: float, message: str) -> None:
    replay: Any = Overflowing(value)
    with ScoreStore(tmp_path).shelf({}) as shelf, pytest.raises(InputError, match=f"^{message}"):
        _of_batch(replay, 0, {}, [None], list("abcdef"), {frozenset("abcd"): "ranking/4"}, shelf, print)


def test_the_greedy_refinement_names_a_value_that_is_no_number(tmp_path: Path) -> None:
    replay: Any = Overflowing()
    reference = Reference(replay.output, None)
    with (
        ScoreStore(tmp_path).shelf({}) as shelf,
        pytest.raises(
            InputError, match="^greedy refinement: mse_value of the model with a in FP32 is inf; keep the ops"
        ),
    ):
        greedy_order(replay, reference, ["a", "b"], TradeoffSpec(greedy_candidates=2, greedy_ops=1), shelf, print)


def test_an_interrupted_measurement_goes_on_and_gives_the_same(
    model: Any, plan: Any, batches: Any, tmp_path: Path
) -> None:
    ranking, greedy = plan.op_names, TradeoffSpec(greedy_candidates=2, greedy_ops=2)
    data = (model, plan, ranking, batches[:1], batches[1:], [[None]])

    def stop_half_way(done: int, total: int) -> None:
        if 2 * done > total > greedy_runs(greedy, len(ranking)):
            raise KeyboardInterrupt

    stopped, whole = ScoreStore(tmp_path / "stopped"), ScoreStore(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure_tradeoff(*data, stopped, greedy, on_progress=stop_half_way)
    left = lines_of(tmp_path / "stopped")
    assert measure_tradeoff(*data, stopped, greedy) == measure_tradeoff(*data, whole, greedy)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "stopped") > left
    measure_tradeoff(*data, stopped, greedy)
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")  # measured no more


def test_the_curves_begin_and_end_together(model: Any, plan: Any, batches: Any, tmp_path: Path) -> None:
    ranking = plan.op_names
    answers: list[list[range | None]] = [[None]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = ScoreStore(tmp_path)
    found = measure_tradeoff(model, plan, ranking, batches[:1], batches[1:], answers, store)
    for points in found.curves.values():
        assert points[0] == found.curves["ranking"][0]
        assert points[-1].relative_error == 0 and points[-1].sqnr_db is None
        assert points[-1].weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
        assert [name for point in points for name in point.added] != []
    first = found.curves["ranking"][0]
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = replay.calibrate(batches[0])
        reference = replay.begin(batches[1]).clone()
        error = float((reference - replay.run(assigned(ranking))).pow(2).sum())
    assert math.isclose(first.relative_error, error / float(reference.double().pow(2).sum()), rel_tol=1e-6)
    assert first.accuracy is None and found.answers == 0
    # Scales that a calibration found before give the same.
    assert found == measure_tradeoff(
        model, plan, ranking, batches[:1], batches[1:], answers, ScoreStore(tmp_path / "other"), scales=scales
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found == measure_tradeoff(model, plan, ranking, batches[:1], batches[1:], answers, store)


def test_greedy_keeps_what_helps_most_in_the_state_reached(model: Any, plan: Any, batches: Any, tmp_path: Path) -> None:
    ranking = plan.op_names
    ops, greedy = frozenset(ranking), TradeoffSpec(greedy_candidates=3, greedy_ops=2)
    found = measure_tradeoff(model, plan, ranking, batches[:1], batches[1:], [[None]], ScoreStore(tmp_path), greedy)
    chosen = [name for point in found.curves["greedy"] for name in point.added]
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batches[0])
        reference = replay.measured.clone()

        def error(kept: set[str]) -> float:
            return float((reference - replay.run(assigned(ops - kept))).pow(2).sum())

        first = min(ranking[:3], key=lambda name: error({name}))
        left = [name for name in ranking if name != first][:3]
        assert chosen == [first, min(left, key=lambda name: error({first, name}))]
    assert [point.keep for point in found.curves["greedy"]] == [0, 1, 2]
    assert found.greedy_gain_db is not None and greedy_runs(greedy, len(ranking)) == 6


def test_the_lengths_are_named_at_which_another_curve_does_better() -> None:
    first = list(enumerate([5, 9, 7, None, 9, None]))
    second = list(enumerate([5, 8, 8, 9, None, None]))
    assert losses(first, second) == [2, 4]


def test_an_int8_weight_takes_a_byte_a_value_and_a_scale_a_row() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2, bias=False))
    assert model_bytes(model, {}) == 4 * (32 + 4 + 8)
    assert model_bytes(model, assigned(["0", "1"])) == 32 + 4 * 4 + 4 * 4 + 8 + 4 * 2
