"""States are measured on held-out batches with the scales of the calibration, and summed over batches and samples."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import a_plan, an_op
from hypothesis import given
from hypothesis import strategies as st
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.aggregate import interval, interval_of_count
from auto_quantize_model.measure.heldout import HeldOut, in_words, record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference, next_token_loss, right_answers
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import answer_span, encode
from auto_quantize_model.models.sample import Sample
from auto_quantize_model.records import Plan
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.scheme import assigned

NAMES = ["model.project", "lm_head"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return few_ops_model()


@pytest.fixture(scope="module")
def plan() -> Plan:
    shapes = {"model.project": (16, 16), "lm_head": (61, 16)}
    return a_plan([an_op(name, shape=shape) for name, shape in shapes.items()], measured_op="lm_head")


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
    assert right_answers(logits, batch, [range(1, 3), range(1, 3)]) == [True, False]
    assert right_answers(logits, batch, [None, range(3, 4)]) == [True]


def test_the_loss_of_next_tokens_is_of_the_answer_or_of_all_text() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    ids, images = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 3]]), torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])
    nats = -logits.double().log_softmax(-1)
    batch = {"input_ids": ids, "mm_token_type_ids": images}
    first = float(nats[0, 1, 2] + nats[0, 2, 3])  # the second token is part of an image
    assert next_token_loss(logits[:1], {key: rows[:1] for key, rows in batch.items()}, [None]) == (
        pytest.approx(first),
        2,
    )
    answer = float(nats[1, 1, 4])
    assert next_token_loss(logits, batch, [None, range(2, 3)]) == (pytest.approx(first + answer), 3)


def test_a_batch_that_is_begun_keeps_the_scales_of_the_calibration(model: Any, plan: Plan) -> None:
    batches, everything = token_batches(2), assigned(NAMES)
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


def test_scales_are_of_all_calibration_batches_and_an_op_counts_its_runs_of_one(model: Any, plan: Plan) -> None:
    batches, everything = token_batches(2), assigned(NAMES)
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


def a_record(error: float, divergences: list[float], **changes: Any) -> dict[str, Any]:
    """The record of a batch with four positions for each sample."""
    fields = {
        "image_divergence": 0.0,
        "text_divergence": 4 * sum(divergences),
        "top1_agreement": 1.0,
        "right": 0,
        "lost": 0,
    }
    return {
        "mse_value": error,
        "divergences": divergences,
        "next_token_loss": 2.0,
        "next_tokens": 2,
        **fields,
        **changes,
    }


def of_batch(squares: float, positions: float) -> dict[str, float]:
    return {"all": squares, "image_positions": 0.0, "text_positions": positions}


def test_a_summary_counts_each_position_and_names_the_worst_batch() -> None:
    records = [a_record(1.0, [0.1]), a_record(4.0, [0.4, 0.6], top1_agreement=0.5, right=1)]
    found = summary(records, [of_batch(100.0, 4), of_batch(40.0, 8)], 2)
    assert found["relative_error"] == 5 / 140 and found["sqnr_db_lowest"] == pytest.approx(10)
    assert found["divergence"] == pytest.approx(1.1 / 3) and found["divergence_by_sample"] == (0.1, 0.4, 0.6)
    assert found["top1_agreement"] == pytest.approx((4 + 4) / 12) and found["accuracy"] == 0.5
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["text_divergence"] == pytest.approx(1.1 / 3) and found["image_divergence"] is None
    assert 0.1 <= found["divergence_low"] < found["divergence"] < found["divergence_high"] <= 0.6
    without = summary([a_record(0.0, [0.0], next_tokens=0)], [of_batch(1.0, 4)], 0)
    assert without["sqnr_db_lowest"] is None and without["accuracy"] is None and without["perplexity"] is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_an_interval_holds_the_mean_and_is_the_same_each_time(values: list[float]) -> None:
    weights = [1.0] * len(values)
    low, high = interval(values, weights)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12 and (low, high) == interval(values, weights)


def test_an_interval_of_a_count_is_that_of_clopper_and_pearson() -> None:
    # 0 of 30: 1 - 0.025 ** (1 / 30) = 0.1157; 4 of 189: 0.0058 and 0.0533, as in tables.
    assert (interval_of_count(0, 30), interval_of_count(4, 189)) == ((0, 4), (1, 11))
    assert interval_of_count(30, 30) == (26, 30)


def test_a_lost_answer_was_right_in_the_reference() -> None:
    right, wrong = torch.tensor([[0.0, 9.0]] * 2), torch.tensor([[9.0, 0.0]] * 2)
    before, now = torch.stack([right, right, wrong]), torch.stack([right, wrong, right])
    batch = {"input_ids": torch.ones(3, 2, dtype=torch.long)}
    record = record_of(now, Reference(before, None), batch, [range(1, 2)] * 3)
    assert (record["right"], record["lost"]) == (2, 1)


def test_an_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = interval(list(draw.exponential(size=40)), [1.0] * 40)
        inside += low <= 1.0 <= high
    assert 175 <= inside <= 199


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_output_without_squares_is_refused_by_its_batch(value: float) -> None:
    reference = Reference(torch.full((1, 2, 3), value), None)
    with pytest.raises(InputError, match=rf"^held-out batch 3: the FP32 output has a sum of squares of {value}, so no"):
        totals(reference, 3)


def test_a_value_that_is_no_number_is_named_with_its_state(
    model: Any, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = token_batches(2)
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = replay.calibrate(batches[0])
    monkeypatch.setattr(Replay, "run_each", lambda replay, states: iter([replay.measured + math.inf]))
    with (
        HeldOut(model, plan, scales, batches[1:], [[None]], ScoreStore(tmp_path)) as heldout,
        pytest.raises(
            InputError, match="^held-out batch 0: mse_value of the model with 2 ops in inc_int8 is inf; keep"
        ),
    ):
        heldout.measure([assigned(NAMES)])
    assert in_words({"a": "W8A8", "b": "NVFP4", "c": "W8A8"}) == "the model with 2 ops in W8A8 and 1 op in NVFP4"
    assert in_words({}) == "the unquantized model"


def test_an_interrupted_measurement_goes_on_and_restores_the_model(model: Any, plan: Plan, tmp_path: Path) -> None:
    batches = token_batches(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = replay.calibrate(batches[0])
    states = [{}, assigned(NAMES[:1]), assigned(NAMES)]
    done: list[int] = []

    def stop() -> None:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt

    data = (model, plan, scales, batches[1:], [[None], [None]])
    with HeldOut(*data, ScoreStore(tmp_path / "stopped"), stop) as heldout, pytest.raises(KeyboardInterrupt):
        heldout.measure(states)
    with HeldOut(*data, ScoreStore(tmp_path / "stopped")) as heldout:
        found = heldout.measure(states)
    with HeldOut(*data, ScoreStore(tmp_path / "whole")) as heldout:
        assert heldout.measure(states) == found
    assert found[0]["relative_error"] == 0 and found[1]["relative_error"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "forward" not in vars(model.lm_head)
