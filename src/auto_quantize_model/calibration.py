"""The calibration set: real samples from a source, drawn by a seed, checked whole, stored as Parquet with a manifest.

In: the digits, a JSONL, a Parquet file, a folder of images, or a data set of the hub. Out: `calibration` and
`heldout` samples, disjoint, and a manifest of their ids and hashes; later the batches that INC and the capture read.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from PIL import Image, ImageOps

from auto_quantize_model.files import InputError, atomic_path, digest_of, sha256_bytes
from auto_quantize_model.samples import Limits, Sample, answer_span, collate, encode
from auto_quantize_model.snapshot import Processor

FEATURES = Features(
    {"id": Value("string"), "prompt": Value("string"), "image": ImageFeature(decode=False), "answer": Value("string")}
)
MINIMA = {
    "num_samples": 1,
    "num_heldout": 0,
    "seed": 0,
    "batch_size": 1,
    "min_pixels": 1,
    "max_pixels": 1,
    "max_tokens": 1,
}
COLUMNS = ("id", "image", "prompt", "answer")
# A stream is shuffled within a buffer: this many rows are fetched for each that is drawn.
ROWS_PER_DRAWN = 10
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Batch = dict[str, torch.Tensor]
Progress = Callable[[range], Iterable[int]]


@dataclass(frozen=True)
class CalibrationSpec:
    """The `calibration` block of the config; `prompt` is asked of each image that brings none of its own.

    Raises:
        InputError: a number is out of its range, the source is unknown, or the samples do not fill one batch.
    """

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
    repo_id: str | None = None
    revision: str | None = None
    split: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The schema checks a config; scripts run by hand come here without it.
        if self.source not in ("digits", "local", "hub"):
            raise InputError(f"calibration.source: {self.source!r} is neither digits, local nor hub")
        if self.source == "hub" and not (self.repo_id and self.revision and self.split):
            raise InputError("calibration.repo_id, revision and split: not all set; calibration.source hub needs them")
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise InputError(f"calibration.columns.{unknown[0]}: no such key; the keys are {', '.join(COLUMNS)}")
        for name, least in MINIMA.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"calibration.{name}: {value!r} is not a whole number of at least {least}")
        if self.num_samples < self.batch_size:
            raise InputError(
                f"calibration.num_samples ({self.num_samples}) is below calibration.batch_size ({self.batch_size}): not"
                " one batch; raise num_samples"
            )
        if self.min_pixels > self.max_pixels:
            raise InputError("calibration.min_pixels is above calibration.max_pixels; raise max_pixels")

    @property
    def limits(self) -> Limits:
        """The limits that every sample has to keep."""
        return Limits(self.min_pixels, self.max_pixels, self.max_tokens)

    @property
    def place(self) -> str:
        """Where the samples come from, for messages."""
        return self.path or self.repo_id or f"calibration.source {self.source}"


class CalibrationLoader:
    """Batches as INC takes them: `(inputs, None)`, iterable again and again, with the `batch_size` INC asks for."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.batch_size = batches[0]["input_ids"].shape[0]

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        return ((batch, None) for batch in self.batches)


def extract(
    spec: CalibrationSpec, processor: Processor, model_manifest: dict[str, Any], progress: Progress = iter
) -> tuple[list[Sample], list[Sample], dict[str, Any]]:
    """Draw the samples, run each through the model's processor, and describe them.

    Args:
        spec: the config's calibration block.
        processor: the model's.
        model_manifest: as `snapshot.build_manifest` returns it; the digits are those that its training left aside.
        progress: wraps the range of samples while they are fetched from the hub.

    Returns:
        The calibration samples, the held-out samples, and the manifest: ids, sha256, token counts, limits, seed.

    Raises:
        InputError: the source is empty, malformed, names an image that is missing or unreadable, has fewer samples than
            asked, a sample breaks a limit, or one held out is the same as one to calibrate on.
    """
    pools, load, details = _open_source(spec, model_manifest, progress)
    generator = np.random.default_rng(spec.seed)
    drawn: dict[str, list[Any]] = {}
    for split, count in (("calibration", spec.num_samples), ("heldout", spec.num_heldout)):
        pool = [item for item in pools[split] if item not in drawn.get("calibration", ())]
        if len(pool) < count:
            raise InputError(
                f"{spec.place}: {len(pool)} samples left for the {split} split, {count} asked; lower"
                " calibration.num_samples or calibration.num_heldout, or give more samples"
            )
        drawn[split] = [pool[index] for index in sorted(generator.choice(len(pool), count, replace=False))]
    samples = {split: load(items) for split, items in drawn.items()}
    entries = {split: [_describe(sample, processor, spec.limits) for sample in samples[split]] for split in samples}
    _refuse_shared(entries, spec.place)
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
        "image_backend": processor.image_backend,
        "text_only": not any(entry["image_tokens"] for entry in entries["calibration"]),
        "digest": digest_of(content),
        "details": details,
    }
    return samples["calibration"], samples["heldout"], manifest


def _open_source(
    spec: CalibrationSpec, model_manifest: dict[str, Any], progress: Progress
) -> tuple[dict[str, Sequence[int]], Callable[[Sequence[int]], list[Sample]], dict[str, Any]]:
    """The numbers each split draws from, what turns drawn numbers into samples, and details for the manifest.

    Digits come from what the model's training left aside for each split. Both splits of another source draw from all
    of its rows, one after the other.
    """
    if spec.source == "digits":
        from auto_quantize_model.digits import digit_samples, digits_split

        split = model_manifest["details"].get("training", {}).get("split") or {"seed": 0, **digits_split(0)}
        return split, digit_samples, {"split_seed": split["seed"]}
    rows, details = (_read_local(spec), {}) if spec.source == "local" else _read_hub(spec, progress)
    everything = range(len(rows))

    def load(items: Sequence[int]) -> list[Sample]:
        return [_sample_of(rows[item]) for item in items]

    return {"calibration": everything, "heldout": everything}, load, details


def _refuse_shared(entries: dict[str, list[dict[str, Any]]], place: str) -> None:
    """Two rows may hold one sample; calibrated on and held out at once, it would flatter every held-out score."""
    calibration = {entry["sha256"]: entry["id"] for entry in entries["calibration"]}
    for entry in entries["heldout"]:
        if entry["sha256"] in calibration:
            raise InputError(
                f"{place}: {calibration[entry['sha256']]} and {entry['id']} are the same sample, one drawn to calibrate"
                " on and one held out; remove the duplicate or set calibration.num_heldout to 0"
            )


def _read_local(spec: CalibrationSpec) -> list[dict[str, Any]]:
    """A local source as rows {id, image?, prompt, answer?, where}, `where` naming the place for errors.

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
    return [row | {"id": f"{path.name}:{number:06d}"} for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    # Split at newlines alone: str.splitlines also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of the JSON or of the UTF-8
            raise InputError(f"{where}: not valid JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: no JSON object; each line is {{image?, prompt, answer?}}")
        unknown = sorted(set(row) - {"image", "prompt", "answer"})
        if unknown:
            raise InputError(f"{where}: unknown key {unknown[0]!r}; each line is {{image?, prompt, answer?}}")
        image = row.get("image")
        if image is not None and not isinstance(image, str):
            raise InputError(f"{where}: 'image' is no path; give one relative to {path.parent}, or leave it out")
        _check_words(row, where)
        yield row | {"image": image and str(path.parent / image), "where": where}


def _check_words(row: dict[str, Any], where: str) -> None:
    prompt, answer = row.get("prompt"), row.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: no text under 'prompt'; each sample is {{image?, prompt, answer?}}")
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: 'answer' is no text; put it in quotes or leave it out")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        # Not Dataset.from_parquet: it caches by path and mtime, and files unpacked from our archives share an mtime.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = Dataset(file.read())
        if "image" in table.column_names:
            table = table.cast_column("image", ImageFeature(decode=False))
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file of samples ({error}); write it again") from None
    if "prompt" not in table.column_names:
        raise InputError(f"{path}: no column 'prompt'; there are {', '.join(table.column_names)}")
    rows = []
    for number, row in enumerate(table, start=1):
        where = f"{path}, row {number}"
        _check_words(row, where)
        image = row.get("image")
        if image and not image["bytes"] and image["path"]:
            image = str(path.parent / image["path"])
        rows.append(row | {"image": image, "where": where})
    return rows


def _read_hub(spec: CalibrationSpec, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The drawn rows of a data set of the hub, as `_read_local` gives them, and details for the manifest.

    The data set is streamed: a buffer is filled from ten of its row groups (Parquet's unit of reading) at a time, in
    an order drawn by the seed, and rows are drawn from the buffer; of gigabytes only these groups are fetched.

    Raises:
        InputError: the data set, its revision or its split is not there or cannot be reached, or a column is missing.
    """
    from auto_quantize_model import hub

    wanted = spec.num_samples + spec.num_heldout
    columns = dict.fromkeys(COLUMNS) | spec.columns
    repo_id, revision = str(spec.repo_id), str(spec.revision)
    with hub.explained("calibration", repo_id, revision):
        hub.require_commit("dataset", repo_id, revision)
        hub.commit_of("dataset", repo_id, revision)
        try:
            stream = load_dataset(repo_id, split=spec.split, revision=revision, streaming=True)
            _require_columns(repo_id, columns, stream.column_names or list(next(iter(stream))))
            if columns["image"]:
                stream = stream.cast_column(columns["image"], ImageFeature(decode=False))
            drawn = stream.reshard().shuffle(seed=spec.seed, buffer_size=ROWS_PER_DRAWN * wanted).take(wanted)
            rows = [
                _hub_row(row, columns, spec, number)
                for number, row in zip(progress(range(wanted)), drawn, strict=False)
            ]
        except (ValueError, TypeError, DatasetsError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{repo_id}: split {spec.split} cannot be read ({error}); check calibration.split and"
                " calibration.columns"
            ) from None
    return rows, {"hub": {"repo_id": repo_id, "commit": revision, "split": spec.split, "columns": columns}}


def _require_columns(repo_id: str, columns: dict[str, str | None], there: list[str]) -> None:
    for key, column in columns.items():
        if column is not None and column not in there:
            raise InputError(
                f"{repo_id}: no column {column!r} (calibration.columns.{key}); there are {', '.join(there)}"
            )


def _hub_row(row: dict[str, Any], columns: dict[str, str | None], spec: CalibrationSpec, number: int) -> dict[str, Any]:
    """A row by our names for its columns; of a list of captions the first is taken."""
    ours: dict[str, Any] = {key: row[column] if column else None for key, column in columns.items()}
    for key in ("prompt", "answer"):
        if isinstance(ours[key], list):
            ours[key] = next(iter(ours[key]), None)
    sample_id = str(ours["id"]) if columns["id"] else f"{number:06d}"
    ours |= {"id": f"{spec.split}:{sample_id}", "where": f"{spec.repo_id}, {spec.split}, row {sample_id}"}
    if not columns["prompt"]:
        ours["prompt"] = spec.prompt
    _check_words(ours, ours["where"])
    return ours


def _sample_of(row: dict[str, Any]) -> Sample:
    return Sample(row["id"], row["prompt"], _open_image(row.get("image"), row["where"]), row.get("answer"))


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
            # A phone stores a photo as its sensor lay and says in EXIF how to turn it.
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{where}: image {path} does not exist; correct the path or remove the sample") from None
    except (OSError, ValueError, AttributeError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: image {path} cannot be read ({error}); replace it or remove the sample") from None


def _describe(sample: Sample, processor: Processor, limits: Limits) -> dict[str, Any]:
    """The manifest's entry; the sha256 is over the words and the decoded RGB pixels."""
    try:
        encoded = encode(sample, processor, limits)
    except ValueError as error:  # the image processor's own, for an image too long and thin, say
        raise InputError(
            f"sample {sample.id}: the model's processor refuses it ({error}); change or remove the sample"
        ) from None
    pixels = b"" if sample.image is None else repr(sample.image.size).encode() + sample.image.tobytes()
    words = json.dumps([sample.prompt, sample.answer]).encode()
    return {
        "id": sample.id,
        "sha256": sha256_bytes(words + pixels),
        "tokens": encoded["input_ids"].shape[1],
        "image_tokens": int(encoded["mm_token_type_ids"].sum()) if "mm_token_type_ids" in encoded else 0,
    }


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Store samples as Parquet, images as PNG inside it, whole or not at all."""
    columns: dict[str, list[Any]] = {
        "id": [sample.id for sample in samples],
        "prompt": [sample.prompt for sample in samples],
        "image": [sample.image and {"bytes": _png(sample.image), "path": None} for sample in samples],
        "answer": [sample.answer for sample in samples],
    }
    with atomic_path(path) as temporary:
        # Columns and not rows: there may be none held out, and no row has no columns.
        Dataset.from_dict(columns, features=FEATURES).to_parquet(str(temporary))


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
    return [_sample_of(row) for row in _read_parquet(path)]


def load_batches(path: Path, manifest: dict[str, Any], processor: Processor) -> list[Batch]:
    """The batches of a stored calibration set, in the manifest's order; an incomplete last batch is left out.

    Raises:
        InputError: the set is not the one that the manifest describes.
    """
    return batches_of(load_samples(path, manifest, processor, "calibration"), manifest, processor)


def load_samples(path: Path, manifest: dict[str, Any], processor: Processor, split: str) -> list[Sample]:
    """The samples of a stored split, `calibration` or `heldout`.

    Raises:
        InputError: they are not those that the manifest describes.
    """
    limits = Limits(**manifest["limits"])
    samples = read_samples(path)
    if [_describe(sample, processor, limits) for sample in samples] != manifest["samples"][split]:
        raise InputError(f"{path}: not the samples of its manifest; run the calibration rule again")
    return samples


def load_heldout(
    path: Path, manifest: dict[str, Any], processor: Processor, count: int
) -> tuple[list[Batch], list[list[range | None]]]:
    """The first `count` held-out batches, and of each of their samples the positions of its answer's tokens.

    Raises:
        InputError: they are not those that the manifest describes.
    """
    limits, size = Limits(**manifest["limits"]), manifest["batch_size"]
    samples = load_samples(path, manifest, processor, "heldout")[: count * size]
    spans = [answer_span(sample, processor, limits) for sample in samples]
    answers = [spans[start : start + size] for start in range(0, len(spans), size)]
    return batches_of(samples, manifest, processor), answers


def batches_of(samples: Sequence[Sample], manifest: dict[str, Any], processor: Processor) -> list[Batch]:
    """Samples in batches of the manifest's size; an incomplete last batch is left out."""
    limits, size = Limits(**manifest["limits"]), manifest["batch_size"]
    encoded = [encode(sample, processor, limits) for sample in samples]
    return [collate(encoded[start : start + size]) for start in range(0, len(encoded) - size + 1, size)]
