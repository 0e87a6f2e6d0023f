"""Classifiers of images: one image without words, and logits of one row for each sample."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from build import a_model_manifest
from tiny_models import LIMITS, loaded, noise, snapshot
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from auto_quantize_model.config import CalibrationSpec
from auto_quantize_model.data.batches import batches_of, extract, load_heldout, write_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.made.tiny_image_classifiers import IMAGE_CLASSIFIER_SHAPES
from auto_quantize_model.measure.heldout import record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.models.encode import collate, encode, prepare
from auto_quantize_model.models.families.image_classifier import IMAGE_CLASSIFIER, UNFIT
from auto_quantize_model.models.sample import Sample, image_positions, samples_in
from auto_quantize_model.models.snapshot import build_manifest
from auto_quantize_model.models.units import towers_with


def batch_of(name: str, count: int = 2, seed: int = 0) -> Any:
    processor = loaded(name)[1]
    images = [noise(60, 40, seed + number) for number in range(count)]
    return collate([encode(Sample("a", "What is it?", (image,), "x"), processor, LIMITS) for image in images])


@pytest.mark.parametrize("name", IMAGE_CLASSIFIER_SHAPES)
def test_a_snapshot_is_accepted_and_an_image_reaches_the_logits(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == IMAGE_CLASSIFIER_SHAPES[name].architecture
    model, processor = loaded(name)
    assert processor.family is IMAGE_CLASSIFIER and processor.tokenizer is None
    batch = batch_of(name)
    logits, other = model(**batch).logits, model(**batch_of(name, seed=5)).logits
    assert logits.shape == (2, 5) and bool(logits.isfinite().all()) and not torch.equal(logits, other)
    assert samples_in(batch) == 2 and CalibrationLoader([batch]).batch_size == 2
    language = {op for op, module in model.named_modules() if list(module.parameters(recurse=False))} - {""}
    tower = towers_with(batch)
    assert {tower(op) for op in language} == {"vision"}


def test_each_sample_is_one_position_of_an_image() -> None:
    model, batch = loaded("vit")[0], batch_of("vit")
    logits = model(**batch).logits
    reference = Reference(logits, image_positions(batch))
    record = record_of(logits + 0.1 * torch.randn_like(logits), reference, batch, [None, None])
    found = summary([record], [totals(reference, 0)], 0)
    assert found["image_divergence"] == pytest.approx(found["divergence"])
    assert found["text_divergence"] is found["perplexity"] is found["accuracy"] is None


def test_a_sample_has_one_image_and_its_words_are_left_out() -> None:
    processor = loaded("vit")[1]
    prepared = prepare(Sample("a", "What is it?", (noise(60, 40),), "x"), processor, LIMITS, None)
    assert (prepared.text, prepared.sample.prompt, prepared.sample.answer) == ("", "", None)
    for images in ((), (noise(8, 8), noise(8, 8))):
        with pytest.raises(InputError, match=f"sample a: the sample has {len(images)} images, and the model takes one"):
            prepare(Sample("a", "What is it?", images), processor, LIMITS, None)


def test_a_folder_of_images_is_a_calibration_set(tmp_path: Path) -> None:
    """The default format, chat, has no effect."""
    processor = loaded("vit")[1]
    for number in range(4):
        noise(60, 40, number).save(tmp_path / f"{number}.png")
    spec = CalibrationSpec(
        name="set",
        source="local",
        path=str(tmp_path),
        num_samples=2,
        num_heldout=2,
        batch_size=2,
        seed=0,
        min_pixels=784,
        max_pixels=1000,
        max_tokens=10,
    )
    calibration, heldout, manifest = extract(spec, processor, a_model_manifest())
    assert not manifest.text_only and manifest.answers["calibration"].given == 0
    assert calibration[0].sample.images[0].size == (38, 25)
    write_samples(tmp_path / "heldout.parquet", heldout)
    (batch,), answers = load_heldout(tmp_path / "heldout.parquet", manifest, processor, 1)
    assert answers == [[None, None]]
    assert torch.equal(batch["pixel_values"], batches_of(heldout, 2, processor)[0]["pixel_values"])


def test_images_that_give_other_shapes_cannot_share_a_batch() -> None:
    one = batch_of("vit", 1)
    other = {"pixel_values": one["pixel_values"][..., :14]}
    with pytest.raises(InputError, match="samples whose images give other shapes of pixel_values cannot share"):
        collate([one, other])


def test_every_class_has_a_family_or_a_reason() -> None:
    for model_type, known in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for architecture in (known,) if isinstance(known, str) else known:
            config = {"model_type": model_type, "architectures": [architecture]}
            assert IMAGE_CLASSIFIER.matches(config)
            refused = model_type in UNFIT or architecture.endswith("WithTeacher") or model_type == "pp_lcnet"
            if model_type in CONFIG_MAPPING:
                assert bool(IMAGE_CLASSIFIER.refuse(config)) == refused
    assert not IMAGE_CLASSIFIER.matches({"model_type": "vit", "architectures": ["ViTModel"]})


def test_one_label_and_a_damaged_processor_are_refused(tmp_path: Path) -> None:

    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "id2label": {"0": "a"}}
    assert "it has one label" in IMAGE_CLASSIFIER.refuse(config)
    folder = Path(shutil.copytree(snapshot("vit"), tmp_path / "vit"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0, 0, 0]}))
    with pytest.raises(InputError, match="pixel_values that are not finite"):
        build_manifest(folder, "vit", "local", {})
