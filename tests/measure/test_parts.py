"""A capture in parts has the bytes of a capture by one job, and parts that do not fit are refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import a_plan, an_op
from hypothesis import given
from hypothesis import strategies as st
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.files import InputError, canonical_json
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.parts import Place, cut, joined, measure_part
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Capture, Part, Plan, Unit, as_record, body_of
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay

SCHEMES = ("inc_int8", "W8A8", "FP8_DYNAMIC")
BATCHES = token_batches(2)
UNIT = Unit("up_of_both", ("model.blocks.0.up", "model.blocks.1.up"), False, SCHEMES[1:], {})


def planned() -> tuple[Any, Plan]:
    model = few_ops_model()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ops = [an_op(name, schemes=SCHEMES, shape=(16, 16), executions=(1, 1)) for name in names]
    maps = ("isolated", "fallback", "requantize")
    plan = a_plan(ops, schemes=dict.fromkeys(SCHEMES, {}), measured_op="lm_head", maps=maps)
    return model, replace(plan, units=(*plan.units, UNIT))


MODEL, PLAN = planned()


def calibrated() -> list[Any]:
    with Replay(MODEL, PLAN.ops, "lm_head", schemes=schemes_of(PLAN.schemes, MODEL)) as replay:
        return [replay.calibrate(batch) for batch in BATCHES]


SCALES = calibrated()


def whole(folder: Path, exact: str) -> Capture:
    store = ScoreStore(folder)
    return capture_sensitivity(
        MODEL, BATCHES, PLAN, store, SCALES, exact=exact, candidates=SCHEMES[1:], of_all=SCALES[0]
    )[0]


def part(folder: Path, place: Place, exact: str, estimated: list[Part] | None = None) -> Part:
    """A part as another job reads it."""
    found, record = measure_part(
        MODEL, BATCHES, PLAN, ScoreStore(folder), place, SCALES, SCALES[0], exact, SCHEMES[1:], estimated
    )
    assert record["seconds"] >= 0 and (record["resumed_scores"] == 0 or estimated)
    return as_record(Part, json.loads(canonical_json(body_of(found))))


def parts(folder: Path, count: int, exact: str) -> tuple[list[Part], list[Part]]:
    places = [Place(number, count) for number in range(1, count + 1)]
    estimated = [part(folder, place, exact) for place in places] if exact != "all" else []
    return estimated, [part(folder, place, exact, estimated) for place in places]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("exact", ["all", "top:2", "none"])
def test_parts_have_the_bytes_of_one_job(exact: str, count: int, tmp_path: Path) -> None:
    expected = canonical_json(body_of(whole(tmp_path / "one", exact)))
    estimated, measured = parts(tmp_path / "parts", count, exact)
    assert canonical_json(body_of(joined(PLAN, estimated[::-1], measured[::-1]))) == expected
    assert sum(len(one.scores) for one in measured) == len(json.loads(expected)["scores"])
    if exact == "top:2" and count > 1:
        assert max(len(one.probes) for one in estimated) <= 32 // count + 1


def test_a_killed_part_resumes_from_a_shelf_of_its_own(tmp_path: Path) -> None:
    first = part(tmp_path, Place(1, 2), "all", [])
    again, record = measure_part(
        MODEL, BATCHES, PLAN, ScoreStore(tmp_path), Place(1, 2), SCALES, SCALES[0], "all", SCHEMES[1:], []
    )
    assert 0 < record["resumed_scores"] <= len(first.scores) and again.scores == first.scores  # some states are equal
    with ScoreStore(tmp_path).shelf({"a": "context of another part"}):
        part(tmp_path, Place(2, 2), "all", [])


def test_missing_and_unlike_parts_are_refused_by_name(tmp_path: Path) -> None:
    estimated, measured = parts(tmp_path, 2, "top:2")
    with pytest.raises(InputError, match=r"^the parts are number \[1\], where 1 to 2 are asked for"):
        joined(PLAN, estimated, measured[:1])
    other = replace(measured[1], arithmetic=replace(measured[1].arithmetic, instruction_set="another"))
    with pytest.raises(InputError, match=r"^part 2 of 2: its arithmetic is .*another.* machines of one kind"):
        joined(PLAN, estimated, [measured[0], other])
    with pytest.raises(InputError, match=r"no part has the score \(0, 'inc_int8', 'isolated'"):
        joined(PLAN, estimated, [replace(measured[0], scores=()), measured[1]])
    with pytest.raises(InputError, match=r"no part has probe 0 of batch 0"):
        joined(PLAN, [replace(estimated[0], probes=()), estimated[1]], measured)
    with pytest.raises(InputError, match=r"its effort is .*top:2.* another part has .*none"):
        part(tmp_path, Place(1, 2), "none", estimated)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 9))
def test_work_is_cut_into_contiguous_parts_of_nearly_equal_cost(costs: list[int], count: int) -> None:
    found = cut(costs, count)
    assert len(found) == count and [item for one in found for item in one] == list(range(len(costs)))
    largest = max(costs, default=0)
    for one in found:
        assert sum(costs[item] for item in one) <= sum(costs) / count + largest
