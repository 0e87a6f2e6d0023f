"""Tiny models of real classes, for tests and for the benchmark of families.

In: the name of a shape, and a seed. Out: a complete snapshot. It has random weights. Where the model takes text, it has
a byte-level tokenizer with the family's special tokens. Where it takes images, it has the family's own processor at
small sizes. Where it answers, it has a chat template.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auto_quantize_model.made.tiny_parts import Shape
from auto_quantize_model.made.tiny_shapes import SHAPES

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
TEMPLATE = """\
{{- bos_token }}{% for message in messages %}<|{{ message.role }}|>
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def write_tiny(name: str, directory: Path, seed: int = 0) -> Path:
    """Write the snapshot of a shape.

    Args:
        name: a key of `SHAPES`.
        directory: an empty folder, or a path at which the folder is made.
        seed: of the weights.

    Returns:
        The directory.
    """
    shape = SHAPES[name]
    tokenizer = build_tokenizer(shape) if shape.words else None
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    model = build_model(shape, tokenizer, seed)
    model.save_pretrained(directory)
    if shape.image_processor:
        kind, settings = shape.image_processor
        image_processor: Any = getattr(transformers, kind)(**settings)
        image_processor.save_pretrained(directory)
    if shape.processor:
        kind, settings = shape.processor
        (directory / "processor_config.json").write_text(json.dumps({"processor_class": kind, **settings}, indent=2))
    return directory


def build_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with special tokens for turns and for the shape's images, and its chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=END,
        extra_special_tokens=shape.named,
    )
    tokens = dict.fromkeys([*shape.tokens, *shape.ids.values(), *(f"<|{role}|>" for role in ROLES)])
    made.add_tokens(list(tokens), special_tokens=True)
    if shape.image is not None:
        made.chat_template = TEMPLATE.replace("IMAGE", shape.image)
    return made  # type: ignore[no-any-return]


ROLES = ("system", "user", "assistant")


def build_model(shape: Shape, tokenizer: Any, seed: int) -> PreTrainedModel:
    """The model of a shape, its matrices drawn with variance 1 / fan-in, so that its logits differ."""
    kind: Any = getattr(transformers, shape.architecture)
    values = dict(shape.config)
    if tokenizer is not None:
        token: Any = tokenizer.convert_tokens_to_ids
        ends = {"bos_token_id": token(BEGIN), "eos_token_id": token(END), "pad_token_id": token(END)}
        words = {"vocab_size": len(tokenizer)} | ends
        values |= {"text_config": values["text_config"] | words} if "text_config" in values else words
        values |= {key: token(text) for key, text in shape.ids.items()} | {"tie_word_embeddings": False}
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(kind.config_class(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # those of Mllama's attention to images are 0 at first
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model
