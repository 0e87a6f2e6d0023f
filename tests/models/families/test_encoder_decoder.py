"""Encoder-decoders of text: the prompt for the encoder, the answer for the decoder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import LIMITS, loaded, snapshot

from auto_quantize_model.files import InputError
from auto_quantize_model.made.tiny_encoder_decoders import ENCODER_DECODER_SHAPES
from auto_quantize_model.measure.metrics import next_token_loss, right_answers
from auto_quantize_model.models.encode import collate, prepare, tensors
from auto_quantize_model.models.families.encoder_decoder import ENCODER_DECODER
from auto_quantize_model.models.sample import Sample, tokens_of
from auto_quantize_model.models.snapshot import build_manifest, load_processor

# They take the last label as the decoder's first token, which is the language where a tokenizer has languages.
BY_LANGUAGE = {"mbart", "plbart"}


@pytest.mark.parametrize("name", [name for name in ENCODER_DECODER_SHAPES if name not in BY_LANGUAGE])
def test_the_logits_are_those_of_the_labels(name: str) -> None:
    """transformers makes the decoder's tokens of labels in the same way."""
    assert build_manifest(snapshot(name), name, "local", {}).architecture == ENCODER_DECODER_SHAPES[name].architecture
    model, processor = loaded(name)
    assert processor.family is ENCODER_DECODER
    prepared = prepare(Sample("a", "What is it?", answer="A cat."), processor, LIMITS, None)
    batch = tensors(prepared, processor)
    tokenizer = processor.tokenizer
    labels = tokenizer(text_target="A cat.", return_tensors="pt")["input_ids"]
    expected = model(**tokenizer("What is it?", return_tensors="pt"), labels=labels)
    logits = model(**batch).logits
    torch.testing.assert_close(logits[:, :-1], expected.logits, rtol=1e-4, atol=1e-5)
    assert prepared.answer_span == range(1, 7)
    loss, tokens = next_token_loss(logits, batch, [prepared.answer_span])
    assert tokens == 6 and loss / tokens == pytest.approx(float(expected.loss), rel=1e-4)


def test_an_answer_is_right_where_each_token_of_it_is_the_likeliest() -> None:
    processor = loaded("t5")[1]
    spans, encoded = [], []
    for answer in ("A cat.", "A dog."):
        prepared = prepare(Sample("a", "What is it?", answer=answer), processor, LIMITS, None)
        spans.append(prepared.answer_span)
        encoded.append(tensors(prepared, processor))
    batch = collate(encoded)
    tokens = tokens_of(batch)
    assert tokens is not None and tokens.shape == (2, 7) and batch["input_ids"].shape == (2, 11)
    logits = torch.nn.functional.one_hot(tokens.roll(-1, 1), 300).float()
    logits[1, 3] = 0
    assert right_answers(logits, batch, spans) == [True, False]


def test_without_an_answer_the_decoder_has_its_start_alone() -> None:
    model, processor = loaded("t5")
    prepared = prepare(Sample("a", "What is it?"), processor, LIMITS, None)
    batch = tensors(prepared, processor)
    assert batch["decoder_input_ids"].tolist() == [[processor.decoder_start_token_id]]
    assert prepared.answer_span is None and next_token_loss(model(**batch).logits, batch, [None]) == (0.0, 0)


def test_special_tokens_of_the_answer_are_the_decoders_and_no_part_of_the_answer() -> None:
    """BART's tokenizer begins and ends each text with a special token."""

    class Bart:
        all_special_ids = (0, 2)

        def __call__(self, text: str = "", text_target: str = "", **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [0, *[10 + len(word) for word in (text or text_target).split()], 2]}

    processor = replace(loaded("bart")[1], tokenizer=Bart(), decoder_start_token_id=2)
    ids, span = ENCODER_DECODER.tokenize("What is it a cat", range(11, 16), (), processor, True)
    assert ids == (0, 14, 12, 12, 2, 2, 0, 11, 13) and span == range(2, 4)


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("whisper", "WhisperForConditionalGeneration", "takes sound"),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", "takes sound"),
        ("fsmt", "FSMTForConditionalGeneration", "two vocabularies"),
    ],
)
def test_what_takes_more_than_text_is_refused(model_type: str, architecture: str, reason: str) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    assert ENCODER_DECODER.matches(config) and re.search(reason, ENCODER_DECODER.refuse(config))


def test_a_missing_start_token_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot("t5"), tmp_path / "t5"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": None}))
    with pytest.raises(InputError, match="decoder_start_token_id is None"):
        load_processor(folder)
