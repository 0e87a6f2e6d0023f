"""A frontier in parts has the bytes of a frontier by one job, which measures only what was not known from the start."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_inc import token_batches
from test_frontier import CANDIDATES, capture, model, plan, scales  # noqa: F401  fixtures

from auto_quantize_model.config import DecideSpec, Target
from auto_quantize_model.decide.frontier import measure_frontier
from auto_quantize_model.decide.in_parts import measure_part
from auto_quantize_model.files import InputError, canonical_json
from auto_quantize_model.measure.parts import Place
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Capture, HeldOutPart, Plan, Scales, as_record, body_of
from auto_quantize_model.replay.model import Replay

SPEC = DecideSpec(heldout_batches=2, points=4)
TARGET = Target(max_divergence=0.02, max_bits=8.0)
ANSWERS: list[list[range | None]] = [[range(3, 5)], [None]]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_have_the_bytes_of_one_job(
    model: torch.nn.Module,  # noqa: F811
    plan: Plan,  # noqa: F811
    capture: Capture,  # noqa: F811
    scales: Scales,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    data: Any = (model, plan, capture, CANDIDATES, scales, token_batches(3)[1:], ANSWERS)
    whole = measure_frontier(*data, ScoreStore(tmp_path / "one"), SPEC, TARGET, token_batches(1))
    store = ScoreStore(tmp_path / "parts")
    made = [measure_part(*data, store, SPEC, TARGET, Place(number, count)) for number in range(1, count + 1)]
    parts = [as_record(HeldOutPart, json.loads(canonical_json(body_of(part)))) for part in made]
    sizes = [len(part.records) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    runs: list[Any] = []
    run_each = Replay.run_each
    monkeypatch.setattr(Replay, "run_each", lambda self, states: runs.extend(states) or run_each(self, states))
    found = measure_frontier(*data, ScoreStore(tmp_path / "rest"), SPEC, TARGET, token_batches(1), parts=parts[::-1])
    assert canonical_json(body_of(found)) == canonical_json(body_of(whole))
    measured = 2 * len({point.schemes for point in (*whole.points, *whole.controls)})
    assert len(runs) == measured - sum(sizes)
    with pytest.raises(InputError, match="held-out part 1 of .* measured with .*threads=99"):
        other = replace(parts[0], arithmetic=replace(parts[0].arithmetic, threads=99))
        measure_frontier(*data, store, SPEC, TARGET, token_batches(1), parts=[other, *parts[1:]])
    with pytest.raises(InputError, match=r"the held-out parts are not number 1 to \d, each once"):
        measure_frontier(*data, store, SPEC, TARGET, token_batches(1), parts=[*parts, parts[0]])
