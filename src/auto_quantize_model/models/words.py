"""The words of a sample: checked, written by the chat template, tokenized, with the answer's position found.

In: a sample, and the model's processor. Out: text, token ids, and the positions of the answer in both.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from auto_quantize_model.escape import one_line
from auto_quantize_model.files import InputError
from auto_quantize_model.models.chat_template import Render
from auto_quantize_model.models.family import Processor, Tokenized
from auto_quantize_model.models.sample import Limits, Sample

MARK = "\ue000"  # stands for the answer while its position is searched: a private-use character that no text contains
# What a processor raises if it cannot handle an image or a configuration.
PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


def check_words(sample: Sample, processor: Processor, render: Render | None) -> None:
    """Refuse words that cannot be tokenized or would be read as structure, and an image that cannot be shown."""
    parts = [part for _, parts in sample.before_answer for part in parts]
    words = [part for part in parts if part is not None] + ([] if sample.answer is None else [sample.answer])
    tokenizer = processor.tokenizer
    if not processor.family.takes_words:
        return
    refused = control_tokens(tokenizer, str(tokenizer.chat_template), processor.image_token)
    for text in [*words, "".join(words)]:  # two adjacent texts may make a token together
        require_text(text)
        for token in refused:
            if token in text:
                raise InputError(f"its text contains the special token {token}; take the token out")
    if sum(part is None for part in parts) != len(sample.images):
        raise InputError(f"its turns show {sum(part is None for part in parts)} of its {len(sample.images)} images")
    if not sample.images:
        return
    if not processor.family.takes_images:
        raise InputError(
            "the sample has an image, and the model takes none; use samples of text (calibration.columns.image null, or"
            " a JSONL without 'image')"
        )
    if render is None and not processor.family.places_images:
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


def written(sample: Sample, processor: Processor, render: Render) -> tuple[str, range | None]:
    """The text that the chat template makes of a sample, and the positions of the answer's characters in it.

    The template is also rendered with a mark in the answer's place. The text before and after the mark must be
    the text before and after the answer. So an answer that the template changes is not located.
    """
    parted = processor.family.takes_images  # templates of text models do not take parts
    text = render(messages(sample, sample.answer, parted), sample.answer is None)
    if sample.answer is None or MARK in text:
        return text, None
    before, mark, after = render(messages(sample, MARK, parted), False).partition(MARK)
    for answer in (sample.answer, sample.answer.strip()):
        if mark and answer and text == before + answer + after:
            return text, range(len(before), len(before) + len(answer))
    return text, None


def joined(sample: Sample) -> tuple[str, range | None]:
    """The text of a sample without chat template: the prompt, followed directly by the answer."""
    if sample.turns:
        raise InputError("a conversation of several turns needs a chat template; set calibration.format to chat")
    text = sample.prompt + (sample.answer or "")
    return text, range(len(sample.prompt), len(text)) if sample.answer else None


def tokenized(text: str, answer: range | None, processor: Processor, special: bool) -> Tokenized:
    """Token ids of a text, and the positions of the tokens that hold only the answer's characters.

    White space before the answer may be part of its first token, because many tokenizers join a word with that space.
    """
    located = answer is not None and getattr(processor.tokenizer, "is_fast", False)
    with panics():
        found = processor.tokenizer(text, add_special_tokens=special, return_offsets_mapping=located)
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


@contextmanager
def panics() -> Iterator[None]:
    """Turn a panic of the tokenizers library, whose class no module exports, into an InputError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"the tokenizer panics: {one_line(str(error))}; check tokenizer.json") from None


def check_ids(ids: Sequence[int], processor: Processor, limits: Limits) -> None:
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
