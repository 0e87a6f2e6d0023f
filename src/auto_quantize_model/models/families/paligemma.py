"""PaliGemma: one image or more, then a prefix in which every token sees every other, then a causal suffix.

The processor places the images before the prompt, which is the prefix. The answer is the suffix. No chat template.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families.image_text import load, refuse
from auto_quantize_model.models.family import Family, Processor, Tokenized
from auto_quantize_model.models.pixels import fit, made_by, require_same
from auto_quantize_model.models.sample import Batch, Prepared

ARCHITECTURE = "PaliGemmaForConditionalGeneration"


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is PaliGemma's, by name."""
    return bool(config["model_type"] == "paligemma" and config["architectures"][0] == ARCHITECTURE)


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens of the images, of the text before the answer, and of the answer, without the end's among the answer's.

    Raises:
        InputError: a chat template wrote the text, or the sample has no image.
    """
    if not special:
        raise InputError("PaliGemma takes a prompt and an answer as they are; set calibration.format to plain")
    if not images:
        raise InputError("PaliGemma takes an image with each text; give the sample an image, or remove it")
    prefix, suffix = (text, None) if answer is None else (text[: answer.start], text[answer.start :])
    made = _made(prefix, suffix, images, processor)
    ids = tuple(made["input_ids"][0].tolist())
    count = int(made["token_type_ids"].sum()) - 1  # of the answer's tokens; the last token is the end's
    return ids, range(len(ids) - 1 - count, len(ids) - 1) if suffix and count > 0 else None


def _made(
    prefix: str, suffix: str | None, images: tuple[Image.Image, ...], processor: Processor
) -> dict[str, torch.Tensor]:
    """The tensors that the processor makes."""
    shown = str(processor.image_token) * len(images)
    options = {} if suffix is None else {"suffix": [suffix]}
    return made_by(processor.whole, text=[shown + prefix], images=[list(images)], **options)


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """The model's keyword arguments for one prepared sample.

    Returns:
        `input_ids`, `attention_mask` and `token_type_ids` (1 at the answer), int64 (1, tokens), and `pixel_values`,
        float32 (images, 3, height, width).

    Raises:
        InputError: the tokens are not those of the prepared sample, or pixels are not finite.
    """
    answer = prepared.sample.answer or None
    prefix = prepared.text[: len(prepared.text) - len(answer or "")]
    made = _made(prefix, answer, prepared.sample.images, processor)
    require_same(made, prepared)
    return Batch(made, torch.isin(made["input_ids"], torch.tensor(processor.image_token_ids)), causal=False)


PALIGEMMA = Family("PaliGemma", matches, refuse, True, load, fit, tokenize, tensors, places_images=True)
