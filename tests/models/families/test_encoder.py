"""Encoders of text: masked language models, and classifiers of texts and of tokens."""

import re
from typing import Any

import pytest
import torch
from tiny_models import LIMITS, loaded, noise, snapshot
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auto_quantize_model.files import InputError
from auto_quantize_model.made.tiny_encoders import ENCODER_SHAPES
from auto_quantize_model.measure.heldout import record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.models.encode import collate, encode, prepare
from auto_quantize_model.models.families.causal import CAUSAL
from auto_quantize_model.models.families.encoder import ENCODER, TABLES, UNFIT
from auto_quantize_model.models.sample import Sample, image_positions
from auto_quantize_model.models.snapshot import build_manifest

TEXTS = ("The ship lay quiet in the harbour.", "Two numbers are prime to each oth.")


def config(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **others}


@pytest.mark.parametrize("name", ENCODER_SHAPES)
def test_a_snapshot_is_accepted_and_gives_logits(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == ENCODER_SHAPES[name].architecture
    model, processor = loaded(name)
    assert processor.family is ENCODER
    batch = collate([encode(Sample(text, text), processor, LIMITS) for text in TEXTS])
    logits = model(**batch).logits
    assert logits.shape[0] == 2 and bool(logits.isfinite().all()) and float(logits.std()) > 0.1
    assert logits.ndim == (2 if "SequenceClassification" in ENCODER_SHAPES[name].architecture else 3)
    assert image_positions(batch) is None and not batch.causal


@pytest.mark.parametrize("name", ["bert", "bert_classifier", "distilbert_tokens"])
def test_a_state_is_measured_without_next_tokens_and_answers(name: str) -> None:
    """The figures of a classifier of texts are means over samples, those of the others means over tokens."""
    model, processor = loaded(name)
    batch = collate([encode(Sample(text, text, answer="yes"), processor, LIMITS) for text in TEXTS])
    logits = model(**batch).logits
    reference = Reference(logits, image_positions(batch))
    record = record_of(logits + 0.1 * torch.randn_like(logits), reference, batch, [None, None])
    found = summary([record], [totals(reference, 0)], 0)
    assert len(record["divergences"]) == 2 and found["divergence"] == pytest.approx(sum(record["divergences"]) / 2)
    assert found["perplexity"] is None and found["accuracy"] is None
    assert reference.totals()["text_positions"] == logits.shape[:-1].numel()


def test_the_answer_is_left_out_and_an_image_is_refused() -> None:
    processor = loaded("bert_classifier")[1]
    prepared = prepare(Sample("a", "A text.", answer="positive"), processor, LIMITS, None)
    assert processor.tokenizer.decode(prepared.input_ids) == prepared.text == "A text."
    assert prepared.sample.answer is None and prepared.answer_span is None
    with pytest.raises(InputError, match="sample a: the sample has an image, and the model takes none"):
        prepare(Sample("a", "A text.", (noise(8, 8),)), processor, LIMITS, None)


def test_more_tokens_than_the_tokenizer_says_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = loaded("roberta_classifier")[1]
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 5)
    with pytest.raises(InputError, match="sample a: 7 tokens, and the tokenizer's model_max_length is 5"):
        prepare(Sample("a", "A text."), processor, LIMITS, None)


def test_every_class_has_a_family_or_a_reason() -> None:
    for table in TABLES:
        for model_type, architecture in table.items():
            if model_type in CONFIG_MAPPING and not CAUSAL.matches(config(model_type, architecture)):
                assert ENCODER.matches(config(model_type, architecture))
                assert bool(ENCODER.refuse(config(model_type, architecture))) or model_type not in UNFIT


@pytest.mark.parametrize(
    ("model_type", "architecture", "others", "reason"),
    [
        ("bart", "BartForSequenceClassification", {}, "it is an encoder-decoder"),
        ("llama", "LlamaForSequenceClassification", {}, "takes the last token's row"),
        ("xlm-roberta", "XLMRobertaForSequenceClassification", {"id2label": {"0": "LABEL_0"}}, "it has one label"),
        ("bert", "BertForSequenceClassification", {"num_labels": 1}, "it has one label"),
        ("layoutlmv3", "LayoutLMv3ForTokenClassification", {}, "takes the places of words"),
        ("gemma3", "Gemma3ForSequenceClassification", {}, r"takes images or sound \(vision_config\)"),
    ],
)
def test_what_is_no_plain_encoder_is_refused(
    model_type: str, architecture: str, others: dict[str, Any], reason: str
) -> None:
    found = config(model_type, architecture, **others)
    assert ENCODER.matches(found)
    assert re.search(reason, ENCODER.refuse(found))
    assert ENCODER.refuse(config("bert", "BertForSequenceClassification")) == ""
