"""Qwen's models of images and text: several images, and the tensors of the official processor bit for bit."""

import pytest
import torch
from tiny_models import LIMITS, batch_of, check_model, loaded, noise, sample, snapshot

from auto_quantize_model.files import read_json
from auto_quantize_model.made.tiny_shapes import SHAPES
from auto_quantize_model.models.chat_template import renderer
from auto_quantize_model.models.encode import prepare
from auto_quantize_model.models.families.image_text import IMAGE_TEXT
from auto_quantize_model.models.families.qwen_vl import ARCHITECTURES, QWEN_VL
from auto_quantize_model.models.family import Parts
from auto_quantize_model.models.snapshot import build_manifest
from auto_quantize_model.models.words import messages

NAMES = [name for name, shape in SHAPES.items() if shape.architecture in ARCHITECTURES.values()]


def test_each_architecture_has_a_tiny_model() -> None:
    assert set(NAMES) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_the_tower_and_changes_the_output(name: str) -> None:
    check_model(name)
    assert loaded(name)[1].family is QWEN_VL


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_is_accepted_and_its_answers_are_located(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == ARCHITECTURES[name]
    processor = loaded(name)[1]
    prepared = prepare(sample(noise(60, 40), noise(40, 90)), processor, LIMITS, renderer(processor.tokenizer))
    assert prepared.answer_span is not None
    ids = prepared.input_ids[prepared.answer_span.start : prepared.answer_span.stop]
    assert processor.tokenizer.decode(ids) == "A cat."


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_tensors_are_those_of_the_official_processor(name: str, count: int) -> None:
    """The official processor, built without its video processor, resizes by itself."""
    own = loaded(name)[1]
    folder = snapshot(name)
    parts = Parts(folder, read_json(folder / "config.json"), own.tokenizer, "pil")
    official = IMAGE_TEXT.load(parts)["whole"]
    images = [noise(60, 40), noise(40, 90)][:count]
    text = own.tokenizer.apply_chat_template(messages(sample(*images), "A cat.", parted=True), tokenize=False)
    size = {"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels}
    expected = official(
        text=[text], images=[images] if images else None, images_kwargs={"size": size}, return_tensors="pt"
    )
    batch = batch_of(name, *images)
    assert dict(batch).keys() == dict(expected).keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)
