"""The calibration set: samples from a source, drawn by a seed, all checked, and stored as Parquet with a manifest.

In: a source of samples. Out: two disjoint sets of samples, `calibration` and `heldout`, with token ids and with images
at the processor's size; and a manifest of sample ids and hashes. Later steps read the stored samples as batches.
"""

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets import Features, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from PIL import Image

from auto_quantize_model.config import CalibrationSpec
from auto_quantize_model.data.images import open_picture
from auto_quantize_model.data.local_sources import samples_digest
from auto_quantize_model.data.sources import Progress, Source, conversation, every, listed, read_local, stream
from auto_quantize_model.files import InputError, atomic_path, digest_of, sha256_bytes
from auto_quantize_model.models.chat_template import limited_renderer
from auto_quantize_model.models.encode import Shapes, collate, prepare, require_equal, shapes_of, tensors
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.sample import Limits, Prepared, Sample, Turn
from auto_quantize_model.models.words import messages
from auto_quantize_model.records import Answers, CalibrationManifest, ModelManifest, SampleEntry, body_of

FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "images": ListFeature(ImageFeature(decode=False)),
        "answer": Value("string"),
        "messages": Value("string"),
        "text": Value("string"),
        "input_ids": ListFeature(Value("int32")),
        "answer_span": ListFeature(Value("int32")),
    }
)
ROWS_AT_ONCE = 16  # prepared samples that are kept in memory before they are written
SPLITS = ("calibration", "heldout")
DIGESTED = ("samples", "limits", "batch_size", "format")  # the manifest's digest covers these fields
Batch = dict[str, torch.Tensor]
Store = Callable[[Prepared], None]


def extract(
    spec: CalibrationSpec, processor: Processor, model_manifest: ModelManifest, progress: Progress = iter
) -> tuple[list[Prepared], list[Prepared], CalibrationManifest]:
    """As `extract_into`, with the samples kept in memory.

    Returns:
        The calibration samples, the held-out samples, and the manifest.
    """
    kept: dict[str, list[Prepared]] = {split: [] for split in SPLITS}
    stores = {split: samples.append for split, samples in kept.items()}
    manifest = extract_into(stores, spec, processor, model_manifest, progress)
    return kept["calibration"], kept["heldout"], manifest


def extract_into(
    stores: dict[str, Store],
    spec: CalibrationSpec,
    processor: Processor,
    model_manifest: ModelManifest,
    progress: Progress = iter,
) -> CalibrationManifest:
    """Draw the samples, run each through the model's processor, pass each to a store, and describe all of them.

    One sample is in memory at a time, so any number of samples and any size of their images fit.

    Args:
        stores: for each split, `calibration` and `heldout`, the function that takes its prepared samples, in order.
        spec: the config's calibration block.
        processor: the model's.
        model_manifest: of the model; digits are drawn from those that its training left aside.
        progress: wraps the range of samples while they are fetched from the hub.

    Raises:
        InputError: the source is empty or malformed, has too few samples, or has samples that cannot be used. Or a
            held-out sample is the same as a calibration sample. The message names all such samples.
    """
    if spec.format == "chat" and processor.family.takes_words and processor.tokenizer.chat_template is None:
        raise InputError(
            f"{model_manifest.path}: no chat template (chat_template.jinja, chat_template.json, or"
            " in tokenizer_config.json); complete the snapshot, or set calibration.format to plain"
        )
    limits = Limits(spec.min_pixels, spec.max_pixels, spec.max_tokens)
    # Before the source is read: a change during the reading makes the set stale.
    source_digest = samples_digest(Path(spec.path)) if spec.source == "local" and spec.path else None
    pools, source = _open_source(spec, model_manifest, progress)
    split_of = _draw(spec, pools)
    entries: dict[str, list[SampleEntry]] = {split: [] for split in SPLITS}
    shapes: dict[str, list[Shapes]] = {split: [] for split in SPLITS}
    sizes = {"calibration": spec.batch_size, "heldout": spec.heldout_batch_size or spec.batch_size}
    first_frames: list[str] = []

    def take(item: tuple[int, Callable[[], tuple[Sample, str | None]]]) -> None:
        number, open_row = item
        sample, first_frame = open_row()
        prepared = prepare(sample, processor, limits, render if spec.format == "chat" else None)
        encoded = tensors(prepared, processor)
        split = split_of[number]
        entries[split].append(_describe(prepared, processor))
        first_frames.extend([first_frame] if first_frame else [])
        shapes[split].append(shapes_of(encoded))
        stores[split](prepared)

    with limited_renderer(processor.tokenizer) as render:
        numbers = sorted(split_of)
        read = len(every(take, zip(numbers, source.read(numbers), strict=False), spec.place))
    if read < len(numbers):  # a stream that ended early
        _draw(spec, dict.fromkeys(SPLITS, range(read)))
    _refuse_shared(entries, spec.place)
    for split, size in sizes.items():
        for start in range(0, len(shapes[split]), size):
            require_equal(shapes[split][start : start + size])
    made = CalibrationManifest(
        calibration=spec.name,
        source=spec.source,
        path=spec.path,
        source_digest=source_digest,
        seed=spec.seed,
        samples={split: tuple(entries[split]) for split in SPLITS},
        limits=asdict(limits),
        batch_size=sizes["calibration"],
        heldout_batch_size=sizes["heldout"],
        format=spec.format,
        image_backend=processor.image_backend,
        text_only=not any(entry.image_tokens for entry in entries["calibration"]),
        answers={split: _located(entries[split]) for split in SPLITS},
        digest="",
        details=source.details | ({"first_frame_only": first_frames} if first_frames else {}),
    )
    body = body_of(made)
    return replace(made, digest=digest_of({key: body[key] for key in DIGESTED}))


def remarks(manifest: CalibrationManifest) -> list[str]:
    """What a user should know about an extracted set, in sentences."""
    found = []
    if unread := manifest.details.get("columns_not_read"):
        named = ", ".join(unread[:12]) + " and more" * (len(unread) > 12)
        found.append(f"{manifest.path} has columns that are not read: {named}")
    if skipped := manifest.details.get("skipped"):
        found.append(f"{manifest.path} holds files that are no images, which were skipped: {listed(skipped)}")
    if frames := manifest.details.get("first_frame_only"):
        more = f" and {len(frames) - 5} more" if len(frames) > 5 else ""
        found.append(
            f"{len(frames)} images are animations or have several pages; the first frame alone is used:"
            f" {', '.join(frames[:5])}{more}"
        )
    for split, answers in manifest.answers.items():
        if answers.located < answers.given:
            found.append(
                f"answers located in {answers.located} of {answers.given} {split} samples, and accuracy is"
                " measured on those. The other answers are empty, changed by the chat template, or in tokens that hold"
                " other text too"
            )
    return found


def _located(entries: Iterable[SampleEntry]) -> Answers:
    tokens = [entry.answer_tokens for entry in entries if entry.answer_tokens is not None]
    return Answers(given=len(tokens), located=sum(count > 0 for count in tokens))


def _draw(spec: CalibrationSpec, pools: dict[str, Sequence[int]]) -> dict[int, str]:
    """The row numbers that are drawn, each with its split.

    Raises:
        InputError: there are fewer rows than asked.
    """
    generator = np.random.default_rng(spec.seed)
    split_of: dict[int, str] = {}
    for split, count in (("calibration", spec.num_samples), ("heldout", spec.num_heldout)):
        pool = [item for item in pools[split] if item not in split_of]
        if len(pool) < count:
            raise InputError(
                f"{spec.place}: {len(pool)} samples left for the {split} split, {count} asked; lower"
                " calibration.num_samples or calibration.num_heldout, or give more samples"
            )
        split_of |= {pool[index]: split for index in generator.choice(len(pool), count, replace=False)}
    return split_of


def _open_source(
    spec: CalibrationSpec, model_manifest: ModelManifest, progress: Progress
) -> tuple[dict[str, Sequence[int]], Source]:
    """The row numbers that each split draws from, and the source.

    Of the digits, each split draws from those that the model's training left aside for it. Of another source, both
    splits draw from all rows, one after the other.
    """
    if spec.source == "digits":
        from auto_quantize_model.data.digits import DIGITS, MAX_SHIFT, MAX_TURN, digits_split, varied_samples

        split = model_manifest.details.get("training", {}).get("split") or {"seed": 0, **digits_split(0)}

        def read(numbers: Sequence[int]) -> Iterator[Callable[[], tuple[Sample, str | None]]]:
            return (functools.partial(lambda sample: (sample, None), sample) for sample in varied_samples(numbers))

        return split, Source(DIGITS, read, {"split_seed": split["seed"], "max_turn": MAX_TURN, "max_shift": MAX_SHIFT})
    if spec.source == "local":
        if spec.path is None:
            raise InputError(
                "calibration.path is not set; calibration.source local needs a JSONL, Parquet file or folder"
            )
        source = read_local(Path(spec.path), spec.prompt)
    else:
        place = str(spec.repo_id), str(spec.revision), str(spec.split)
        wanted = spec.num_samples + spec.num_heldout
        source = stream(*place, spec.columns.model_dump(), spec.prompt, spec.seed, wanted, progress)
    return dict.fromkeys(SPLITS, range(source.count)), source


def _refuse_shared(entries: dict[str, list[SampleEntry]], place: str) -> None:
    """Refuse a sample that is in both splits: calibration on a held-out sample would improve the held-out scores."""

    def contents(entry: SampleEntry) -> list[str]:
        # Without an image, the model sees only the tokens, and a template may leave out the words.
        return [entry.sha256, *[entry.tokens_sha256] * (entry.image_tokens == 0)]

    calibration = {content: entry.id for entry in entries["calibration"] for content in contents(entry)}
    for entry in entries["heldout"]:
        for content in contents(entry):
            if content in calibration:
                raise InputError(
                    f"{place}: the calibration sample {calibration[content]} and the held-out sample {entry.id} are"
                    " the same to the model. Remove the duplicate, set calibration.num_heldout to 0, or check that the"
                    " chat template writes the prompt"
                )


def _describe(prepared: Prepared, processor: Processor) -> SampleEntry:
    """The manifest's entry of a sample."""
    sample, span = prepared.sample, prepared.answer_span
    pixels = b"".join(repr(image.size).encode() + image.tobytes() for image in sample.images)
    words: list[Any] = [sample.prompt, sample.answer, *([sample.turns] if sample.turns else [])]
    tokens = [prepared.input_ids, None if span is None else [span.start, span.stop]]
    return SampleEntry(
        id=sample.id,
        sha256=sha256_bytes(json.dumps(words).encode() + pixels),
        tokens_sha256=sha256_bytes(json.dumps(tokens).encode()),
        tokens=len(prepared.input_ids),
        image_tokens=sum(token in processor.image_token_ids for token in prepared.input_ids),
        answer_tokens=None if sample.answer is None else len(span or ()),
    )


@contextmanager
def sample_writer(path: Path) -> Iterator[Store]:
    """A function that stores samples as Parquet, images as PNG inside it; the file is written whole or not at all."""
    waiting: list[dict[str, Any]] = []
    schema = FEATURES.arrow_schema

    def store(prepared: Prepared) -> None:
        waiting.append(_stored(prepared))
        if len(waiting) == ROWS_AT_ONCE:
            write()

    def write() -> None:
        writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
        waiting.clear()

    with atomic_path(path) as temporary:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            yield store
            write()


def write_samples(path: Path, samples: Iterable[Prepared]) -> None:
    """Store samples as `sample_writer` does."""
    with sample_writer(path) as store:
        for prepared in samples:
            store(prepared)


def _stored(prepared: Prepared) -> dict[str, Any]:
    sample, span = prepared.sample, prepared.answer_span
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "images": [{"bytes": _png(image), "path": None} for image in sample.images],
        "answer": sample.answer,
        "messages": json.dumps(messages(sample, sample.answer, parted=True)) if sample.turns else None,
        "text": prepared.text,
        "input_ids": prepared.input_ids,
        "answer_span": span and [span.start, span.stop],
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_samples(path: Path, count: int | None = None) -> list[Prepared]:
    """The first `count` samples of a file that `sample_writer` wrote, or all; images of other samples are not decoded.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such calibration set; run the calibration rule again")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return [_prepared(row, path) for row in file.read().to_pylist()[:count]]
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a calibration set ({error}); run the calibration rule again") from None


def _prepared(row: dict[str, Any], path: Path) -> Prepared:
    name = f"{path}: the image of {row['id']}"
    images = tuple(open_picture(image["bytes"], name).image for image in row["images"])
    turns: tuple[Turn, ...] = ()
    if row["messages"]:
        turns = conversation(json.loads(row["messages"]), row["images"], f"{path}: {row['id']}")[2]
    sample = Sample(row["id"], row["prompt"], images, row["answer"], turns)
    span = range(*row["answer_span"]) if row["answer_span"] else None
    return Prepared(sample, row["text"], tuple(row["input_ids"]), span)


def load_batches(
    path: Path, manifest: CalibrationManifest, processor: Processor, count: int | None = None
) -> list[Batch]:
    """The first `count` batches of a stored calibration set, or all; an incomplete last batch is left out.

    Raises:
        InputError: the set is not the one that the manifest describes.
    """
    samples = None if count is None else count * manifest.batch_size
    return batches_of(load_samples(path, manifest, processor, "calibration", samples), manifest.batch_size, processor)


def load_samples(
    path: Path, manifest: CalibrationManifest, processor: Processor, split: str, count: int | None = None
) -> list[Prepared]:
    """The first `count` samples of a stored split, or all, with the token ids that were extracted.

    Args:
        split: `calibration` or `heldout`.

    Raises:
        InputError: the samples are not those that the manifest describes.
    """
    samples = read_samples(path, count)
    if tuple(_describe(sample, processor) for sample in samples) != manifest.samples[split][:count]:
        raise InputError(f"{path}: not the samples of its manifest; run the calibration rule again")
    return samples


def load_heldout(
    path: Path, manifest: CalibrationManifest, processor: Processor, count: int
) -> tuple[list[Batch], list[list[range | None]]]:
    """The first `count` held-out batches, and for each of their samples the positions of its answer's tokens.

    Raises:
        InputError: the samples are not those that the manifest describes.
    """
    size = manifest.heldout_batch_size
    samples = load_samples(path, manifest, processor, "heldout", count * size)
    spans = [sample.answer_span for sample in samples]
    answers = [spans[start : start + size] for start in range(0, len(spans), size)]
    return batches_of(samples, size, processor), answers


def batches_of(samples: Sequence[Prepared], size: int, processor: Processor) -> list[Batch]:
    """Samples in batches of `size` samples; an incomplete last batch is left out."""
    encoded = [tensors(sample, processor) for sample in samples]
    return [collate(encoded[start : start + size]) for start in range(0, len(encoded) - size + 1, size)]
