"""Models of images and text by transformers' own processor: every family of the tiny models, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LIMITS, batch_of, check_model, loaded, noise, sample, snapshot
from transformers import AutoProcessor

from auto_quantize_model.files import InputError
from auto_quantize_model.made.tiny_shapes import SHAPES
from auto_quantize_model.models import pixels
from auto_quantize_model.models.chat_template import renderer
from auto_quantize_model.models.encode import collate, encode, prepare, tensors
from auto_quantize_model.models.families.image_text import IMAGE_TEXT, PLACED
from auto_quantize_model.models.families.qwen_vl import ARCHITECTURES
from auto_quantize_model.models.sample import Limits, Sample, image_positions
from auto_quantize_model.models.snapshot import build_manifest, load_processor
from auto_quantize_model.models.words import messages

PLACING = {"blip_2", "instructblip"}
NAMES = [
    name
    for name, shape in SHAPES.items()
    if shape.processor and name not in {*PLACING, "paligemma"} and shape.architecture not in ARCHITECTURES.values()
]
# The others have a video processor, and AutoProcessor cannot load it without torchvision; or transformers hides them.
WHOLE = ["llava", "llava_next", "gemma3", "idefics3"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_the_tower_and_changes_the_output(name: str) -> None:
    check_model(name)
    assert loaded(name)[1].family is IMAGE_TEXT


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_is_accepted_and_its_answers_are_located(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == SHAPES[name].architecture
    processor = loaded(name)[1]
    for images in ((), (noise(60, 40),), (noise(60, 40), noise(30, 70))):
        prepared = prepare(sample(*images), processor, LIMITS, renderer(processor.tokenizer))
        assert prepared.answer_span is not None
        ids = prepared.input_ids[prepared.answer_span.start : prepared.answer_span.stop]
        assert processor.tokenizer.decode(ids) == "A cat."


@pytest.mark.parametrize("name", WHOLE)
def test_the_tensors_are_those_of_the_official_processor(name: str) -> None:
    official: Any = AutoProcessor.from_pretrained(snapshot(name))
    images = noise(60, 40), noise(30, 70)
    talk = messages(sample(*images), "A cat.", parted=True)
    shown = iter(images)
    for part in talk[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(shown)
    expected = official.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    batch = batch_of(name, *images)
    assert dict(batch).keys() == dict(expected).keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_positions_of_images_are_told_by_the_batch_and_survive_stacking() -> None:
    one = batch_of("llava", noise(60, 40))
    both = collate([one, batch_of("llava", noise(40, 60))])
    positions = image_positions(both)
    assert positions is not None and positions.shape == both["input_ids"].shape
    assert positions.sum(1).tolist() == [16, 16]
    assert both["pixel_values"].shape == (2, 3, 28, 28)


def test_images_that_give_other_shapes_cannot_share_a_batch() -> None:
    batches = [batch_of("idefics3", noise(60, 40)), batch_of("idefics3", noise(60, 40), noise(60, 40))]
    with pytest.raises(InputError, match="cannot share a batch"):
        collate(batches)
    one = batch_of("idefics3", noise(60, 40))
    wider = dict(one) | {"pixel_values": torch.cat([one["pixel_values"]] * 2, dim=1)}
    with pytest.raises(InputError, match="samples whose images give other shapes of pixel_values cannot share"):
        collate([one, wider])


def test_a_large_image_is_reduced_and_a_small_one_stays() -> None:
    processor = loaded("llava")[1]
    limits = Limits(1, 1000, 100)
    assert IMAGE_TEXT.fit(noise(20, 40), processor, limits).size == (20, 40)
    reduced = IMAGE_TEXT.fit(noise(300, 100), processor, limits)
    assert reduced.size == (54, 18)
    assert IMAGE_TEXT.fit(noise(5000, 1), processor, limits).size[1] == 1


def test_an_answer_that_the_processor_tokenizes_otherwise_is_not_located() -> None:
    """The positions of characters are known only where the processor's tokens are those of its own text."""
    processor = loaded("llava")[1]

    class Other:
        tokenizer = processor.tokenizer

        def __call__(self, **options: Any) -> Any:
            made = processor.whole(**options)
            self.tokenizer("something else")
            return made

    other = replace(processor, whole=Other())
    prepared = prepare(sample(noise(60, 40)), other, LIMITS, renderer(processor.tokenizer))
    assert prepared.answer_span is None and len(prepared.input_ids) == 42


def test_stored_tokens_that_the_processor_does_not_make_again_are_refused() -> None:
    processor = loaded("llava")[1]
    prepared = prepare(sample(noise(60, 40)), processor, LIMITS, renderer(processor.tokenizer))
    changed = replace(prepared, input_ids=prepared.input_ids[:-1])
    with pytest.raises(InputError, match="sample a: the model's processor makes other tokens than at the extraction"):
        tensors(changed, processor)


def test_what_the_processor_refuses_names_the_sample() -> None:
    processor = loaded("llava")[1]
    tokenizer = processor.tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("<image>", "<image><image>")
        with pytest.raises(InputError, match="sample a: the model's processor refuses it .*number of <image> tokens"):
            encode(sample(noise(60, 40)), processor, LIMITS)
    finally:
        tokenizer.chat_template = template


def test_the_plain_format_places_no_images() -> None:
    processor = loaded("llava")[1]
    with pytest.raises(InputError, match=r"calibration\.format plain cannot place"):
        prepare(sample(noise(60, 40)), processor, LIMITS, None)
    prepared = prepare(Sample("a", "What", answer=" is"), processor, LIMITS, None)
    assert processor.tokenizer.decode(prepared.input_ids) == "What is"
    assert prepared.answer_span == range(4, 7)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "processor_config.json",
            {"processor_class": "Unheard"},
            "the processor class is 'Unheard', which trans",
        ),
        ("processor_config.json", {"processor_class": 3}, "the processor class is 3"),
        ("processor_config.json", {"patch_size": None}, "refused by transformers .*unsupported operand"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "pixel_values that are not finite"),
    ],
)
def test_a_processor_that_makes_nothing_is_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(snapshot("llava"), tmp_path / "llava"))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        build_manifest(folder, "llava", "local", {})


def test_the_template_of_the_processor_comes_before_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot("llava"), tmp_path / "llava"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "<image>{{ messages[0].role }}"}))
    processor = load_processor(folder)
    prepared = prepare(sample(noise(60, 40), answer=None), processor, LIMITS, renderer(processor.tokenizer))
    assert prepared.text == "<image>user"


def test_a_missing_library_of_the_image_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*places: Any, **options: Any) -> Any:
        raise ImportError("LlavaImageProcessor requires the Torchvision library")

    monkeypatch.setattr(pixels.AutoImageProcessor, "from_pretrained", missing)
    with pytest.raises(InputError, match="image processor needs a library .*Torchvision.*pip install torchvision"):
        load_processor(snapshot("llava"))


@pytest.mark.parametrize("name", sorted(PLACING))
def test_a_processor_that_places_images_needs_no_chat_template(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == SHAPES[name].architecture
    model, processor = loaded(name)
    assert processor.family is PLACED
    for images in ((), (noise(60, 40),)):
        prepared = prepare(sample(*images), processor, LIMITS, None)
        assert prepared.answer_span is not None
        ids = prepared.input_ids[prepared.answer_span.start : prepared.answer_span.stop]
        assert processor.tokenizer.decode(ids) == "A cat."
    batches = [batch_of(name, noise(60, 40, seed)) for seed in (0, 1)]
    one, other = (model(**batch).logits for batch in batches)
    assert not torch.equal(one, other) and int(batches[0].image_positions.sum()) == 4
