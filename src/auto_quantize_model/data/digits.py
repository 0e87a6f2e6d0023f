"""scikit-learn's 1,797 handwritten digits as samples, their split, and the record of the shipped snapshot's training.

In: indices, a seed, or the directory of the shipped snapshot. Out: samples, disjoint indices, or the record.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from auto_quantize_model.files import InputError, read_json
from auto_quantize_model.folders import require_unchanged
from auto_quantize_model.models.sample import Limits, Sample

PROMPT = "Which digit is this?"
IMAGE_SIDE = 56  # pixels: two by two visual tokens of 28
LIMITS = Limits(min_pixels=IMAGE_SIDE**2, max_pixels=IMAGE_SIDE**2, max_tokens=64)
DIGITS = 1797
# Of the calibration and held-out digits, farther than in the training. The reader is less sure of these, so a format
# with few bits loses answers. As scikit-learn has the digits, no 4-bit format loses any answer of 500.
MAX_TURN = 30.0  # degrees
MAX_SHIFT = 8.0  # pixels
SPLIT_SIZES = {"calibration": 200, "heldout": 300}  # all other digits are for training
# In the shipped snapshot: the training record. The file is hidden, because the model's digest covers visible files.
TRAINING = ".training.json"


def digits_split(seed: int) -> dict[str, list[int]]:
    """Disjoint, sorted indices into `load_digits` for `train`, `calibration` and `heldout`; equal for equal seeds."""
    order = np.random.default_rng(seed).permutation(DIGITS).tolist()
    split, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        split[name] = sorted(order[start : start + size])
        start += size
    return {"train": sorted(order[start:]), **split}


def digit_samples(indices: Iterable[int]) -> list[Sample]:
    """The digits at `indices` as samples: a 56x56 RGB image, the question, and the digit as the answer."""
    digits = load_digits()
    samples = []
    for index in indices:
        pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).convert("RGB")
        samples.append(Sample(f"digit-{index:04d}", PROMPT, (image,), str(digits.target[index])))
    return samples


def varied(sample: Sample, generator: np.random.Generator, max_turn: float, max_shift: float) -> Sample:
    """A copy of a sample whose image is rotated by up to `max_turn` degrees and shifted by up to `max_shift` pixels."""
    (image,) = sample.images
    shift = tuple(generator.uniform(-max_shift, max_shift, 2))
    angle = generator.uniform(-max_turn, max_turn)
    turned = image.rotate(angle, resample=Image.Resampling.BICUBIC, translate=shift)
    return replace(sample, images=(turned,))


def varied_samples(indices: Iterable[int]) -> list[Sample]:
    """The digits at `indices` as samples, each rotated by up to MAX_TURN and shifted by up to MAX_SHIFT.

    A digit is always varied in the same way, whatever the other indices are.
    """
    known = list(indices)
    pairs = zip(known, digit_samples(known), strict=True)
    return [varied(sample, np.random.default_rng(index), MAX_TURN, MAX_SHIFT) for index, sample in pairs]


def shipped_training(directory: Path) -> dict[str, Any]:
    """How the shipped snapshot was trained, and which digits its training left aside.

    Args:
        directory: the snapshot; its files must be those that the repository lists.

    Returns:
        The record of `train_snapshot`, with the digits of each split under `split`.

    Raises:
        InputError: a file is missing, added or changed, or the record has no seed of the split.
    """
    advice = (
        f"restore the shipped files (git checkout -- {directory}), or set model.source: local to take them as they are"
    )
    require_unchanged(directory, advice)
    record = read_json(directory / TRAINING)
    if not isinstance(record, dict) or type(record.get("split_seed")) is not int:
        raise InputError(f"{directory / TRAINING}: no whole number under 'split_seed'; {advice}")
    seed = record["split_seed"]
    return {**record, "split": {"seed": seed, **digits_split(seed)}}
