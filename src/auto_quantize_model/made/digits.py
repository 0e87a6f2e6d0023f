"""The embedded default: a small Qwen2.5-VL, trained to read scikit-learn's 1,797 handwritten digits.

In: seeds, and the number of epochs. Out: an ordinary snapshot directory (config, safetensors, tokenizer, image
processor config, chat template). All later steps treat it as any other model.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from auto_quantize_model.data.digits import IMAGE_SIDE, LIMITS, PROMPT, TRAINING, digit_samples, digits_split, varied
from auto_quantize_model.files import visible, write_json
from auto_quantize_model.machine import instruction_set
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.snapshot import load_model, load_processor

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
VARIANTS = 3  # rotated and shifted copies of each training digit; they raise held-out accuracy from 96 to 98 %
VARIED = {"max_turn": 12.0, "max_shift": 4.0}  # degrees and pixels
TRAINED_WITH = ("torch", "transformers", "numpy", "scikit-learn", "pillow")  # the weights depend on these packages
WEIGHTS = "model.safetensors"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen2 tokenizer with the family's special tokens and the few merges that the prompt gives."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainee.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator([PROMPT, "user assistant system"], trainer)
    learned = json.loads(trainee.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer, depth: int, hidden: int) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of `depth` vision and `depth` text layers of width `hidden`, four heads each."""
    token: Any = tokenizer.convert_tokens_to_ids
    head = hidden // 4
    sections = [head // 2 - 2 * (head * 3 // 16), head * 3 // 16, head * 3 // 16]
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": depth,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "window_size": 56,
            "fullatt_block_indexes": [depth - 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def build_snapshot(directory: Path, *, depth: int = 4, hidden: int = 64, seed: int = 0) -> None:
    """Write an untrained snapshot of the given size, its weights drawn from `seed`."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, depth, hidden))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(size={"shortest_edge": IMAGE_SIDE**2, "longest_edge": IMAGE_SIDE**2}).save_pretrained(
        directory
    )


def train_snapshot(
    directory: Path,
    *,
    split_seed: int,
    seed: int,
    epochs: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Train the digit reader, and write its snapshot and the record of its training.

    Args:
        directory: an empty folder, or a path at which the folder is made.
        split_seed: seed of the split into training, calibration and held-out digits.
        seed: seed of the weights, of the order of the training samples and of their variants.
        epochs: passes over the training digits and their variants.
        progress: wraps the range of epochs to show the progress.

    Returns:
        The record: the arguments, the held-out accuracy from 0 to 1, and properties of the machine that the weights
            depend on.
    """
    split = digits_split(split_seed)
    build_snapshot(directory, seed=seed)
    processor = load_processor(directory)
    samples = {name: digit_samples(split[name]) for name in ("train", "heldout")}
    generator = np.random.default_rng(seed)
    samples["train"] += [varied(sample, generator, **VARIED) for _ in range(VARIANTS) for sample in samples["train"]]
    encoded = {name: [encode(sample, processor, LIMITS) for sample in samples[name]] for name in samples}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    _train(model, encoded["train"], seed, epochs, progress)
    accuracy = answer_accuracy(model.eval(), encoded["heldout"])
    model.save_pretrained(directory)
    record = {
        "split_seed": split_seed,
        "seed": seed,
        "epochs": epochs,
        "heldout_accuracy": accuracy,
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in TRAINED_WITH},
    }
    write_json(directory / TRAINING, record)
    return record


def _train(
    model: Qwen2_5_VLForConditionalGeneration,
    encoded: Sequence[Mapping[str, torch.Tensor]],
    seed: int,
    epochs: int,
    progress: Callable[[range], Iterable[int]],
) -> None:
    """AdamW with a one-cycle learning rate; the loss is on the answer's digit alone."""
    steps = epochs * (len(encoded) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in progress(range(epochs)):
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = collate([encoded[index] for index in order[start : start + BATCH_SIZE]])
            logits, answers = answer_logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits, answers)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def answer_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (samples, vocabulary) that predict the digit, and the digits' token ids (samples,).

    A conversation ends in the digit, `<|im_end|>` and a newline, so the digit is the third token from the end.
    """
    logits = model(**batch, use_cache=False).logits
    return logits[:, -4], batch["input_ids"][:, -3]


@torch.no_grad()
def answer_accuracy(model: PreTrainedModel, encoded: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """The share of samples whose digit is the most likely token of the whole vocabulary."""
    right = 0
    for start in range(0, len(encoded), BATCH_SIZE):
        logits, answers = answer_logits(model, collate(encoded[start : start + BATCH_SIZE]))
        right += int((logits.argmax(-1) == answers).sum())
    return right / len(encoded)


def heldout_accuracy(directory: Path, split_seed: int) -> float:
    """The share of the held-out digits of a split that a snapshot reads right, from 0 to 1.

    Raises:
        InputError: the snapshot cannot be loaded.
    """
    processor, model = load_processor(directory), load_model(directory)
    samples = digit_samples(digits_split(split_seed)["heldout"])
    return answer_accuracy(model, [encode(sample, processor, LIMITS) for sample in samples])


def differing_files(one: Path, other: Path) -> list[str]:
    """The names of visible files that differ between two snapshots, or that one of them lacks.

    Weights are left out, because `differing_tensors` compares them.
    """
    names = {path.name for folder in (one, other) for path in visible(folder)} - {WEIGHTS}

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    return sorted(name for name in names if content(one / name) != content(other / name))


def differing_tensors(one: Path, other: Path) -> dict[str, float]:
    """The largest absolute difference of each tensor that differs between two snapshots, the largest first.

    It is infinite where one snapshot lacks the tensor, or has it in another shape.
    """
    left, right = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    found = {}
    for name in left.keys() | right.keys():
        if name not in left or name not in right or left[name].shape != right[name].shape:
            found[name] = math.inf
        elif not torch.equal(left[name], right[name]):
            found[name] = float((left[name].double() - right[name].double()).abs().max())
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
