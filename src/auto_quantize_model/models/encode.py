"""From one sample (a conversation, with or without an image) to the tensors that the model takes.

In: a sample, and the model's own processor. Out: token ids, the answer's position among them, the image at the
processor's size, and tensors.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from auto_quantize_model.escape import one_line
from auto_quantize_model.files import InputError
from auto_quantize_model.models.chat_template import Render, TemplateStopped, renderer
from auto_quantize_model.models.snapshot import Processor

# The role, and the parts of the turn: words, or None where the image is shown.
Turn = tuple[str, tuple[str | None, ...]]
MARK = "\ue000"  # stands for the answer while its position is searched: a private-use character that no text contains
# What an image processor raises if it cannot handle an image or a configuration.
PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Limits:
    """The maximum size of a sample: image area in pixels after resizing, and tokens in all."""

    min_pixels: int
    max_pixels: int
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """A conversation. `image` is RGB; `answer` is what the assistant should say at the end, where it is known.

    `turns` are all turns before the answer, if there are more than the one that shows the image and asks `prompt`.
    """

    id: str
    prompt: str
    image: Image.Image | None = None
    answer: str | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def before_answer(self) -> tuple[Turn, ...]:
        """All turns before the answer."""
        shown = () if self.image is None else (None,)
        return self.turns or (("user", (*shown, self.prompt)),)


@dataclass(frozen=True)
class Prepared:
    """A sample with its image at the processor's size, its token ids, and the positions of its answer's tokens.

    `answer_span` is None where the sample has no answer, and where the answer's tokens hold other text too.
    """

    sample: Sample
    input_ids: tuple[int, ...]
    answer_span: range | None


def encode(sample: Sample, processor: Processor, limits: Limits) -> dict[str, torch.Tensor]:
    """The model's keyword arguments for one sample, as `tensors` returns them; only for a trusted chat template.

    Raises:
        InputError: as `prepare` does.
    """
    return tensors(prepare(sample, processor, limits, renderer(processor.tokenizer)), processor)


def prepare(sample: Sample, processor: Processor, limits: Limits, render: Render | None) -> Prepared:
    """A prepared sample: its image at the processor's size, its words as token ids.

    Args:
        sample: the sample.
        processor: the model's.
        limits: the limits that the sample must keep.
        render: the chat template. With None, the answer follows the prompt directly, and the tokenizer adds the
            special tokens that it adds to any text.

    Raises:
        InputError: the sample has words that the model would read as a special token, or at which the tokenizer
            panics. Or it has more than `limits.max_tokens` tokens, or more than the model has positions. Or the model
            does not take its image.
    """
    try:
        _check_words(sample, processor, render)
        image_tokens = 0
        if sample.image is not None:
            image = fit(sample.image, processor, limits)
            sample = replace(sample, image=image)
            side = processor.image_processor.patch_size * processor.image_processor.merge_size
            image_tokens = (image.width // side) * (image.height // side)
        text, answer = _written(sample, processor, render) if render else _joined(sample)
        if processor.image_token is not None:
            text, answer = _expanded(text, answer, processor.image_token, image_tokens)
        ids, answer_span = _tokenized(text, answer, processor, special=render is None)
        _check_ids(ids, processor, limits)
    except TemplateStopped as error:
        raise TemplateStopped(f"sample {sample.id}: {error}") from None
    except InputError as error:
        raise InputError(f"sample {sample.id}: {error}") from None
    return Prepared(sample, ids, answer_span)


def tensors(prepared: Prepared, processor: Processor) -> dict[str, torch.Tensor]:
    """The model's keyword arguments for one prepared sample.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens); where the model takes images also
        `mm_token_type_ids` (1 at image tokens), the same; with an image also `pixel_values`, float32 (patches,
        channels * time * height * width), and `image_grid_thw`, int64 (1, 3), in patches. If there is an answer, it is
        the assistant's turn; otherwise that turn is opened.
    """
    ids = torch.tensor([prepared.input_ids])
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if processor.image_token_id is not None:
        encoded["mm_token_type_ids"] = (ids == processor.image_token_id).long()
    if prepared.sample.image is None:
        return encoded
    return encoded | image_inputs(prepared.sample.image, processor)


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


def _check_words(sample: Sample, processor: Processor, render: Render | None) -> None:
    """Refuse words that cannot be tokenized or would be read as structure, and an image that cannot be shown."""
    parts = [part for _, parts in sample.before_answer for part in parts]
    words = [part for part in parts if part is not None] + ([] if sample.answer is None else [sample.answer])
    tokenizer = processor.tokenizer
    refused = control_tokens(tokenizer, str(tokenizer.chat_template), processor.image_token)
    for text in [*words, "".join(words)]:  # two adjacent texts may make a token together
        require_text(text)
        for token in refused:
            if token in text:
                raise InputError(f"its text contains the special token {token}; take the token out")
    if sample.image is None:
        return
    if processor.image_token is None:
        raise InputError(
            "the sample has an image, and the model takes none; use samples of text (calibration.columns.image null, or"
            " a JSONL without 'image')"
        )
    if render is None:
        raise InputError("the sample has an image, which calibration.format plain cannot place; set it to chat")


def require_text(text: str) -> None:
    """Refuse text that a tokenizer cannot take.

    Raises:
        InputError: the text has a NUL, or half of a surrogate pair.
    """
    if "\0" in text:
        raise InputError("its text contains a NUL character; take the character out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"its text contains half of a character (U+{ord(half):04X}); write the character whole"
        ) from None


@functools.lru_cache(maxsize=1)  # some tokenizers have thousands of added tokens
def control_tokens(tokenizer: Any, template: str, image_token: str | None) -> list[str]:
    """The tokens that words must not contain: special tokens, and tokens that the chat template itself writes.

    DeepSeek's turns begin with tokens that its tokenizer does not call special.
    """
    added = tokenizer.added_tokens_decoder.values()
    found = {
        str(token)
        for token in added
        if token.special or (str(token) in template and not str(token).isspace() and not str(token).isalnum())
    }
    return sorted(filter(None, {*found, *map(str, tokenizer.all_special_tokens), image_token}))


def messages(sample: Sample, answer: str | None, parted: bool) -> list[dict[str, Any]]:
    """The conversation as chat templates take it: a message is one text, or a list of parts if `parted`."""
    turns = [*sample.before_answer, *([("assistant", (answer,))] if answer is not None else [])]
    if not parted:
        return [{"role": role, "content": "".join(filter(None, parts))} for role, parts in turns]
    return [
        {
            "role": role,
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
        }
        for role, parts in turns
    ]


def _written(sample: Sample, processor: Processor, render: Render) -> tuple[str, range | None]:
    """The text that the chat template makes of a sample, and the positions of the answer's characters in it.

    The template is also rendered with a mark in the answer's place. The text before and after the mark must be
    the text before and after the answer. So an answer that the template changes is not located.
    """
    parted = processor.image_token is not None  # templates of text models do not take parts
    text = render(messages(sample, sample.answer, parted), sample.answer is None)
    if sample.answer is None or MARK in text:
        return text, None
    before, mark, after = render(messages(sample, MARK, parted), False).partition(MARK)
    for answer in (sample.answer, sample.answer.strip()):
        if mark and answer and text == before + answer + after:
            return text, range(len(before), len(before) + len(answer))
    return text, None


def _joined(sample: Sample) -> tuple[str, range | None]:
    """The text of a sample without chat template: the prompt, followed directly by the answer."""
    if sample.turns:
        raise InputError("a conversation of several turns needs a chat template; set calibration.format to chat")
    text = sample.prompt + (sample.answer or "")
    return text, range(len(sample.prompt), len(text)) if sample.answer else None


def _expanded(text: str, answer: range | None, token: str, count: int) -> tuple[str, range | None]:
    """The text with `count` image tokens in place of the one image token."""
    found, wanted = text.count(token), int(count > 0)
    if found != wanted:
        raise InputError(
            f"the chat template writes {found} image tokens for {wanted} images; complete the snapshot's template"
        )
    if not count:
        return text, answer
    shift = (count - 1) * len(token)
    if answer is not None and text.index(token) < answer.start:
        answer = range(answer.start + shift, answer.stop + shift)
    return text.replace(token, token * count), answer


def _tokenized(text: str, answer: range | None, processor: Processor, special: bool) -> tuple[tuple[int, ...], Any]:
    """Token ids of a text, and the positions of the tokens that hold only the answer's characters.

    White space before the answer may be part of its first token, because many tokenizers join a word with that space.
    """
    located = answer is not None and getattr(processor.tokenizer, "is_fast", False)
    try:
        found = processor.tokenizer(text, add_special_tokens=special, return_offsets_mapping=located)
    except BaseException as error:  # a panic of tokenizers, whose class no module exports
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"the tokenizer panics: {one_line(str(error))}; check tokenizer.json") from None
    ids = tuple(found["input_ids"])
    if answer is None or not located:
        return ids, None
    offsets = found["offset_mapping"]
    inside = [at for at, (start, stop) in enumerate(offsets) if start < answer.stop and stop > answer.start]
    if not inside:
        return ids, None
    first, last = inside[0], inside[-1]
    exact = offsets[last][1] <= answer.stop and not text[offsets[first][0] : answer.start].strip()
    # The first token is predicted by the one before it.
    return ids, range(first, last + 1) if exact and first > 0 else None


def _check_ids(ids: Sequence[int], processor: Processor, limits: Limits) -> None:
    """Refuse ids without an embedding, and more ids than the model has positions or the config allows."""
    if not ids:
        raise InputError("it has no tokens; give it words")
    if processor.vocabulary is not None and max(ids) >= processor.vocabulary:
        token = processor.tokenizer.convert_ids_to_tokens(max(ids))
        raise InputError(
            f"token {token!r} has id {max(ids)}, and the model's embedding has {processor.vocabulary} rows; complete"
            " the snapshot with the tokenizer of this model"
        )
    if len(ids) > limits.max_tokens:
        raise InputError(
            f"{len(ids)} tokens, over the limit of {limits.max_tokens}; raise calibration.max_tokens or lower"
            " calibration.max_pixels"
        )
    if processor.positions is not None and len(ids) > processor.positions:
        raise InputError(
            f"{len(ids)} tokens, and the model has {processor.positions} positions (max_position_embeddings); shorten"
            " the sample or lower calibration.max_pixels"
        )


def answer_span(sample: Sample, processor: Processor, limits: Limits) -> range | None:
    """The positions of the answer's tokens in the encoded sample, as `Prepared` has them."""
    return prepare(sample, processor, limits, renderer(processor.tokenizer)).answer_span


def collate(encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack encoded samples into one batch.

    Raises:
        InputError: they differ in length, or only some have an image. Padding is refused and not added, because a
            summed squared error would count it as output.
    """
    require_equal([(sample["input_ids"].shape[1], "pixel_values" in sample) for sample in encoded])
    return {name: torch.cat([sample[name] for sample in encoded]) for name in encoded[0]}


def require_equal(shapes: Sequence[tuple[int, bool]]) -> None:
    """Refuse samples that cannot share a batch, by their numbers of tokens and whether they have an image.

    Raises:
        InputError: they differ.
    """
    if len(set(shapes)) > 1:
        lengths = sorted({length for length, _ in shapes})
        raise InputError(
            f"samples of {lengths} tokens, or with and without image, cannot share a batch without padding, which the"
            " error would count. Set calibration.batch_size to 1, and calibration.heldout_batch_size too"
        )
