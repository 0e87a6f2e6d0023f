"""The size of a run is read from headers and documents, and each that is missing has a stated substitute."""

import json
from pathlib import Path
from typing import Any

import pytest

from auto_quantize_model.config import Config
from auto_quantize_model.measure.effort import TOP
from auto_quantize_model.models import size
from auto_quantize_model.models.size import size_of_run, vocabulary_of, weights_of
from auto_quantize_model.models.snapshot import count_parameters


def config(directory: Path, **blocks: dict[str, Any]) -> dict[str, Any]:
    changes = {"model": {"source": "local", "path": str(directory)}, **blocks}
    return {block: values | changes.get(block, {}) for block, values in Config().model_dump(mode="json").items()}


def test_the_weights_of_the_headers_are_those_that_are_loaded(tiny_snapshot: Path) -> None:
    assert weights_of(tiny_snapshot) == count_parameters(tiny_snapshot)
    text = json.loads((tiny_snapshot / "config.json").read_text())
    assert vocabulary_of(tiny_snapshot) == text["text_config"]["vocab_size"] > 0


@pytest.mark.parametrize("content", [b"", b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\xff" * 8, b"\x09" + b"\x00" * 7])
def test_a_damaged_file_has_no_weights_and_ends_no_plan(tmp_path: Path, content: bytes) -> None:
    assert weights_of(tmp_path) is None and vocabulary_of(tmp_path) == 0
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_of(tmp_path) is None


def test_the_shards_of_an_index_count_together(tmp_path: Path) -> None:
    for name, shape in (("a.safetensors", [2, 3]), ("b.safetensors", [4])):
        header = json.dumps(
            {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}, "__metadata__": {}}
        ).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_of(tmp_path) == 10


def test_before_the_download_a_model_has_no_weights_and_a_manifest_alone_counts_16_bits(tmp_path: Path) -> None:
    asked = config(tmp_path / "none")
    assert size_of_run(asked, {}, "cpu").weights == 0
    files = [{"name": "model.safetensors", "bytes": 2_000}, {"name": "tokenizer.json", "bytes": 9_000}]
    manifest = tmp_path / "model_manifest.json"
    assert size_of_run(asked, {"manifest": manifest}, "cpu").weights == 0
    manifest.write_text(json.dumps({"path": str(tmp_path / "elsewhere"), "files": files}))
    assert size_of_run(asked, {"manifest": manifest}, "cpu").weights == 1_000


def test_documents_replace_what_is_guessed(tiny_snapshot: Path, tmp_path: Path) -> None:
    asked = config(tiny_snapshot, calibration={"max_tokens": 500, "batch_size": 2, "heldout_batch_size": 4})
    guessed = size_of_run(asked, {}, "cpu")
    assert guessed.logits == 4 * 4 * 500 * vocabulary_of(tiny_snapshot)
    assert guessed.multiply_adds == guessed.weights * 2 * 500
    samples, plan = tmp_path / "calibration_manifest.json", tmp_path / "plan.json"
    samples.write_text(json.dumps({"samples": {"calibration": [{"tokens": 20}], "heldout": [{"tokens": 30}]}}))
    plan.write_text(json.dumps({"ops": [{}] * 7, "coverage": {"towers": {"a": {"multiply_adds_total": 5}}}}))
    known = size_of_run(asked, {"calibration_manifest": samples, "plan": plan}, "cpu")
    assert (known.logits, known.multiply_adds, known.ops) == (guessed.logits * 30 // 500, 5, 7)
    plan.write_text("{")
    assert size_of_run(asked, {"plan": plan}, "cpu") == guessed


@pytest.mark.parametrize(("exact", "expected"), [("auto", None), ("all", None), ("none", 0), ("top:9", 9)])
def test_the_effort_is_that_of_the_config(tiny_snapshot: Path, exact: str, expected: int | None) -> None:
    found = size_of_run(config(tiny_snapshot, sensitivity={"exact": exact, "time_budget": "90s"}), {}, "cpu")
    assert (found.top, found.budget) == (expected, 1.5)


def test_an_expensive_map_is_estimated_first(tiny_snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "IN_TEN_MINUTES", {"cpu": 1.0})
    assert size_of_run(config(tiny_snapshot), {}, "cpu").top == TOP == size.TOP
