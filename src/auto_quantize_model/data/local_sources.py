"""Whether the files at a config's local paths have changed since a document was made from them.

In: a path of the config, and the document that was made from it. Out: a digest, or a reason to make the document again.
Snakemake asks at every start, so libraries that take long to import are not imported here. Nothing here raises an
error, because the script that reads a file reports the file's faults.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_quantize_model.config import repository_at
from auto_quantize_model.documents import read_document
from auto_quantize_model.files import InputError, digest_of, named_path, sha256_file, visible
from auto_quantize_model.records import CalibrationManifest, ModelManifest, Plan, SnapshotFile, as_record

# Of a snapshot, larger files are compared by name and size: reading all weights at every start would take minutes.
HASHED_BYTES = 64 * 2**20
LONGEST_PATH = 4096  # of Linux; a longer text cannot name a file


def why_other_samples(manifest: Path, source: Path) -> str:
    """Why a calibration set was not made from the samples at a path, in words; empty if there is no reason.

    If nothing lies at the path, there is no reason: an archive of results may be unpacked on another machine.

    Args:
        manifest: the set's manifest, which may be missing.
        source: the value of `calibration.path`.
    """
    try:
        recorded = as_record(CalibrationManifest, read_document(manifest, "calibration_manifest"))
    except InputError:
        return ""
    if not os.path.exists(source) or recorded.source_digest == samples_digest(source):
        return ""
    return f"{manifest} was made from other files than {source} holds"


def why_other_snapshot(manifest: Path, snapshot: Path) -> str:
    """Why a model manifest does not describe the snapshot at a path, in words; empty if there is no reason.

    All names and sizes are compared, and the content of files up to `HASHED_BYTES`. The scripts compare all content
    before they load the model.

    Args:
        manifest: the model's manifest, which may be missing.
        snapshot: the value of `model.path`; where nothing lies there, there is no reason.
    """
    try:
        files = as_record(ModelManifest, read_document(manifest, "model_manifest")).files
    except InputError:
        return ""
    recorded = {snapshot / file.name: file for file in files}
    found = [path for path in visible(snapshot) if not os.path.isdir(path)]
    for path in sorted(set(found) - recorded.keys()):
        return f"{path} is new, and {manifest} does not list it"
    return why_other_files(manifest, recorded) if found else ""


def why_other_checkpoint(plan: Path) -> str:
    """Why a plan was not made from the local checkpoints that it names, in words; empty if there is no reason.

    Files are compared as by `why_other_snapshot`. Where a checkpoint's folder is gone, there is no reason.

    Args:
        plan: the plan, which may be missing.
    """
    try:
        schemes = as_record(Plan, read_document(plan, "plan")).schemes
    except InputError:
        return ""
    for fields in schemes.values():
        folder = fields.get("folder", "")
        if os.path.isdir(folder) and not repository_at(fields["checkpoint"]):
            files = {Path(folder, file["name"]): SnapshotFile(**file) for file in fields["files"]}
            if why := why_other_files(plan, files, since=os.path.getmtime(plan)):
                return why
    return ""


def why_other_files(document: Path, recorded: Mapping[Path, SnapshotFile], since: float = math.inf) -> str:
    """Which file is not the one that a document lists, in words; empty if all are.

    Args:
        since: a time of modification. A large file counts by its size alone, unless it was written after that time. An
            algorithm that runs again writes a checkpoint of the same size.
    """
    for path, entry in sorted(recorded.items()):
        if not os.path.isfile(path):
            return f"{path} is gone, and {document} lists it"
        size = os.path.getsize(path)
        hashed = size <= HASHED_BYTES or os.path.getmtime(path) > since
        if size != entry.bytes or (hashed and _content(path) != entry.sha256):
            return f"{path} is not the file that {document} lists"
    return ""


def samples_digest(source: Path) -> str:
    """SHA-256 over the names and the content of all files that the samples of a local source are read from.

    Times and the place of the source do not count. A file that cannot be read counts as unreadable.

    Args:
        source: a folder of images, or a JSONL, JSON or Parquet file. Files that texts in such a file name count too.
    """
    source = Path(os.path.expanduser(source))
    if not os.path.isdir(source):
        named = {text: named_path(text, source.parent) for text in _texts(source)}
        contents = {text: content for text, path in named.items() if (content := _content(path))}
        return digest_of([_content(source), contents])
    from auto_quantize_model.data.images import images_in  # takes a third of a second, and only folders need it

    try:
        images, skipped = images_in(source)
    except InputError as error:
        return digest_of(str(error))
    return digest_of([{str(image.relative_to(source)): _content(image) for image in images}, skipped])


def _content(path: Path) -> str | None:
    """The file's sha256; None if it is unreadable or not a regular file, because opening a FIFO waits forever."""
    try:
        return sha256_file(path) if os.path.isfile(path) else None
    except OSError:  # no permission, or removed in the meantime
        return None


def _texts(source: Path) -> set[str]:
    """All texts in the rows of a file that could be paths, because each row shape puts its images in another place."""
    try:
        return {text for row in _rows(source) for text in _texts_in(row) if text.strip() and len(text) < LONGEST_PATH}
    except OSError:
        return set()


def _rows(source: Path) -> Iterator[Any]:
    """The rows of a JSONL, JSON or Parquet file that can be read, whatever their shape."""
    if not os.path.isfile(source):
        return
    if source.suffix == ".parquet":
        yield from _parquet_rows(source)
    elif source.suffix in (".jsonl", ".json"):
        data = source.read_bytes()
        yield from _parsed(data.split(b"\n") if source.suffix == ".jsonl" else [data])


def _parsed(documents: Iterable[str | bytes]) -> Iterator[Any]:
    for document in documents:
        try:
            yield json.loads(document)
        except (ValueError, RecursionError):
            continue


def _parquet_rows(source: Path) -> Iterator[Any]:
    """The texts under `image`, `images` and `messages` of a Parquet file; messages may be JSON."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            columns = [file.schema.column(index) for index in range(len(file.schema))]
            texts = [column.path for column in columns if column.logical_type.type == "STRING"]
            wanted = [path for path in texts if path.split(".")[0] in ("image", "images", "messages")]
            for batch in file.iter_batches(columns=wanted) if wanted else ():
                for row in batch.to_pylist():
                    yield row
                    if isinstance(row.get("messages"), str):
                        yield from _parsed([row["messages"]])
    except (OSError, ValueError, TypeError, pyarrow.ArrowException):
        return


def _texts_in(value: Any) -> Iterator[str]:
    """The texts in a JSON value, at any depth."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
