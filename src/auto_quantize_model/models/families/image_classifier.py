"""Classifiers of images. A sample is one image, and the words of a sample are left out.

The logits have one row for each sample, and this row is the one position of an image. It has a token id that stands for
the image.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families.encoder import ONE_LABEL, labels_of
from auto_quantize_model.models.family import Family, Parts, Processor, Tokenized
from auto_quantize_model.models.pixels import fit, image_processor_of, made_by, refuse_backend, require_same
from auto_quantize_model.models.sample import Batch, Prepared

IMAGE_ID = 0  # stands for the image
# Models of the same mapping that an image alone does not measure.
UNFIT = {
    "imagegpt": "it takes the colours of an image as tokens",
    "perceiver": "it takes bytes",
    "shieldgemma2": "it takes a text with the image",
    "timm_wrapper": "its modules are those of timm",
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is a classifier of images of its model_type."""
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"], ())
    return config["architectures"][0] in ((known,) if isinstance(known, str) else known)


def refuse(config: Mapping[str, Any]) -> str:
    """Why such a model cannot be measured, in words; empty if it can."""
    if reason := UNFIT.get(config["model_type"]):
        return f"is not supported: {reason}"
    if config["architectures"][0].endswith("WithTeacher"):
        return "is not supported: its logits are the mean of two heads; use its class without teacher"
    return refuse_backend(config) or (ONE_LABEL if labels_of(config) == 1 else "")


def load(parts: Parts) -> dict[str, Any]:
    """The image processor.

    Raises:
        InputError: it needs a library that is not installed.
    """
    return {
        "image_processor": image_processor_of(parts),
        "image_token_ids": (IMAGE_ID,),
        "image_backend": parts.backend,
    }


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """One token, which stands for the image.

    Raises:
        InputError: the sample does not have one image.
    """
    if len(images) != 1:
        raise InputError(f"the sample has {len(images)} images, and the model takes one; give it one")
    return (IMAGE_ID,), None


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """`pixel_values`, float32 (1, 3, height, width), and what else the image processor makes.

    Raises:
        InputError: the image processor refuses the image, or pixels are not finite.
    """
    made = made_by(processor.image_processor, images=list(prepared.sample.images))
    require_same(made, prepared)
    return Batch(made, torch.ones(1, dtype=torch.bool), causal=False)


IMAGE_CLASSIFIER = Family(
    "classifier of images",
    matches,
    refuse,
    True,
    load,
    fit,
    tokenize,
    tensors,
    takes_words=False,
    takes_answers=False,
    places_images=True,
)
