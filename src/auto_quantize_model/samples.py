"""One sample {image?, prompt, answer?} to the tensors that the model takes, through its own processor and template."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from auto_quantize_model.files import InputError
from auto_quantize_model.snapshot import Processor


@dataclass(frozen=True)
class Limits:
    """How large a sample may become: image area in pixels after resizing, and tokens in all."""

    min_pixels: int
    max_pixels: int
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """A conversation of one turn. `image` is RGB; `answer` is what the assistant should say, where it is known."""

    id: str
    prompt: str
    image: Image.Image | None = None
    answer: str | None = None


def encode(sample: Sample, processor: Processor, limits: Limits) -> dict[str, torch.Tensor]:
    """The model's keyword arguments for one sample.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens); where the model takes images also
        `mm_token_type_ids` (1 at image tokens), the same; with an image also `pixel_values`, float32 (patches,
        channels * time * height * width), and `image_grid_thw`, int64 (1, 3), in patches. The answer, where there is
        one, is the assistant's turn; without it the turn is opened.

    Raises:
        InputError: the sample has more than `limits.max_tokens` tokens, or an image that the model does not take.
    """
    text = render_conversation(sample, processor)
    image_inputs: dict[str, torch.Tensor] = {}
    if sample.image is not None:
        image_inputs = dict(
            processor.image_processor(
                images=[sample.image],
                size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
                return_tensors="pt",
            )
        )
        image_tokens = int(image_inputs["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
        token = str(processor.image_token)
        text = text.replace(token, token * image_tokens, 1)
    ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    if ids.shape[1] > limits.max_tokens:
        raise InputError(
            f"sample {sample.id}: {ids.shape[1]} tokens, over the limit of {limits.max_tokens}; raise"
            " calibration.max_tokens or lower calibration.max_pixels"
        )
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if processor.image_token_id is not None:
        encoded["mm_token_type_ids"] = (ids == processor.image_token_id).long()
    return encoded | image_inputs


def render_conversation(sample: Sample, processor: Processor) -> str:
    """The sample as text by the model's chat template, with one image token standing for the image.

    Raises:
        InputError: the sample's own words contain the image token, which would be taken for an image, or it has an
            image and the model takes none.
    """
    words = {"user": sample.prompt, "assistant": sample.answer}
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text} for role, text in words.items() if text is not None
    ]
    if processor.image_token is None:
        if sample.image is not None:
            raise InputError(
                f"sample {sample.id} has an image, and the model takes none; use samples of text"
                " (calibration.columns.image null, or a JSONL without 'image')"
            )
    elif any(processor.image_token in message["content"] for message in messages):
        raise InputError(f"sample {sample.id}: its text contains the image token {processor.image_token}; take it out")
    else:
        # Templates of text models take words, those of models with images lists of parts.
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if sample.image is not None:
            messages[0]["content"].insert(0, {"type": "image"})
    return processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=sample.answer is None
    )


def answer_span(sample: Sample, processor: Processor, limits: Limits) -> range | None:
    """The positions of the answer's tokens in the encoded sample; None where it has none of its own.

    It has none where the template writes the answer otherwise than after the opened turn, or the tokenizer joins it to
    its surroundings: what would be compared then is not the answer.
    """
    if sample.answer is None:
        return None
    whole = encode(sample, processor, limits)["input_ids"][0].tolist()
    before = encode(replace(sample, answer=None), processor, limits)["input_ids"][0].tolist()
    answer = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    span = range(len(before), len(before) + len(answer))
    return span if answer and whole[: span.stop] == before + answer else None


def collate(encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack encoded samples into one batch.

    Raises:
        InputError: they differ in length or only some have an image. Padding would be counted in a summed squared
            error as if it were output, so it is refused rather than added.
    """
    lengths = sorted({sample["input_ids"].shape[1] for sample in encoded})
    if len(lengths) > 1 or len({frozenset(sample) for sample in encoded}) > 1:
        raise InputError(
            f"samples of {lengths} tokens, or with and without image, cannot share a batch without padding, which"
            " would be counted in the error; set calibration.batch_size to 1"
        )
    return {name: torch.cat([sample[name] for sample in encoded]) for name in encoded[0]}
