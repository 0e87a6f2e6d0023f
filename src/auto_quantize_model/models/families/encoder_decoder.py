"""Encoder-decoders of text, such as T5 and BART. The encoder takes the prompt, and the decoder takes the answer.

The decoder's first token is that of its start. So a row of the logits is the distribution of the next token of the
answer. The stored token ids are those of the prompt, followed by those of the decoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families.causal import OTHER_SENSES, fit
from auto_quantize_model.models.family import Family, Parts, Processor, Tokenized
from auto_quantize_model.models.sample import Batch, Prepared
from auto_quantize_model.models.words import panics

TABLES = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
# Models of these mappings that take other things than a text.
UNFIT = {
    "encoder-decoder": "its classes are named by other files",
    "fsmt": "its two vocabularies need a tokenizer each",
    "prophetnet": "its logits are a part of what its head returns",
    "t5gemma2": "it takes images too",
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is that of AutoModelForSeq2SeqLM or AutoModelForSpeechSeq2Seq for its model_type."""
    return any(config["architectures"][0] == table.get(config["model_type"]) for table in TABLES)


def refuse(config: Mapping[str, Any]) -> str:
    """Why such a model cannot be measured, in words; empty if it can."""
    model_type = config["model_type"]
    if reason := UNFIT.get(model_type):
        return f"is not supported: {reason}"
    senses = [key for key in CONFIG_MAPPING[model_type].sub_configs if OTHER_SENSES.search(key)]
    if senses or model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES or "audio" in model_type:
        return "takes sound, and is not supported; samples are texts and images"
    return ""


def load(parts: Parts) -> dict[str, Any]:
    """The token with which the decoder starts.

    Raises:
        InputError: no file names it.
    """
    config = AutoConfig.from_pretrained(parts.directory, local_files_only=True)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:  # T5Gemma's decoder starts with its own token of beginning
        start = getattr(getattr(config, "decoder", None), "bos_token_id", None)
    if type(start) is not int:
        raise InputError(f"{parts.directory}/config.json: decoder_start_token_id is {start!r}; complete the snapshot")
    return {"decoder_start_token_id": start}


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens of the prompt, then those of the decoder; and the positions of the answer among the decoder's."""
    tokenizer = processor.tokenizer
    asked, said = (text, "") if answer is None else (text[: answer.start], text[answer.start : answer.stop])
    with panics():
        ids = tokenizer(asked, add_special_tokens=True)["input_ids"]
        written = tokenizer(text_target=said, add_special_tokens=True)["input_ids"] if said else []
    controls = set(tokenizer.all_special_ids)
    while written and written[-1] in controls:  # the end of the answer
        written.pop()
    first = next((at for at, token in enumerate(written) if token not in controls), len(written))
    span = range(1 + first, 1 + len(written)) if len(written) > first else None
    return (*ids, int(processor.decoder_start_token_id or 0), *written), span


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """`input_ids`, `attention_mask` and `decoder_input_ids`, int64 (1, tokens)."""
    decoded = prepared.answer_span.stop if prepared.answer_span else 1
    ids = torch.tensor([prepared.input_ids])
    asked = ids[:, :-decoded]
    return Batch({"input_ids": asked, "attention_mask": torch.ones_like(asked), "decoder_input_ids": ids[:, -decoded:]})


ENCODER_DECODER = Family("encoder-decoder of text", matches, refuse, False, load, fit, tokenize, tensors)
