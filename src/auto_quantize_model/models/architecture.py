"""The family of a model, by its config.json; a configuration that no family takes is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families import embedding, encoder, encoder_decoder
from auto_quantize_model.models.families.causal import CAUSAL, LISTED_ELSEWHERE
from auto_quantize_model.models.families.embedding import IMAGE_EMBEDDING, TEXT_EMBEDDING
from auto_quantize_model.models.families.encoder import ENCODER
from auto_quantize_model.models.families.encoder_decoder import ENCODER_DECODER
from auto_quantize_model.models.families.image_classifier import IMAGE_CLASSIFIER
from auto_quantize_model.models.families.image_text import IMAGE_TEXT, PLACED
from auto_quantize_model.models.families.paligemma import PALIGEMMA
from auto_quantize_model.models.families.qwen_vl import QWEN_VL
from auto_quantize_model.models.family import Family

# In this order: the first that matches is the family.
FAMILIES = (
    QWEN_VL,
    PALIGEMMA,
    PLACED,
    IMAGE_TEXT,
    CAUSAL,
    ENCODER_DECODER,
    ENCODER,
    IMAGE_CLASSIFIER,
    TEXT_EMBEDDING,
    IMAGE_EMBEDDING,
)
SUPPORTED = (
    "the classes of transformers that AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM,"
    " AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification and"
    " AutoModelForImageClassification load, and those of AutoModel and AutoModelForTextEncoding that embed texts or"
    " images"
)
TABLES: tuple[Mapping[str, Any], ...] = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *encoder_decoder.TABLES,
    *encoder.TABLES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    *embedding.TABLES,
)


def check_architecture(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a configuration, which is refused if its model cannot be measured as a whole.

    Raises:
        InputError: `architectures` does not name one class, or names one that is unsupported or does not fit the
            model_type. Or the family cannot measure it.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"{path}: architectures is {names!r}; give a list of one class of transformers")
    architecture = names[0]
    if not any(architecture in _classes(known) for table in TABLES for known in table.values()):
        raise InputError(f"{path}: architecture {architecture} is not supported; supported: {SUPPORTED}")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: model_type {model_type!r} is unknown to transformers {transformers.__version__}; correct the file"
        )
    family = next((family for family in FAMILIES if family.matches(config)), None)
    if family is None:
        expected = [*dict.fromkeys(name for table in TABLES for name in _classes(table.get(model_type, ())))]
        if architecture in expected:
            raise InputError(f"{path}: architecture {architecture} takes no text and no image, and is not supported")
        raise InputError(
            f"{path}: architectures names {architecture}, and model_type {model_type!r} is that of"
            f" {' or '.join(expected) or 'no supported class'}; correct config.json"
        )
    if reason := family.refuse(config):
        raise InputError(f"{path}: architecture {architecture} of model_type {model_type!r} {reason}")
    return family


def _classes(known: str | tuple[str, ...]) -> tuple[str, ...]:
    """The classes of an entry of transformers' tables, which has one name or several."""
    return (known,) if isinstance(known, str) else known


def continues_text(architecture: str) -> bool:
    """Whether a supported class is a causal language model of text alone, by its name alone."""
    return architecture in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *LISTED_ELSEWHERE.values()}


def takes_images(architecture: str) -> bool:
    """Whether a supported class takes images, by its name alone."""
    others = LISTED_ELSEWHERE.values()
    return architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and architecture not in others
