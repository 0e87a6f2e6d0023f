"""PaliGemma: images and the prompt as a prefix, the answer as a suffix, and no chat template."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import LIMITS, loaded, noise, outputs, sample, snapshot

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.metrics import next_token_loss
from auto_quantize_model.models.encode import prepare, tensors
from auto_quantize_model.models.families.image_text import IMAGE_TEXT
from auto_quantize_model.models.families.paligemma import PALIGEMMA
from auto_quantize_model.models.snapshot import build_manifest
from auto_quantize_model.models.units import tower_of

NAME = "paligemma"


def batch_of(*images: Any, answer: str | None = "A cat.") -> Any:
    processor = loaded(NAME)[1]
    return tensors(prepare(sample(*images, answer=answer), processor, LIMITS, None), processor)


def test_a_snapshot_is_accepted() -> None:
    assert build_manifest(snapshot(NAME), NAME, "local", {}).architecture == "PaliGemmaForConditionalGeneration"
    assert loaded(NAME)[1].family is PALIGEMMA


@pytest.mark.parametrize("count", [1, 2])
def test_the_tensors_are_those_of_the_official_processor(count: int) -> None:
    processor, images = loaded(NAME)[1], [noise(60, 40), noise(30, 70)][:count]
    expected = processor.whole(
        text="<image>" * count + "What is it?", images=[images], suffix="A cat.", return_tensors="pt"
    )
    batch = batch_of(*images)
    assert {*batch, "labels"} == {*expected}
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert int(batch.image_positions.sum()) == 16 * count


def test_the_answer_is_located_and_an_image_reaches_the_output() -> None:
    model, processor = loaded(NAME)
    prepared = prepare(sample(noise(60, 40)), processor, LIMITS, None)
    assert prepared.answer_span is not None
    ids = prepared.input_ids[prepared.answer_span.start : prepared.answer_span.stop]
    assert processor.tokenizer.decode(ids) == "A cat."
    found, other = (outputs(model, batch_of(noise(60, 40, seed))) for seed in (0, 1))
    assert bool(found[""].isfinite().all()) and not torch.equal(found[""], other[""])
    assert any(tower_of(op) == "vision" for op in found)


def test_only_an_answer_has_next_tokens() -> None:
    """Before the answer, each token sees those after it."""
    model, processor = loaded(NAME)
    for answer, tokens in (("A cat.", 6), (None, 0)):
        prepared = prepare(sample(noise(60, 40), answer=answer), processor, LIMITS, None)
        batch = tensors(prepared, processor)
        assert next_token_loss(model(**batch).logits, batch, [prepared.answer_span])[1] == tokens


def test_what_does_not_fit_is_refused() -> None:
    processor = loaded(NAME)[1]
    with pytest.raises(InputError, match=r"sample a: PaliGemma takes a prompt .* set calibration.format to plain"):
        prepare(sample(noise(60, 40)), processor, LIMITS, lambda messages, opened: "written by a template")
    with pytest.raises(InputError, match="sample a: PaliGemma takes an image with each text"):
        prepare(sample(), processor, LIMITS, None)
    changed = replace(prepare(sample(noise(60, 40)), processor, LIMITS, None), input_ids=(1, 2))
    with pytest.raises(InputError, match="makes other tokens than at the extraction"):
        tensors(changed, processor)


def test_no_other_family_takes_it() -> None:
    config = {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"]}
    assert PALIGEMMA.matches(config) and IMAGE_TEXT.matches(config)
    assert not PALIGEMMA.matches(config | {"architectures": ["LlavaForConditionalGeneration"]})
