"""A sample as it comes from a source, as it is stored, and as the tensors that the model takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # a replay of batches needs no library of images
    from PIL import Image

# The role, and the parts of the turn: words, or None where the next image is shown.
Turn = tuple[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Limits:
    """The maximum size of a sample: area of an image in pixels after resizing, and tokens in all."""

    min_pixels: int
    max_pixels: int
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """A conversation. `images` are RGB; `answer` is what the assistant should say at the end, where it is known.

    `turns` are all turns before the answer, if there are more than the one that shows the images and asks `prompt`.
    """

    id: str
    prompt: str
    images: "tuple[Image.Image, ...]" = ()
    answer: str | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def before_answer(self) -> tuple[Turn, ...]:
        """All turns before the answer."""
        return self.turns or (("user", (*[None] * len(self.images), self.prompt)),)


@dataclass(frozen=True)
class Prepared:
    """A sample with its images at the size to be stored, its text, its token ids, and where its answer's tokens are.

    `text` is what the chat template wrote, before image tokens were multiplied. `answer_span` is None where the sample
    has no answer, and where the answer's tokens hold other text too.
    """

    sample: Sample
    text: str
    input_ids: tuple[int, ...]
    answer_span: range | None


class Batch(dict[str, torch.Tensor]):
    """The model's keyword arguments for some samples.

    `image_positions` is bool (samples, tokens), true where a token stands for a part of an image. It is None where the
    model takes no images. `causal` is whether a token sees only those before it, so that its output is the distribution
    of the next token. Both are not passed to the model.
    """

    image_positions: torch.Tensor | None = None
    causal: bool = True

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], image_positions: torch.Tensor | None = None, causal: bool = True
    ) -> None:
        super().__init__(tensors)
        self.image_positions, self.causal = image_positions, causal


def samples_in(batch: Mapping[str, torch.Tensor]) -> int:
    """The number of samples of a batch, by its tokens, or by its images where the model takes no text."""
    return len(batch["input_ids"] if "input_ids" in batch else batch["pixel_values"])


def tokens_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The tokens to which the rows of the output belong, int64 (samples, tokens): the decoder's, where it has its own.

    None for a model of images alone.
    """
    return batch.get("decoder_input_ids", batch.get("input_ids"))


def image_positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Where the tokens of a batch stand for parts of images: bool (samples, tokens), or None without images.

    A plain dictionary, such as a batch of a notebook, tells them by its `mm_token_type_ids`, not 0 at image tokens.
    """
    found = getattr(batch, "image_positions", None)
    if found is None and "mm_token_type_ids" in batch:
        found = batch["mm_token_type_ids"] != 0
    return found
