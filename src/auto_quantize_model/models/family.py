"""What differs between kinds of models, as a value: everything else asks the family of a model.

In: nothing. Out: the type of a family, and the processor of a snapshot, which names its family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from auto_quantize_model.models.sample import Batch, Limits, Prepared


@dataclass(frozen=True)
class Processor:
    """The parts that turn a sample into tensors.

    Fields for images are empty where the model takes none.

    Attributes:
        family: of the model.
        tokenizer: the snapshot's; None for a model without words.
        image_processor: the snapshot's.
        whole: the snapshot's own processor of text and images, where the family uses it.
        image_token: the text that the chat template writes where an image is shown.
        image_token_ids: the ids of tokens that stand for parts of images.
        image_backend: the library that resizes images, `torchvision` or `pil`.
        vocabulary: the number of rows of the embedding.
        positions: the number of tokens that the model has positions for; None where the config does not give it.
        decoder_start_token_id: the decoder's first token, where encoder and decoder are apart.
    """

    family: "Family"
    tokenizer: Any
    image_processor: Any = None
    whole: Any = field(default=None, repr=False)
    image_token: str | None = None
    image_token_ids: tuple[int, ...] = ()
    image_backend: str | None = None
    vocabulary: int | None = None
    positions: int | None = None
    decoder_start_token_id: int | None = None


@dataclass(frozen=True)
class Parts:
    """The files of a snapshot from which a family makes the processor's fields for images."""

    directory: Path
    config: Mapping[str, Any]
    tokenizer: Any
    backend: str


# The token ids of a text, and the positions of the answer's tokens among them.
Tokenized = tuple[tuple[int, ...], range | None]


@dataclass(frozen=True)
class Family:
    """A kind of models.

    Attributes:
        name: in words.
        matches: whether a config.json, as a dictionary, is that of such a model.
        refuse: why a config.json that matches cannot be measured, in words; empty if it can.
        takes_images: whether samples may have images.
        load: the fields of the processor that are for images.
        fit: an RGB image at the size at which it is stored.
        tokenize: the token ids of a text with some images, and the positions of the answer's tokens. It takes the text,
            the positions of the answer's characters or None, and the fitted images. Then come the processor, and
            whether the tokenizer adds its special tokens.
        tensors: the model's keyword arguments for one prepared sample.
        takes_words: whether samples have words; where not, no tokenizer, and the words of samples are left out.
        takes_answers: whether an answer may follow the prompt; where not, the answers of samples are left out.
        places_images: whether the processor places the images itself, so that a sample without chat template has them.
        hidden_state: whether the models return a last hidden state and no logits.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    refuse: Callable[[Mapping[str, Any]], str]
    takes_images: bool
    load: Callable[[Parts], dict[str, Any]]
    fit: Callable[[Image.Image, Processor, Limits], Image.Image]
    tokenize: Callable[[str, range | None, tuple[Image.Image, ...], Processor, bool], Tokenized]
    tensors: Callable[[Prepared, Processor], Batch]
    takes_words: bool = True
    takes_answers: bool = True
    places_images: bool = False
    hidden_state: bool = False
