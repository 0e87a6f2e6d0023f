"""Qwen's models of images and text: one image processor, which gives patches of any image size as a list.

The images are stored at the size to which the image processor resizes them, and later runs do not resize. So the
pixels do not depend on a second resizing. Only the image processor is used of the snapshot's processor, because the
whole needs torchvision for videos.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from auto_quantize_model.files import InputError
from auto_quantize_model.models.family import Family, Parts, Processor, Tokenized
from auto_quantize_model.models.sample import Batch, Limits, Prepared
from auto_quantize_model.models.words import PROCESSOR_ERRORS, tokenized

ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is one of Qwen's, by name."""
    return bool(ARCHITECTURES.get(config["model_type"]) == config["architectures"][0])


def load(parts: Parts) -> dict[str, Any]:
    """The image processor, and the token that stands for a part of an image.

    Raises:
        InputError: the image processor cuts other patches than the model takes, or the token is not in the tokenizer.
    """
    config, tokenizer = parts.config, parts.tokenizer
    image_processor = AutoImageProcessor.from_pretrained(parts.directory, local_files_only=True, backend=parts.backend)
    _require_patches(parts, image_processor)
    image_token_id = config.get("image_token_id")
    image_token: Any = None
    if type(image_token_id) is int and 0 <= image_token_id < len(tokenizer):
        image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    if image_token is None:
        raise InputError(
            f"{parts.directory}/config.json: image_token_id {image_token_id!r} is not in the tokenizer; correct"
            " config.json"
        )
    return {
        "image_processor": image_processor,
        "image_token": image_token,
        "image_token_ids": (image_token_id,),
        "image_backend": parts.backend,
    }


def _require_patches(parts: Parts, image_processor: Any) -> None:
    """Refuse an image processor that cuts images into other patches than the model's vision tower takes."""
    vision = parts.config.get("vision_config", {})
    names = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    for ours, theirs in names.items():
        cut = getattr(image_processor, ours, None)
        if cut is None or cut != vision.get(theirs, cut):
            raise InputError(
                f"{parts.directory}: {ours} of the image processor is {cut}, and config.json asks for"
                f" {vision.get(theirs)}; complete the snapshot with its own preprocessor_config.json"
            )


def fit(image: Image.Image, processor: Processor, limits: Limits) -> Image.Image:
    """An RGB image at the size to which the model's processor resizes it, with the processor's own pixels.

    The processor runs without rescaling and normalizing, and its patches are put together again. Later runs do not
    resize, because a processor may resize an image again that has a size of its own choice.

    Raises:
        InputError: the processor refuses the image.
    """
    handler = processor.image_processor
    size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    made = _processed(processor, image, size=size, do_rescale=False, do_normalize=False)
    _, rows, columns = made["image_grid_thw"][0].tolist()
    side, merge = handler.patch_size, handler.merge_size
    shape = (rows // merge, columns // merge, merge, merge, 3, handler.temporal_patch_size, side, side)
    patches = made["pixel_values"].reshape(shape)[:, :, :, :, :, 0]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)
    return Image.fromarray(pixels.numpy().astype(np.uint8))


def image_inputs(image: Image.Image, processor: Processor) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_grid_thw` of an image that already has the processor's size.

    Raises:
        InputError: the processor refuses the image, or returns values that the model does not take.
    """
    made = _processed(processor, image, do_resize=False)
    if made["pixel_values"].dtype != torch.float32 or not bool(made["pixel_values"].isfinite().all()):
        raise InputError("the image processor returns pixels that are not finite float32; complete the snapshot")
    return made


def _processed(processor: Processor, image: Image.Image, **options: Any) -> dict[str, torch.Tensor]:
    """The image processor's output for one image, with checked shapes."""
    handler = processor.image_processor
    try:
        made = dict(handler(images=[image], return_tensors="pt", **options))
        pixels, grid = made["pixel_values"], made["image_grid_thw"]
        values = 3 * handler.temporal_patch_size * handler.patch_size**2
        wanted = (int(grid.prod()), values), (1, 3)
        found = tuple(pixels.shape), tuple(grid.shape)
    except PROCESSOR_ERRORS as error:
        raise InputError(
            f"the model's processor refuses it ({type(error).__name__}: {error}); change or remove the sample"
        ) from None
    if found != wanted:
        raise InputError(
            f"the image processor returns pixel_values and image_grid_thw of shapes {found}, not {wanted}; complete the"
            " snapshot's preprocessor_config.json"
        )
    return {"pixel_values": pixels, "image_grid_thw": grid}


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens of a text, with an image token for each part of each image."""
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    counts = [(image.width // side) * (image.height // side) for image in images]
    expanded, answer = _expanded(text, answer, str(processor.image_token), counts)
    return tokenized(expanded, answer, processor, special)


def _expanded(text: str, answer: range | None, token: str, counts: Sequence[int]) -> tuple[str, range | None]:
    """The text with as many image tokens in place of each one as its image has parts."""
    before, *after = text.split(token)
    if len(after) != len(counts):
        raise InputError(
            f"the chat template writes {len(after)} image tokens for {len(counts)} images; complete the snapshot's"
            " template"
        )
    found, place, shift = before, len(before), 0
    for count, piece in zip(counts, after, strict=True):
        if answer is not None and place < answer.start:
            shift += (count - 1) * len(token)
        found += token * count + piece
        place += len(token) + len(piece)
    return found, None if answer is None else range(answer.start + shift, answer.stop + shift)


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """The model's keyword arguments for one prepared sample.

    Returns:
        `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at image tokens), int64 (1, tokens); with images also
        `pixel_values`, float32 (patches, channels * time * height * width), and `image_grid_thw`, int64 (images, 3), in
        patches.
    """
    ids = torch.tensor([prepared.input_ids])
    (image_token_id,) = processor.image_token_ids
    kinds = (ids == image_token_id).long()
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    if prepared.sample.images:
        made = [image_inputs(image, processor) for image in prepared.sample.images]
        encoded |= {name: torch.cat([of_image[name] for of_image in made]) for name in made[0]}
    return Batch(encoded, kinds.bool())


QWEN_VL = Family("Qwen-VL", matches, lambda config: "", True, load, fit, tokenize, tensors)
