"""Models that embed texts or images: models without a head, measured at their last hidden state.

A sample is a prompt, or one image without words. Each position of the last hidden state counts. A pooler, which
makes one vector of all positions, has no part in that state.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES

from auto_quantize_model.models.families import causal, encoder, image_classifier
from auto_quantize_model.models.family import Family
from auto_quantize_model.models.pixels import fit, refuse_backend

TABLES: tuple[Mapping[str, Any], ...] = (MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES)


def input_of(config: Mapping[str, Any]) -> str:
    """The main input of the class, by transformers' name; empty where the class is not that of its model_type."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    known = [table.get(model_type, ()) for table in TABLES]
    if not any(architecture == of or architecture in of for of in known):
        return ""
    return str(getattr(transformers, architecture).main_input_name)


def embeds_text(config: Mapping[str, Any]) -> bool:
    """Whether the class is the model without a head of its model_type, and takes text first."""
    return input_of(config) == "input_ids"


def embeds_images(config: Mapping[str, Any]) -> bool:
    """Whether the class is the model without a head of its model_type, and takes images first."""
    return input_of(config) == "pixel_values"


def refuse_text(config: Mapping[str, Any]) -> str:
    """Why such a model of text cannot be measured, in words; empty if it can."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    if reason := encoder.UNFIT.get(model_type):
        return f"is not supported: {reason}"
    if senses := sorted(key for key in CONFIG_MAPPING[model_type].sub_configs if causal.OTHER_SENSES.search(key)):
        return f"takes images or sound ({', '.join(senses)}), and is not supported as a model that embeds texts"
    defaults = CONFIG_MAPPING[model_type]()
    whole = config.get("is_encoder_decoder", getattr(defaults, "is_encoder_decoder", False))
    if whole and architecture != MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model_type):
        return "is not supported: it is an encoder-decoder without a head; use its encoder's class"
    return ""


def refuse_images(config: Mapping[str, Any]) -> str:
    """Why such a model of images cannot be measured, in words; empty if it can."""
    if reason := image_classifier.UNFIT.get(config["model_type"]):
        return f"is not supported: {reason}"
    return refuse_backend(config)


TEXT_EMBEDDING = Family(
    "model that embeds texts",
    embeds_text,
    refuse_text,
    False,
    causal.load,
    causal.fit,
    encoder.tokenize,
    encoder.tensors,
    takes_answers=False,
    hidden_state=True,
)
IMAGE_EMBEDDING = Family(
    "model that embeds images",
    embeds_images,
    refuse_images,
    True,
    image_classifier.load,
    fit,
    image_classifier.tokenize,
    image_classifier.tensors,
    takes_words=False,
    takes_answers=False,
    places_images=True,
    hidden_state=True,
)
