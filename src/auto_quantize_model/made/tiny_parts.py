"""What a tiny model is, and the sizes that the tiny models share."""

from dataclasses import dataclass, field
from typing import Any

SIDE, PATCH = 28, 7  # pixels of an image and of a patch
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@dataclass(frozen=True)
class Shape:
    """One tiny model.

    Attributes:
        architecture: the class of the model.
        config: of the class's configuration, without vocabulary and token ids.
        image_processor: the class with the PIL backend, and its settings; None for a model of text.
        processor: the class, and its settings; None for a model of text or of images alone.
        image: what the chat template writes where an image is shown; None for no chat template.
        tokens: special tokens, in addition to those of the turns.
        named: tokens by the names that the processor reads from the tokenizer.
        ids: tokens by the keys that the configuration has for their ids.
        words: whether the model takes text.
    """

    architecture: str
    config: dict[str, Any]
    image_processor: tuple[str, dict[str, Any]] | None = None
    processor: tuple[str, dict[str, Any]] | None = None
    image: str | None = None
    tokens: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    words: bool = True
