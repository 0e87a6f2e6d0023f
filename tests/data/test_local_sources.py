"""Files at a config's local paths count by name and content: no change of time or place makes a result stale."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from build import a_calibration_manifest, a_model_manifest

from auto_quantize_model.data import local_sources
from auto_quantize_model.data.local_sources import samples_digest, why_other_samples, why_other_snapshot
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import sha256_file
from auto_quantize_model.records import SnapshotFile, body_of

ROWS = [
    '{"image": "a.png"}',
    "broken",
    '{"image": "gone.png"}',
    '{"image": 3, "prompt": "%s"}' % ("x" * 999),
    r'{"image": "half \ud800.png", "prompt": "a\u0000b"}',
    '{"image": "a {b} <c>.png"}',
    '{"messages": [{"content": [{"image_url": {"url": "folder/nested.png"}}]}]}',
    "[" * 100_000,
]
NAMED = {"a.png": b"1", "a {b} <c>.png": b"2", "folder/nested.png": b"3", "folder/c.JPG": b"4"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with images, and a set of each kind that names some of them."""
    place = tmp_path / "set"
    (place / "folder").mkdir(parents=True)
    for name, content in NAMED.items():
        (place / name).write_bytes(content)
    (place / "set.jsonl").write_text("\n".join(ROWS))
    (place / "set.json").write_text('[{"image": "a.png"}, {"image": {"path": "folder/nested.png"}}]')
    messages = [None, json.dumps([{"content": [{"type": "image", "path": "folder/nested.png"}]}])]
    table = pyarrow.table({"prompt": ["1", "2"], "image": ["a.png", None], "messages": messages})
    pyarrow.parquet.write_table(table, place / "set.parquet")
    images = pyarrow.array([{"bytes": b"1", "path": None}, {"bytes": None, "path": "folder/nested.png"}])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1", "2"], "image": images}), place / "structs.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"images": [["a.png", "folder/nested.png"]]}), place / "lists.parquet")
    return place


SETS = [".", "set.jsonl", "set.json", "set.parquet", "structs.parquet", "lists.parquet"]


@pytest.mark.parametrize("name", SETS)
def test_times_and_the_place_are_no_part_of_a_digest_and_every_image_that_is_named_is(place: Path, name: str) -> None:
    before = samples_digest(place / name)
    moved = place.rename(place.with_name("elsewhere"))
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    assert samples_digest(moved / name) == before
    (moved / "folder" / "nested.png").write_bytes(b"other")
    changed = samples_digest(moved / name)
    (moved / "folder" / "nested.png").unlink()
    assert len({before, changed, samples_digest(moved / name)}) == 3


@pytest.mark.parametrize(
    ("change", "of_jsonl", "of_folder"),
    [
        (lambda place: (place / "a {b} <c>.png").write_bytes(b"other"), True, True),
        (lambda place: (place / "gone.png").write_bytes(b"new"), True, True),
        (lambda place: (place / "set.jsonl").write_text(ROWS[0]), True, False),
        (lambda place: (place / "folder" / "c.JPG").write_bytes(b"other"), False, True),
        (lambda place: (place / "folder" / "c.JPG").rename(place / "c.JPG"), False, True),
        (lambda place: (place / "note.txt").write_text("a sort that is skipped and counted"), False, True),
        (lambda place: (place / "set.json").write_text("no image, so its content does not count"), False, False),
        (lambda place: (place / "a.png").touch(), False, False),
    ],
)
def test_a_digest_changes_with_what_its_source_reads_and_with_nothing_else(
    place: Path, change: Callable[[Path], Any], of_jsonl: bool, of_folder: bool
) -> None:
    before = samples_digest(place / "set.jsonl"), samples_digest(place)
    change(place)
    assert (samples_digest(place / "set.jsonl") != before[0], samples_digest(place) != before[1]) == (
        of_jsonl,
        of_folder,
    )


@pytest.mark.parametrize("name", SETS)
def test_a_fifo_is_not_opened_and_counts_as_another_file(place: Path, name: str) -> None:
    before = samples_digest(place / name)
    (place / "a.png").unlink()
    os.mkfifo(place / "a.png")
    assert (samples_digest(place / name) == before) is (name == "structs.parquet")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone", "damaged.parquet", "fifo.jsonl", "loop.json", "x" * 300])
def test_what_cannot_be_read_has_a_digest_as_well(place: Path, name: str) -> None:
    (place / "damaged.parquet").write_bytes(b"PAR1")
    os.mkfifo(place / "fifo.jsonl")
    (place / "loop.json").symlink_to("loop.json")
    assert len(samples_digest(place / name)) == 64


def test_a_set_is_stale_where_its_source_holds_other_files_and_not_where_nothing_lies_there(place: Path) -> None:
    manifest = place.with_name("calibration_manifest.json")
    assert why_other_samples(manifest, place) == ""
    recorded = a_calibration_manifest(source_digest=samples_digest(place))
    write_document(manifest, "calibration_manifest", body_of(recorded))
    assert why_other_samples(manifest, place) == ""
    (place / "a.png").write_bytes(b"other")
    assert why_other_samples(manifest, place) == f"{manifest} was made from other files than {place} holds"
    assert why_other_samples(manifest, place.with_name("gone")) == ""
    manifest.write_text("{}")
    assert why_other_samples(manifest, place) == ""


def test_a_snapshot_is_compared_by_names_sizes_and_the_content_of_small_files(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place.with_name("model_manifest.json")
    files = tuple(
        SnapshotFile(str(path.relative_to(place)), path.stat().st_size, sha256_file(path))
        for path in place.rglob("*")
        if path.is_file()
    )
    write_document(manifest, "model_manifest", body_of(a_model_manifest(files=files)))

    def after(change: Callable[[], Any]) -> str:
        change()
        why = why_other_snapshot(manifest, place).replace(str(place), "PLACE").replace(str(manifest), "MANIFEST")
        for name, content in NAMED.items():
            (place / name).unlink(missing_ok=True)
            (place / name).write_bytes(content)
        return why

    assert after((place / ".hidden").touch) == ""
    differs = "PLACE/a.png is not the file that MANIFEST lists"
    assert after(lambda: (place / "a.png").write_bytes(b"2")) == differs
    assert after(lambda: (place / "a.png").write_bytes(b"22")) == differs
    assert after((place / "a.png").unlink) == "PLACE/a.png is gone, and MANIFEST lists it"
    monkeypatch.setattr(local_sources, "HASHED_BYTES", 0)
    assert after(lambda: (place / "a.png").write_bytes(b"2")) == ""
    (place / "new.json").touch()
    assert after(lambda: None) == "PLACE/new.json is new, and MANIFEST does not list it"
    assert why_other_snapshot(manifest, place.with_name("gone")) == ""
    assert why_other_snapshot(place.with_name("gone.json"), place) == ""
