"""Tiny models of images and text, each written and loaded once for all tests of a process."""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from auto_quantize_model.made.tiny import write_tiny
from auto_quantize_model.models.encode import encode
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.sample import Batch, Limits, Sample
from auto_quantize_model.models.snapshot import load_model, load_processor
from auto_quantize_model.models.units import tower_of

LIMITS = Limits(min_pixels=28 * 28, max_pixels=112 * 112, max_tokens=2000)
MATRICES = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)


@functools.cache
def snapshot(name: str) -> Path:
    """The snapshot of a tiny model, which tests copy before they change it."""
    folder = tempfile.TemporaryDirectory()
    KEPT.append(folder)
    return write_tiny(name, Path(folder.name) / name)


KEPT: list[Any] = []  # folders are removed when the process ends


@functools.cache
def loaded(name: str) -> tuple[Any, Processor]:
    return load_model(snapshot(name)), load_processor(snapshot(name))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(*images: Image.Image, answer: str | None = "A cat.") -> Sample:
    return Sample("a", "What is it?", images, answer)


def batch_of(name: str, *images: Image.Image) -> Batch:
    return encode(sample(*images), loaded(name)[1], LIMITS)


def outputs(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The outputs of modules with a matrix that run on a batch, and the logits under an empty name."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
        for name, module in model.named_modules()
        if isinstance(module, MATRICES)
    ]
    with torch.no_grad():
        found[""] = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return found


def check_model(name: str) -> None:
    """What holds for each model of images and text."""
    model, processor = loaded(name)
    one, two, none = batch_of(name, noise(60, 40)), batch_of(name, noise(60, 40), noise(40, 60, 1)), batch_of(name)
    found = {count: outputs(model, batch) for count, batch in enumerate((none, one, two))}
    for count, batch in enumerate((none, one, two)):
        logits = found[count][""]
        assert logits.shape[:2] == batch["input_ids"].shape
        allowed = logits[logits > -1e30]  # Chameleon excludes the tokens of its images
        assert bool(logits.isfinite().all()) and 0.3 < float(allowed.std()) < 3
    counts = [int(batch.image_positions.sum()) for batch in (none, one, two) if batch.image_positions is not None]
    # LLaVA-OneVision cuts a lone image into tiles, so two images can have fewer tokens.
    assert counts[0] == 0 < counts[1] != counts[2] > 0
    # The tower runs with images alone, and nothing else does.
    with_images = found[1].keys() - found[0].keys()
    vision = {op for op in found[1] if tower_of(op) == "vision"}
    # A layer of Mllama's text reads images alone, and an expert may have no tokens but those of an image.
    assert vision <= with_images and all(re.search(r"\.experts\.|cross_attn|mlp", op) for op in with_images - vision)
    assert with_images == vision or name in ("mllama", "aria")
    other = outputs(model, batch_of(name, noise(60, 40, 2)))
    changed = {op for op in found[1] if op not in other or not torch.equal(found[1][op], other[op])}
    # Positions have no pixels, and neither have the queries of a resampler, tables, and text that queries an image.
    unmoved = "pos|tile_embedding|perceiver|qformer|table|cross_attn.q_proj"
    assert with_images | {""} <= changed | {op for op in with_images if re.search(unmoved, op)}


def stored_in(dtype: torch.dtype, directory: Path) -> Path:
    """A snapshot with its weights in another type."""
    for path in directory.glob("*.safetensors"):
        save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    return directory
