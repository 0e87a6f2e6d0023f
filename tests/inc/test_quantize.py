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
from build import a_plan, a_profile, profiles_of
from quick_inc import plans_unchecked

from auto_quantize_model.config import PlanSpec, Target
from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.export.exports import FP32, export
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.inc.quantize import (
    WEIGHTS,
    compared,
    load_quantized,
    logits,
    measure_error,
    modules_told_by_name,
    quantize,
)
from auto_quantize_model.measure.heldout import measure_tradeoff
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import Processor, collate, encode
from auto_quantize_model.models.snapshot import load_model, module_types
from auto_quantize_model.records import Profile, Tradeoff

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
def tradeoff(tiny_snapshot: Path, batches: Any, heldout: Any, tmp_path_factory: pytest.TempPathFactory) -> Tradeoff:
    """The trade-off of the tiny model, measured on the held-out digit with the scales of two batches."""
    model = load_model(tiny_snapshot)
    with plans_unchecked():
        plan = build_plan(model, batches, PlanSpec(confidence_batches=1, maps=("isolated",)))
    store = ScoreStore(tmp_path_factory.mktemp("tradeoff"))
    return measure_tradeoff(model, plan, plan.op_names, batches, [heldout], ANSWERS, store)


@pytest.fixture(scope="module")
def profiles(tradeoff: Tradeoff) -> dict[str, Profile]:
    return build_profiles(tradeoff, Target(min_sqnr_db=0)).profiles


def op_name_dict(kept: Sequence[str]) -> dict[str, Any]:
    return {rf"{name}(\.module)?": FP32 for name in kept}


@pytest.mark.parametrize("name", ["recommended", "max"])
def test_the_saved_and_loaded_model_has_the_error_of_its_profile(
    tiny_snapshot: Path,
    batches: Any,
    heldout: Any,
    profiles: dict[str, Profile],
    tradeoff: Tradeoff,
    tmp_path: Path,
    name: str,
) -> None:
    model, profile = load_model(tiny_snapshot), profiles[name]
    reference = Reference(logits(model, heldout), None)
    quantize(model, batches, op_name_dict(profile.kept), tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    loaded = load_quantized(tmp_path, load_model(tiny_snapshot))
    found = measure_error([reference], loaded, [heldout], ANSWERS)
    record = compared(name, profile, found, tradeoff)
    assert record["status"] == "bit_identical"
    assert 0 < found["relative_error"] == profile.relative_error  # type: ignore[operator]


def test_another_keep_list_has_another_error(
    tiny_snapshot: Path, batches: Any, heldout: Any, profiles: dict[str, Profile], tradeoff: Tradeoff, tmp_path: Path
) -> None:
    model = load_model(tiny_snapshot)
    reference = Reference(logits(model, heldout), None)
    quantize(model, batches, op_name_dict(profiles["max"].kept[1:]), tmp_path)
    found = measure_error([reference], load_quantized(tmp_path, load_model(tiny_snapshot)), [heldout], ANSWERS)
    with pytest.raises(InputError, match="profile max: relative_error was measured as .* do not use this profile"):
        compared("max", profiles["max"], found, tradeoff)


@pytest.mark.parametrize("elsewhere", [{"device": "cuda"}, {"instruction_set": "AVX512 of another CPU"}])
def test_another_device_or_instruction_set_promises_no_bits(elsewhere: dict[str, str], tradeoff: Tradeoff) -> None:
    profile, there = a_profile(["a"], relative_error=0.1), replace(tradeoff, **elsewhere)
    record = compared("max", profile, {"relative_error": 0.2}, there)
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
    profiles: dict[str, Profile],
    tradeoff: Tradeoff,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # INC leaves an nc_workspace where it runs
    named = profiles_of({"recommended": profiles["minimal"]})
    modules = module_types(tiny_snapshot)
    export(tmp_path / "exports", named, a_plan(reduce_range=REDUCED), modules, [], len(batches))
    specification = importlib.util.spec_from_file_location("script", tmp_path / "exports/recommended/inc_quantize.py")
    assert specification and specification.loader
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)

    def stock() -> torch.nn.Module:
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        return kind.from_pretrained(tiny_snapshot, dtype=torch.float32, attn_implementation="sdpa").eval()

    reference = Reference(logits(stock(), heldout), None)
    # The profile's 7 or 8 bits hold on a CPU where INC would choose the others.
    monkeypatch.setattr(nc_pytorch, "REDUCE_RANGE", not REDUCED)
    quantized = script.quantize(stock(), CalibrationLoader(batches))
    quantized.save(str(tmp_path / "quantized"))
    loaded = script.load(str(tmp_path / "quantized"), stock())
    for model in (quantized.model, loaded):
        found = measure_error([reference], model, [heldout], ANSWERS)
        assert compared("minimal", profiles["minimal"], found, tradeoff)["status"] == "bit_identical"
