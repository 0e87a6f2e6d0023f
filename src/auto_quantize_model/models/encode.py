"""From one sample (a conversation, with or without images) to the tensors that the model takes.

In: a sample, and the model's own processor. Out: token ids, the answer's position among them, the images at the size
to be stored, and tensors. What differs between models is asked of the family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.models.chat_template import Render, TemplateStopped, renderer
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.sample import Batch, Limits, Prepared, Sample
from auto_quantize_model.models.words import check_ids, check_words, joined, written

# The names of a sample's tensors with their shapes, without the first dimension, along which samples are stacked.
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def encode(sample: Sample, processor: Processor, limits: Limits) -> Batch:
    """The model's keyword arguments for one sample, as `tensors` returns them; only for a trusted chat template.

    A model without chat template takes the plain text.

    Raises:
        InputError: as `prepare` does.
    """
    return tensors(prepare(sample, processor, limits, _render(processor)), processor)


def _render(processor: Processor) -> Render | None:
    """The chat template without limits; None where there is none."""
    has_one = getattr(processor.tokenizer, "chat_template", None) is not None
    return renderer(processor.tokenizer) if has_one else None


def prepare(sample: Sample, processor: Processor, limits: Limits, render: Render | None) -> Prepared:
    """A prepared sample: its images at the size to be stored, its words as token ids.

    Args:
        sample: the sample.
        processor: the model's.
        limits: the limits that the sample must keep.
        render: the chat template. With None, the answer follows the prompt directly, and the tokenizer adds the
            special tokens that it adds to any text.

    Raises:
        InputError: the sample has words that the model would read as a special token, or at which the tokenizer
            panics. Or it has more than `limits.max_tokens` tokens, or more than the model has positions. Or the model
            does not take its images.
    """
    family = processor.family
    sample = sample if family.takes_answers else replace(sample, answer=None)
    if not family.takes_words:
        sample, render = replace(sample, prompt="", turns=()), None
    try:
        check_words(sample, processor, render)
        images = tuple(family.fit(image, processor, limits) for image in sample.images)
        sample = replace(sample, images=images)
        text, answer = written(sample, processor, render) if render else joined(sample)
        ids, answer_span = family.tokenize(text, answer, images, processor, render is None)
        check_ids(ids, processor, limits)
    except TemplateStopped as error:
        raise TemplateStopped(f"sample {sample.id}: {error}") from None
    except InputError as error:
        raise InputError(f"sample {sample.id}: {error}") from None
    return Prepared(sample, text, ids, answer_span)


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """The model's keyword arguments for one prepared sample.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens), and what the family adds for images. If there is
        an answer, it is the assistant's turn; otherwise that turn is opened.
    """
    try:
        return processor.family.tensors(prepared, processor)
    except InputError as error:
        raise InputError(f"sample {prepared.sample.id}: {error}") from None


def answer_span(sample: Sample, processor: Processor, limits: Limits) -> range | None:
    """The positions of the answer's tokens in the encoded sample, as `Prepared` has them."""
    return prepare(sample, processor, limits, _render(processor)).answer_span


def collate(encoded: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
    """Stack encoded samples into one batch.

    Raises:
        InputError: they differ in length, only some have an image, or their images give tensors of other shapes.
            Padding is refused and not added, because a summed squared error would count it as output.
    """
    require_equal([shapes_of(sample) for sample in encoded])
    stacked = {name: torch.cat([sample[name] for sample in encoded]) for name in encoded[0]}
    positions = [found for sample in encoded if (found := getattr(sample, "image_positions", None)) is not None]
    causal = all(getattr(sample, "causal", True) for sample in encoded)
    return Batch(stacked, torch.cat(positions) if positions else None, causal)


def shapes_of(encoded: Mapping[str, torch.Tensor]) -> Shapes:
    """What the tensors of samples must have in common, so that they can be stacked."""
    return tuple(sorted((name, tuple(tensor.shape[1:])) for name, tensor in encoded.items()))


def require_equal(shapes: Sequence[Shapes]) -> None:
    """Refuse samples that cannot share a batch.

    Raises:
        InputError: their shapes differ.
    """
    if len(set(shapes)) <= 1:
        return
    names = [dict(of_sample) for of_sample in shapes]
    lengths = sorted({of_sample.get("input_ids", (1,))[0] for of_sample in names})
    problem = f"samples of {lengths} tokens, or with and without image,"
    if len(lengths) == 1 and len({frozenset(of_sample) for of_sample in names}) == 1:
        differing = [name for name in names[0] if len({of_sample[name] for of_sample in names}) > 1]
        problem = f"samples whose images give other shapes of {', '.join(differing)}"
    raise InputError(
        f"{problem} cannot share a batch without padding, which the error would count. Set calibration.batch_size to 1,"
        " and calibration.heldout_batch_size too"
    )
