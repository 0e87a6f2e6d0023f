"""The image processors and processors of transformers: loaded with PIL or torchvision, and asked for tensors.

An image of more than `max_pixels` is reduced to that area, with its aspect ratio, and is stored so. What the processor
does with it then (a fixed size, tiles, patches) is the model's own affair. `min_pixels` has no effect.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import is_torchvision_available

from auto_quantize_model.files import InputError
from auto_quantize_model.models.family import Parts, Processor
from auto_quantize_model.models.sample import Limits, Prepared
from auto_quantize_model.models.words import PROCESSOR_ERRORS, panics

TRAINED_BY = "labels"  # an argument with which a model computes a loss
TORCHVISION = "install torchvision of the same release as torch (pip install torchvision), or use another model"


def refuse_backend(config: Mapping[str, Any]) -> str:
    """Why an image processor cannot be used here, in words; empty if it can."""
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(config["model_type"])
    if backends and "pil" not in backends and not is_torchvision_available():
        return f"has an image processor that needs torchvision, which is not installed; {TORCHVISION}"
    return ""


def image_processor_of(parts: Parts) -> Any:
    """The image processor of the given backend.

    Raises:
        InputError: it needs a library that is not installed.
    """
    try:
        return AutoImageProcessor.from_pretrained(parts.directory, local_files_only=True, backend=parts.backend)
    except ImportError as error:
        advice = TORCHVISION if "torchvision" in str(error).lower() else "install it"
        raise InputError(
            f"{parts.directory}: the image processor needs a library that is not installed ({error}); {advice}"
        ) from None


def fit(image: Image.Image, processor: Processor, limits: Limits) -> Image.Image:
    """The image with at most `limits.max_pixels`, and at least one pixel on each side."""
    pixels = image.width * image.height
    if pixels <= limits.max_pixels:
        return image
    scale = math.sqrt(limits.max_pixels / pixels)
    size = max(1, math.floor(image.width * scale)), max(1, math.floor(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def made_by(whole: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors that a processor makes, all numbers float32, without what computes a loss.

    Raises:
        InputError: the processor refuses the sample.
    """
    try:
        with panics():
            made = whole(return_tensors="pt", **options)
    except (*PROCESSOR_ERRORS, OSError, AssertionError) as error:
        raise InputError(
            f"the model's processor refuses it ({type(error).__name__}: {error}); change or remove the sample"
        ) from None
    found = {name: value for name, value in dict(made).items() if isinstance(value, torch.Tensor)}
    found.pop(TRAINED_BY, None)
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def require_same(made: Mapping[str, torch.Tensor], prepared: Prepared) -> None:
    """Refuse tensors whose tokens are not those of the prepared sample, or which are not finite.

    Raises:
        InputError: the message names the tensor.
    """
    if "input_ids" in made and tuple(made["input_ids"][0].tolist()) != prepared.input_ids:
        raise InputError(
            "the model's processor makes other tokens than at the extraction; run the calibration rule again"
        )
    for name, value in made.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"the processor returns {name} that are not finite; complete the snapshot")
