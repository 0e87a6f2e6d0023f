"""The calibration set of a tiny model whose processor is transformers' own: extracted, stored, loaded, warned of."""

import json
from pathlib import Path

import pytest
import torch
from build import a_model_manifest
from safetensors.torch import load_file
from tiny_models import loaded, noise

from auto_quantize_model.config import CalibrationSpec
from auto_quantize_model.data.batches import extract, load_batches, load_heldout, write_samples
from auto_quantize_model.made.tiny import write_tiny
from auto_quantize_model.models.encode import tensors
from auto_quantize_model.models.sample import image_positions


def spec(path: Path, **changes: object) -> CalibrationSpec:
    values = {"name": "set", "source": "local", "path": str(path), "num_samples": 2, "num_heldout": 1, "seed": 0}
    return CalibrationSpec(**values, batch_size=1, min_pixels=784, max_pixels=2000, max_tokens=500, **changes)


def rows(folder: Path, images: bool) -> Path:
    lines = []
    for number in range(3):
        noise(90, 60, number).save(folder / f"{number}.png")
        row = {"prompt": f"{number}?", "answer": "A cat.", **({"images": [f"{number}.png"] * number} if images else {})}
        lines.append(json.dumps(row) + "\n")
    path = folder / "set.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", ["llava", "smolvlm", "gemma3", "internvl"])
def test_a_stored_set_gives_the_same_tensors_and_positions(name: str, tmp_path: Path) -> None:
    _, processor = loaded(name)
    calibration, heldout, manifest = extract(spec(rows(tmp_path, True)), processor, a_model_manifest())
    assert manifest.image_backend == "pil" and not manifest.text_only
    assert all(answers.located == answers.given for answers in manifest.answers.values())
    sizes = {image.size for item in calibration + heldout for image in item.sample.images}
    assert sizes == {(54, 36)}
    for split, samples in (("calibration", calibration), ("heldout", heldout)):
        write_samples(tmp_path / f"{split}.parquet", samples)
    batches = load_batches(tmp_path / "calibration.parquet", manifest, processor)
    batches += load_heldout(tmp_path / "heldout.parquet", manifest, processor, 1)[0]
    for batch, item in zip(batches, calibration + heldout, strict=True):
        expected = tensors(item, processor)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
        positions = image_positions(batch)
        assert positions is not None and bool(positions.any()) == bool(item.sample.images)


def test_text_alone_is_told(tmp_path: Path) -> None:
    """The report warns of a set without images where the model has an image backend."""
    _, processor = loaded("llava")
    manifest = extract(spec(rows(tmp_path, False)), processor, a_model_manifest())[2]
    assert manifest.text_only and manifest.image_backend


def test_the_weights_come_from_the_seed(tmp_path: Path) -> None:
    seeds = {"a": 0, "b": 0, "c": 1}
    files = [write_tiny("llava", tmp_path / name, seed) / "model.safetensors" for name, seed in seeds.items()]
    assert files[0].read_bytes() == files[1].read_bytes()
    same, other = (load_file(file)["language_model.lm_head.weight"] for file in files[1:])
    assert not torch.equal(same, other)
