"""Keep-lists are measured on the model itself, with the scales of the calibration, beside controls."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.digits import LIMITS, digit_samples
from auto_quantize_model.journal import Journal
from auto_quantize_model.plan import SensitivitySpec, build_plan
from auto_quantize_model.replay import Replay
from auto_quantize_model.samples import Sample, answer_span, encode
from auto_quantize_model.snapshot import load_model
from auto_quantize_model.tradeoff import (
    Greedy,
    above,
    gain,
    keep_sizes,
    measure_tradeoff,
    model_bytes,
    orders,
    right_answers,
)


@pytest.fixture(scope="module")
def model(tiny_snapshot: Path) -> torch.nn.Module:
    return load_model(tiny_snapshot)


@pytest.fixture(scope="module")
def plan(model: torch.nn.Module, batches: Any) -> dict[str, Any]:
    return build_plan(model, batches, SensitivitySpec("replay", 1, ("isolated",)))


@given(st.integers(1, 2000))
def test_keep_lists_grow_from_none_to_all(ops: int) -> None:
    sizes = keep_sizes(ops)
    assert sizes == sorted(set(sizes)) and sizes[0] == 0 and sizes[-1] == ops
    assert all(after <= 1.5 * before for before, after in zip(sizes[3:], sizes[4:], strict=False))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_every_order_holds_every_op_once(sizes: list[int]) -> None:
    ranking = [f"op{number}" for number in range(len(sizes))]
    found = orders(ranking, dict(zip(ranking, sizes, strict=True)))
    assert all(sorted(names) == sorted(ranking) for names in found.values())
    assert found["inverse"] == ranking[::-1]
    weights = [sizes[ranking.index(name)] for name in found["weight_bytes"]]
    assert weights == sorted(sizes, reverse=True)


def curve(*values: float | None) -> list[dict[str, Any]]:
    return [{"keep": size, "sqnr_db": value} for size, value in zip((0, 1, 3), values, strict=True)]


def test_the_gain_is_the_area_between_two_curves_over_their_range() -> None:
    assert gain(curve(10, 20, 30), curve(10, 10, 30)) == (0.5 * 1 * 10 + 0.5 * 2 * 10) / 3
    assert gain(curve(10, 20, None), curve(10, 10, None)) == 5
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


def test_a_batch_taken_up_keeps_the_scales_of_the_calibration(model: Any, plan: Any, batches: Any) -> None:
    names = [op["op_name"] for op in plan["ops"]]
    with Replay(model, plan["ops"], plan["measured_op"]) as replay:
        replay.calibrate(batches[0])
        calibrated = replay.run(names).clone()
        replay.calibrate(batches[1])
        other_scales = replay.run(names).clone()
        replay.calibrate(batches[0])
        with torch.no_grad():
            assert torch.equal(replay.take_up(batches[1]), model(**batches[1]).logits)
        assert not torch.equal(replay.run(names), other_scales)
        replay.take_up(batches[0])
        assert torch.equal(replay.run(names), calibrated)


def test_the_curves_begin_and_end_together(model: Any, plan: Any, batches: Any, tmp_path: Path) -> None:
    ranking = [op["op_name"] for op in plan["ops"]]
    answers: list[list[range | None]] = [[None]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Journal(tmp_path / "journal", {}) as journal:
        found = measure_tradeoff(model, plan, ranking, batches[0], batches[1:], answers, journal)
    for points in found["curves"].values():
        assert points[0] == found["curves"]["ranking"][0]
        assert points[-1]["relative_error"] == 0 and points[-1]["sqnr_db"] is None
        assert points[-1]["weight_bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
        assert [name for point in points for name in point["added"]] != []
    first = found["curves"]["ranking"][0]
    with Replay(model, plan["ops"], plan["measured_op"]) as replay:
        replay.calibrate(batches[0])
        reference = replay.take_up(batches[1]).clone()
        error = float((reference - replay.run(ranking)).pow(2).sum())
    assert math.isclose(first["relative_error"], error / float(reference.double().pow(2).sum()), rel_tol=1e-6)
    assert first["accuracy"] is None and found["answers"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with Journal(tmp_path / "journal", {}) as journal:
        assert journal.found
        assert found == measure_tradeoff(model, plan, ranking, batches[0], batches[1:], answers, journal)


def test_greedy_keeps_what_helps_most_in_the_state_reached(model: Any, plan: Any, batches: Any, tmp_path: Path) -> None:
    ranking = [op["op_name"] for op in plan["ops"]]
    ops, greedy = frozenset(ranking), Greedy(candidates=3, ops=2)
    with Journal(tmp_path / "journal", {}) as journal:
        found = measure_tradeoff(model, plan, ranking, batches[0], batches[1:], [[None]], journal, greedy)
    chosen = [name for point in found["curves"]["greedy"] for name in point["added"]]
    with Replay(model, plan["ops"], plan["measured_op"]) as replay:
        reference = replay.calibrate(batches[0]).clone()

        def error(kept: set[str]) -> float:
            return float((reference - replay.run(ops - kept)).pow(2).sum())

        first = min(ranking[:3], key=lambda name: error({name}))
        left = [name for name in ranking if name != first][:3]
        assert chosen == [first, min(left, key=lambda name: error({first, name}))]
    assert [point["keep"] for point in found["curves"]["greedy"]] == [0, 1, 2]
    assert found["greedy_gain_db"] is not None and greedy.runs(len(ranking)) == 6


def test_lengths_are_counted_at_which_a_curve_is_above_another() -> None:
    first, second = ([{"sqnr_db": sqnr} for sqnr in curve] for curve in ([5, 9, 7, None, None], [5, 8, 7, 9, None]))
    assert above(first, second) == [2, 3]


def test_an_int8_weight_takes_a_byte_a_value_and_a_scale_a_row() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2, bias=False))
    assert model_bytes(model, ["0", "1"], frozenset({"0", "1"})) == 4 * (32 + 4 + 8)
    assert model_bytes(model, ["0", "1"], frozenset()) == 32 + 4 * 4 + 4 * 4 + 8 + 4 * 2
