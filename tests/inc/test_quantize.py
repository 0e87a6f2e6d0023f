"""INC's own INT8 model, made from an exported profile and loaded back, has the very error that the replay measured."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import neural_compressor.adaptor.pytorch as nc_pytorch
import pytest
import torch
import transformers
from build import a_point, a_profile, profiles_of
from quick_inc import plans_unchecked

from auto_quantize_model.config import DecideSpec, PlanSpec, Target
from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.decide.frontier import measure_frontier
from auto_quantize_model.export.exports import export
from auto_quantize_model.export.inc_int8 import FP32
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.inc.quantize import (
    WEIGHTS,
    load_quantized,
    logits,
    measure_error,
    modules_told_by_name,
    quantize,
)
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.heldout import compared
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.snapshot import load_model, module_types
from auto_quantize_model.records import Frontier, Plan, Profile
from auto_quantize_model.replay.calibrate import calibrate
from auto_quantize_model.replay.scales import ALL_BATCHES

pytestmark = pytest.mark.slow
REDUCED = nc_pytorch.REDUCE_RANGE
ANSWERS: list[list[range | None]] = [[None]]


@pytest.fixture(scope="module")
def heldout(processor: Processor) -> dict[str, torch.Tensor]:
    """A digit that sets no scale, of four times the contrast: its codes leave the calibrated range.

    On a CPU without VNNI, products of such codes saturate in INC's model, and so they have to in the replay.
    """
    batch = collate([encode(sample, processor, LIMITS) for sample in digit_samples([2])])
    return batch | {"pixel_values": 4 * batch["pixel_values"]}


@pytest.fixture(scope="module")
def plan(tiny_snapshot: Path, batches: Any) -> Plan:
    spec = PlanSpec(confidence_batches=1, maps=("isolated",), schemes=("inc_int8",))
    with plans_unchecked():
        return build_plan(load_model(tiny_snapshot), batches, spec)


@pytest.fixture(scope="module")
def frontier(
    tiny_snapshot: Path, plan: Plan, batches: Any, heldout: Any, tmp_path_factory: pytest.TempPathFactory
) -> Frontier:
    """The frontier of the tiny model, measured on the held-out digit with the scales of two batches."""
    model = load_model(tiny_snapshot)
    store = ScoreStore(tmp_path_factory.mktemp("frontier"))
    capture, _ = capture_sensitivity(model, batches, plan, store)
    scales = calibrate(model, plan, batches, True)[ALL_BATCHES]
    measured = scales, [heldout], ANSWERS, store, DecideSpec(points=3), Target()
    return measure_frontier(model, plan, capture, ("inc_int8",), *measured)


@pytest.fixture(scope="module")
def profiles(frontier: Frontier) -> dict[str, Profile]:
    """`smallest` has all ops in INT8, and `safest` keeps some in FP32."""
    found = {}
    for name, point in zip(("smallest", "safest"), frontier.points, strict=False):
        assignment = frontier.assignment(point)
        kept = tuple(op for unit in frontier.units for op in unit.ops if op not in assignment)
        found[name] = Profile(point, assignment, kept)
    assert not found["smallest"].kept and found["safest"].kept and found["safest"].assignment
    return found


def reference_of(model: torch.nn.Module, batch: Any) -> Reference:
    return Reference(logits(model, batch), batch["mm_token_type_ids"])


def op_name_dict(kept: Sequence[str]) -> dict[str, Any]:
    return {rf"{name}(\.module)?": FP32 for name in kept}


@pytest.mark.parametrize("name", ["smallest", "safest"])
def test_the_saved_and_loaded_model_has_the_error_of_its_profile(
    tiny_snapshot: Path,
    batches: Any,
    heldout: Any,
    profiles: dict[str, Profile],
    frontier: Frontier,
    tmp_path: Path,
    name: str,
) -> None:
    model, profile = load_model(tiny_snapshot), profiles[name]
    reference = reference_of(model, heldout)
    quantize(model, batches, op_name_dict(profile.kept), tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    loaded = load_quantized(tmp_path, tiny_snapshot)
    found = measure_error([reference], loaded, [heldout], ANSWERS)
    record = compared(name, profile, found, frontier)
    assert record["status"] == "bit_identical"
    assert 0 < found["relative_error"] == profile.point.relative_error


def test_another_keep_list_has_another_error(
    tiny_snapshot: Path, batches: Any, heldout: Any, profiles: dict[str, Profile], frontier: Frontier, tmp_path: Path
) -> None:
    model = load_model(tiny_snapshot)
    reference = reference_of(model, heldout)
    quantize(model, batches, op_name_dict(profiles["safest"].kept[1:]), tmp_path)
    found = measure_error([reference], load_quantized(tmp_path, tiny_snapshot), [heldout], ANSWERS)
    with pytest.raises(InputError, match="profile safest: divergence was measured as .* do not use this profile"):
        compared("safest", profiles["safest"], found, frontier)


@pytest.mark.parametrize("elsewhere", [{"device": "cuda"}, {"instruction_set": "AVX512 of another CPU"}])
def test_another_device_or_instruction_set_promises_no_bits(elsewhere: dict[str, str], frontier: Frontier) -> None:
    profile, there = a_profile(a_point(["inc_int8"], relative_error=0.1)), replace(frontier, **elsewhere)
    record = compared("safest", profile, {"relative_error": 0.2}, there)
    assert record["status"] == "measured_elsewhere"
    assert (record["promised"], record["found"]) == ({"relative_error": 0.1}, {"relative_error": 0.2})
    assert record["measured_instruction_set"] == there.instruction_set


def test_a_module_is_told_by_its_class_while_inc_works_and_in_full_afterwards() -> None:
    model = torch.nn.Sequential(torch.ao.nn.quantized.Linear(2, 3), torch.nn.Linear(3, 2))
    before = [str(model), str(model[0])]
    with pytest.raises(KeyError), modules_told_by_name():
        names = {str(module) for module in model.modules()}
        assert names == {"Sequential()", "QuantizedLinear()", "LinearPackedParams()", "Linear()"}
        raise KeyError
    assert [str(model), str(model[0])] == before and "in_features=2" in before[0]


def test_nothing_left_to_quantize_is_refused(tiny_snapshot: Path, batches: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="INC quantized nothing: this profile keeps every op"):
        quantize(load_model(tiny_snapshot), batches, op_name_dict([".*"]), tmp_path)


def test_the_exported_script_quantizes_a_model_as_transformers_loads_it(
    tiny_snapshot: Path,
    batches: Any,
    heldout: Any,
    plan: Plan,
    profiles: dict[str, Profile],
    frontier: Frontier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # INC leaves an nc_workspace where it runs
    named = profiles_of({"smallest": profiles["smallest"]})
    modules = module_types(tiny_snapshot)
    export(tmp_path / "exports", named, plan, modules, [], len(batches))
    specification = importlib.util.spec_from_file_location("script", tmp_path / "exports/smallest/inc_quantize.py")
    assert specification and specification.loader
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)

    def stock() -> torch.nn.Module:
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        return kind.from_pretrained(tiny_snapshot, dtype=torch.float32, attn_implementation="sdpa").eval()

    reference = reference_of(stock(), heldout)
    # The profile's 7 or 8 bits hold on a CPU where INC would choose the others.
    monkeypatch.setattr(nc_pytorch, "REDUCE_RANGE", not REDUCED)
    quantized = script.quantize(stock(), CalibrationLoader(batches))
    quantized.save(str(tmp_path / "quantized"))
    loaded = script.load(str(tmp_path / "quantized"), stock())
    for model in (quantized.model, loaded):
        found = measure_error([reference], model, [heldout], ANSWERS)
        assert compared("smallest", profiles["smallest"], found, frontier)["status"] == "bit_identical"
