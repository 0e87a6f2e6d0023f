"""Snapshots of real shapes with weights from a seed, for benchmarks: sharded bfloat16 safetensors, written bit by bit.

The shape is real, the weights are noise: times, memory and equality with INC can be shown on them, quality cannot.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from auto_quantize_model.digits import build_config, build_tokenizer
from auto_quantize_model.samples import Limits, Sample, collate, encode
from auto_quantize_model.snapshot import load_processor

SHARD_BYTES = 2 << 30
PROMPT = "What is this?"  # about as many byte tokens as a longer question has tokens of the published vocabulary
# hidden, intermediate, layers, heads and key-value heads of text and vision, and the vocabulary; qwen2_5_vl_3b is the
# published configuration of Qwen/Qwen2.5-VL-3B-Instruct, medium a model of its proportions with 150 M parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "medium": {
        "vocab_size": 32000,
        "tied": False,
        "text": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12, "heads": (10, 2)},
        "vision": {"hidden_size": 448, "intermediate_size": 1344, "depth": 12, "num_heads": 8, "full": [2, 5, 8, 11]},
    },
    "qwen2_5_vl_3b": {
        "vocab_size": 151936,
        "tied": True,
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "heads": (16, 2)},
        "vision": {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "depth": 32,
            "num_heads": 16,
            "full": [7, 15, 23, 31],
        },
    },
}


def shaped_config(name: str) -> Qwen2_5_VLConfig:
    """The configuration of a shape, with the ids of the small tokenizer that every snapshot here carries."""
    shape, tokenizer = SHAPES[name], build_tokenizer()
    config: Any = build_config(tokenizer, depth=1, hidden=64)
    heads, key_values = shape["text"]["heads"]
    head = shape["text"]["hidden_size"] // heads
    text = {key: value for key, value in shape["text"].items() if key != "heads"}
    vision = {key: value for key, value in shape["vision"].items() if key != "full"}
    settings = config.to_dict()
    settings["text_config"] |= text | {
        "vocab_size": shape["vocab_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "layer_types": ["full_attention"] * text["num_hidden_layers"],
        "tie_word_embeddings": shape["tied"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [head // 2 - 2 * (head * 3 // 16), head * 3 // 16, head * 3 // 16],
        },
    }
    settings["vision_config"] |= vision | {
        "out_hidden_size": text["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": shape["vision"]["full"],
    }
    settings["tie_word_embeddings"] = shape["tied"]
    return Qwen2_5_VLConfig(**settings)


def build(name: str, directory: Path, seed: int = 0) -> Path:
    """Write the snapshot of a shape, unless it is there already; one shard in memory at a time."""
    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = shaped_config(name)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    number, total, held = 1, 0, 0
    for weight, meta in model.state_dict().items():
        if shape_is_tied(config, weight):
            continue
        tensor = drawn(weight, meta.shape, generator)
        if shard and held + tensor.nbytes > SHARD_BYTES:
            write_shard(directory, number, shard)
            shard, number, held = {}, number + 1, 0
        shard[weight] = tensor
        weight_map[weight] = shard_name(number)
        held, total = held + tensor.nbytes, total + tensor.nbytes
    write_shard(directory, number, shard)
    config.save_pretrained(directory)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil().save_pretrained(directory)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def shape_is_tied(config: Any, weight: str) -> bool:
    """Whether a weight is stored under another name."""
    return weight == "lm_head.weight" and config.tie_word_embeddings


def drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight that keeps activations in a sane range: ones for norms, else normal with variance 1 / fan-in."""
    if len(shape) == 1:
        return (
            torch.ones(shape, dtype=torch.bfloat16)
            if "norm" in name or "ln_q" in name
            else torch.zeros(shape).bfloat16()
        )
    spread = 0.02 if "embed_tokens" in name or "lm_head" in name else float(np.prod(shape[1:])) ** -0.5
    return (torch.randn(shape, generator=generator) * spread).bfloat16()


def shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def write_shard(directory: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / shard_name(number), metadata={"format": "pt"})


def photo_batch(directory: Path, visual_tokens: int, prompt: str = PROMPT, name: str = "china.jpg") -> Any:
    """One batch: a real photograph of about that many visual tokens, and a prompt."""
    image = Image.fromarray(load_sample_image(name))
    pixels = visual_tokens * 28 * 28
    limits = Limits(min_pixels=pixels * 9 // 10, max_pixels=pixels, max_tokens=100_000)
    return collate([encode(Sample(name, prompt, image), load_processor(directory), limits)])
