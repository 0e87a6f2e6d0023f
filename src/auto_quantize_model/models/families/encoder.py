"""Encoders of text: masked language models, and classifiers of texts or of tokens. A sample is its prompt alone.

No token is masked. The logits of a classifier of texts have one row for each sample, and those of the others have one
for each token.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families import causal
from auto_quantize_model.models.family import Family, Processor, Tokenized
from auto_quantize_model.models.sample import Batch, Prepared
from auto_quantize_model.models.words import tokenized

TABLES = (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
# Models of the same mappings that need more than a text.
UNFIT = {
    "bros": "it takes the places of words",
    "canine": "it takes characters",
    "layoutlm": "it takes the places of words",
    "layoutlmv2": "it takes the places of words, and images",
    "layoutlmv3": "it takes the places of words, and images",
    "lilt": "it takes the places of words",
    "markuplm": "it takes the places of words",
    "perceiver": "it takes bytes",
    "reformer": "its attention draws random numbers",
    "tapas": "it takes tables",
}
ONE_LABEL = "is not supported: it has one label, and a divergence needs the probabilities of two or more"


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is the masked language model of its model_type, or its classifier."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    return any(architecture == table.get(model_type) for table in TABLES)


def refuse(config: Mapping[str, Any]) -> str:
    """Why such a model cannot be measured, in words; empty if it can."""
    architecture, model_type = config["architectures"][0], config["model_type"]
    if reason := UNFIT.get(model_type):
        return f"is not supported: {reason}"
    defaults = CONFIG_MAPPING[model_type]()
    if config.get("is_encoder_decoder", getattr(defaults, "is_encoder_decoder", False)):
        return "is not supported: it is an encoder-decoder"
    if senses := sorted(key for key in CONFIG_MAPPING[model_type].sub_configs if causal.OTHER_SENSES.search(key)):
        return f"takes images or sound ({', '.join(senses)}), and is not supported as a model of text"
    if architecture != MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type):
        return ""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "is not supported: it takes the last token's row of what its head returns, so no module has its logits"
    return ONE_LABEL if labels_of(config) == 1 else ""


def labels_of(config: Mapping[str, Any]) -> Any:
    """The number of labels, as transformers reads it."""
    names = config.get("id2label")
    known = CONFIG_MAPPING[config["model_type"]]().num_labels
    return len(names) if isinstance(names, dict) else config.get("num_labels", known)


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens of the text.

    Raises:
        InputError: they are more than the tokenizer says that the model takes.
    """
    ids, _ = tokenized(text, None, processor, special)
    most = processor.tokenizer.model_max_length  # RoBERTa has two positions more, which it does not use
    if len(ids) > most:
        raise InputError(f"{len(ids)} tokens, and the tokenizer's model_max_length is {most}; shorten the sample")
    return ids, None


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """`input_ids` and `attention_mask`, int64 (1, tokens)."""
    return Batch(causal.tensors(prepared, processor), causal=False)


ENCODER = Family(
    "encoder of text", matches, refuse, False, causal.load, causal.fit, tokenize, tensors, takes_answers=False
)
