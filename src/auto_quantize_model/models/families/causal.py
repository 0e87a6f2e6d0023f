"""Causal language models: every class of transformers that AutoModelForCausalLM loads and that takes text alone."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.models.family import Family, Parts, Processor, Tokenized
from auto_quantize_model.models.sample import Batch, Limits, Prepared
from auto_quantize_model.models.words import tokenized

# A text model that transformers lists among the models of images and text, because such models hold it.
LISTED_ELSEWHERE = {"mistral4": "Mistral4ForCausalLM"}
TAKE_MORE_THAN_TEXT = {
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
} - set(LISTED_ELSEWHERE.values())
# Models of the mapping that a text alone does not measure.
DRAFTS = "it drafts tokens for another model, and takes the states of that model"
UNFIT = {
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "musicgen_decoder": "it writes sound",
    "musicgen_melody_decoder": "it writes sound",
    "prophetnet": "its logits are a part of what its head returns",
    "reformer": "its attention draws random numbers",
}
# Keys of a configuration that describe a part for images or sound.
OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|(^|_)vq_")


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is the causal language model of its model_type, or of the text part of a larger model_type."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **LISTED_ELSEWHERE}
    if architecture == known.get(model_type):
        return True
    kind = getattr(transformers, architecture, None) if architecture in known.values() else None
    return kind is not None and bool(kind.config_class.model_type == model_type)


def refuse(config: Mapping[str, Any]) -> str:
    """Why such a model cannot be measured, in words. A part for images or sound is one, which no sample would reach."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    if reason := UNFIT.get(model_type):
        return f"is not supported: {reason}"
    blocks = {key for key, value in config.items() if isinstance(value, dict)}
    senses = sorted(key for key in blocks | set(CONFIG_MAPPING[model_type].sub_configs) if OTHER_SENSES.search(key))
    if not senses and architecture not in TAKE_MORE_THAN_TEXT:
        return ""
    named = f" ({', '.join(senses)})" if senses else ""
    return f"takes images or sound{named}, and is not supported; its tower would never run"


def load(parts: Parts) -> dict[str, Any]:
    """Nothing: the model takes no images."""
    return {}


def fit(image: Image.Image, processor: Processor, limits: Limits) -> Image.Image:
    """An error: the model takes no images."""
    raise InputError("the model takes no images")


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens of the text alone."""
    return tokenized(text, answer, processor, special)


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """`input_ids` and `attention_mask`, int64 (1, tokens)."""
    ids = torch.tensor([prepared.input_ids])
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


CAUSAL = Family("causal language model", matches, refuse, False, load, fit, tokenize, tensors)
