"""The calibration set: real samples from a source, drawn by a seed, checked whole, stored as Parquet with a manifest.

In: the digits, a JSONL, a Parquet file or a folder of images. Out: `calibration` and `heldout` samples, disjoint, and a
manifest of their ids and hashes; later the batches that INC and the capture read.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from auto_quantize_model.files import InputError, atomic_path, digest_of, sha256_bytes
from auto_quantize_model.samples import Limits, Sample, collate, encode
from auto_quantize_model.snapshot import Processor

FEATURES = Features(
    {"id": Value("string"), "prompt": Value("string"), "image": ImageFeature(decode=False), "answer": Value("string")}
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CalibrationSpec:
    """The `calibration` block of the config; `prompt` is asked of each image of a folder."""

    name: str
    source: str
    num_samples: int
    num_heldout: int
    seed: int
    batch_size: int
    min_pixels: int
    max_pixels: int
    max_tokens: int
    path: str | None = None
    prompt: str = "Describe this image."

    @property
    def limits(self) -> Limits:
        """The limits that every sample has to keep."""
        return Limits(self.min_pixels, self.max_pixels, self.max_tokens)


class CalibrationLoader:
    """Batches as INC takes them: `(inputs, None)`, iterable again and again, with the `batch_size` INC asks for."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.batch_size = batches[0]["input_ids"].shape[0]

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        return ((batch, None) for batch in self.batches)


def extract(
    spec: CalibrationSpec, processor: Processor, model_manifest: dict[str, Any]
) -> tuple[list[Sample], list[Sample], dict[str, Any]]:
    """Draw the samples, run each through the model's processor, and describe them.

    Returns:
        The calibration samples, the held-out samples, and the manifest: ids, sha256, token counts, limits, seed.

    Raises:
        InputError: the source is empty, malformed, names an image that is missing or unreadable, has fewer samples than
            asked, or a sample breaks a limit.
    """
    pools = _digit_pools(model_manifest) if spec.source == "digits" else _local_pools(spec)
    generator = np.random.default_rng(spec.seed)
    drawn: dict[str, list[Any]] = {}
    for split, count in (("calibration", spec.num_samples), ("heldout", spec.num_heldout)):
        pool = [item for item in pools[split] if item not in drawn.get("calibration", ())]
        if len(pool) < count:
            where = spec.path or f"the {split} digits"
            raise InputError(
                f"{where}: {len(pool)} samples left for the {split} split, {count} asked; lower calibration.num_samples"
                " or calibration.num_heldout, or give more samples"
            )
        drawn[split] = [pool[index] for index in sorted(generator.choice(len(pool), count, replace=False))]
    samples = {split: _load(spec, items) for split, items in drawn.items()}
    entries = {split: [_describe(sample, processor, spec.limits) for sample in samples[split]] for split in samples}
    encoded = [encode(sample, processor, spec.limits) for sample in samples["calibration"]]
    for start in range(0, len(encoded), spec.batch_size):
        collate(encoded[start : start + spec.batch_size])
    content = {"samples": entries, "limits": vars(spec.limits), "batch_size": spec.batch_size}
    manifest = {
        "calibration": spec.name,
        "source": spec.source,
        "path": spec.path,
        "seed": spec.seed,
        **content,
        "text_only": not any(entry["image_tokens"] for entry in entries["calibration"]),
        "digest": digest_of(content),
    }
    return samples["calibration"], samples["heldout"], manifest


def _digit_pools(model_manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Indices of digits: those that the model's training left aside for each split."""
    from auto_quantize_model.digits import digits_split

    training = model_manifest["details"].get("training")
    return training["split"] if training else digits_split(0)


def _local_pools(spec: CalibrationSpec) -> dict[str, list[int]]:
    """Row numbers of a local source; both splits draw from all of them, one after the other."""
    rows = list(range(len(_read_rows(spec))))
    return {"calibration": rows, "heldout": rows}


def _load(spec: CalibrationSpec, items: Sequence[int]) -> list[Sample]:
    if spec.source == "digits":
        from auto_quantize_model.digits import digit_samples

        return digit_samples(items)
    rows = _read_rows(spec)
    return [_sample_of(rows[item], f"{Path(spec.path or '').name}:{item + 1:06d}") for item in items]


def _read_rows(spec: CalibrationSpec) -> list[dict[str, Any]]:
    """A local source as rows {image?, prompt, answer?, where}, `where` naming the place for errors.

    Raises:
        InputError: there is no such source, or it is of no known kind, empty or malformed.
    """
    if spec.path is None:
        raise InputError("calibration.path is not set; calibration.source local needs a JSONL, Parquet file or folder")
    path = Path(spec.path)
    if path.is_dir():
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        rows = [{"image": str(file), "prompt": spec.prompt, "where": str(file)} for file in images]
    elif not path.exists():
        raise InputError(f"calibration.path: {path} does not exist; give a JSONL, a Parquet file or an image folder")
    elif path.suffix == ".jsonl":
        rows = list(_read_jsonl(path))
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise InputError(f"calibration.path: {path} is neither .jsonl, .parquet nor an image folder; convert it")
    if not rows:
        raise InputError(f"{path}: holds no samples; add some, or set calibration.path to another source")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error.msg}); mend or remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{where}: no text under 'prompt'; each line is {{image?, prompt, answer?}}")
        unknown = sorted(set(row) - {"image", "prompt", "answer"})
        if unknown:
            raise InputError(f"{where}: unknown key {unknown[0]!r}; each line is {{image?, prompt, answer?}}")
        if row.get("image") is not None:
            row["image"] = str(path.parent / row["image"])
        yield row | {"where": where}


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        table = Dataset.from_parquet(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    if "prompt" not in table.column_names:
        raise InputError(f"{path}: no column 'prompt'; there are {', '.join(table.column_names)}")
    if "image" in table.column_names:
        table = table.cast_column("image", ImageFeature(decode=False))
    return [dict(row) | {"where": f"{path}, row {number}"} for number, row in enumerate(table, start=1)]


def _sample_of(row: dict[str, Any], sample_id: str) -> Sample:
    return Sample(sample_id, row["prompt"], _open_image(row.get("image"), row["where"]), row.get("answer"))


def _open_image(image: Any, where: str) -> Image.Image | None:
    """The image at a path, or in {bytes, path}, in RGB.

    Raises:
        InputError: it is missing or unreadable.
    """
    if image is None:
        return None
    stored = image.get("bytes") if isinstance(image, dict) else None
    path: Any = image.get("path") if isinstance(image, dict) else image
    try:
        with Image.open(io.BytesIO(stored) if stored else path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{where}: image {path} does not exist; correct the path or remove the sample") from None
    except (UnidentifiedImageError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: image {path} cannot be read ({error}); replace it or remove the sample") from None


def _describe(sample: Sample, processor: Processor, limits: Limits) -> dict[str, Any]:
    """The manifest's entry; the sha256 is over the words and the decoded RGB pixels."""
    encoded = encode(sample, processor, limits)
    pixels = b"" if sample.image is None else repr(sample.image.size).encode() + sample.image.tobytes()
    words = json.dumps([sample.prompt, sample.answer]).encode()
    return {
        "id": sample.id,
        "sha256": sha256_bytes(words + pixels),
        "tokens": encoded["input_ids"].shape[1],
        "image_tokens": int(encoded["mm_token_type_ids"].sum()),
    }


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Store samples as Parquet, images as PNG inside it, whole or not at all."""
    rows = []
    for sample in samples:
        image = sample.image and {"bytes": _png(sample.image), "path": None}
        rows.append({"id": sample.id, "prompt": sample.prompt, "image": image, "answer": sample.answer})
    with atomic_path(path) as temporary:
        Dataset.from_list(rows, features=FEATURES).to_parquet(str(temporary))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_samples(path: Path) -> list[Sample]:
    """The samples of a Parquet file that `write_samples` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such calibration set; run the calibration rule again")
    return [_sample_of(row, row["id"]) for row in _read_parquet(path)]


def load_batches(path: Path, manifest: dict[str, Any], processor: Processor) -> list[Batch]:
    """The batches of a stored calibration set, in the manifest's order; an incomplete last batch is left out.

    Raises:
        InputError: the set is not the one that the manifest describes.
    """
    limits = Limits(**manifest["limits"])
    samples = read_samples(path)
    if [_describe(sample, processor, limits) for sample in samples] != manifest["samples"]["calibration"]:
        raise InputError(f"{path}: not the samples of its manifest; run the calibration rule again")
    return batches_of(samples, manifest, processor)


def batches_of(samples: Sequence[Sample], manifest: dict[str, Any], processor: Processor) -> list[Batch]:
    """Samples in batches of the manifest's size; an incomplete last batch is left out."""
    limits, size = Limits(**manifest["limits"]), manifest["batch_size"]
    encoded = [encode(sample, processor, limits) for sample in samples]
    return [collate(encoded[start : start + size]) for start in range(0, len(encoded) - size + 1, size)]
