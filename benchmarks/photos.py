"""Real photographs, those that scikit-learn carries, as batches for a benchmark."""

from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_image

from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.sample import Limits, Sample
from auto_quantize_model.models.snapshot import load_processor

PROMPT = "What is this?"  # about as many byte tokens as a longer question has tokens of the published vocabulary


def photo_batch(directory: Path, visual_tokens: int, prompt: str = PROMPT, name: str = "china.jpg") -> Any:
    """One batch: a real photograph of about that many visual tokens, and a prompt."""
    image = Image.fromarray(load_sample_image(name))
    pixels = visual_tokens * 28 * 28
    limits = Limits(min_pixels=pixels * 9 // 10, max_pixels=pixels, max_tokens=100_000)
    return collate([encode(Sample(name, prompt, (image,)), load_processor(directory), limits)])
