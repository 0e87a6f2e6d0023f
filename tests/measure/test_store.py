"""A shelf of scores outlives its run, loses a damaged line alone, and never serves a value of another context."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from auto_quantize_model.code import code_digest_of_modules
from auto_quantize_model.files import InputError
from auto_quantize_model.inc import engine
from auto_quantize_model.measure import capture
from auto_quantize_model.measure.store import ScoreStore, Shelf

OF = {"weights": "a", "batch": "b", "threads": 1}
SCORES = {
    f"key{number}": {"mse_value": number / 3, "by_modality": {"text": number, "image": None}} for number in range(3)
}


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    return ScoreStore(tmp_path / "scores")


def fill(store: ScoreStore, of: dict[str, object] = OF) -> Path:
    with store.shelf(of) as shelf:
        for key, record in SCORES.items():
            shelf.add(key, record)
    return shelf.path


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_scores_are_there_again_exactly_and_the_file_says_what_they_depend_on(store: ScoreStore) -> None:
    path = fill(store)
    with store.shelf(dict(reversed(OF.items()))) as shelf:
        assert json.dumps(shelf.records) == json.dumps(SCORES)  # keys in their order too
        assert (shelf.found, shelf.dropped) == (3, 0)
        assert shelf.get("key1") == SCORES["key1"] and shelf.get("key3") is None
        assert shelf.news() == "resuming with 3 scores of an earlier run"
        before = path.read_bytes()
        shelf.add("key1", SCORES["key1"])  # as an engine does that measures a whole map again
        assert path.read_bytes() == before
    head = json.loads(lines_of(path)[0])
    assert head["of"] == OF and head["digest"].startswith(path.stem)


@pytest.mark.parametrize("change", [{"threads": 2}, {"batch": "c"}, {"code": "d"}])
def test_another_context_has_other_scores_and_takes_none_away(store: ScoreStore, change: dict[str, object]) -> None:
    """Another number of threads, another batch, and a thing that did not count before."""
    path = fill(store)
    with store.shelf(OF) as one, store.shelf(OF | change) as other:
        assert (one.found, other.found, other.news()) == (3, 0, "")
        other.add("key0", {"mse_value": 9.0})
    with store.shelf(OF) as one, store.shelf(OF | change) as other:
        assert one.records == SCORES and other.records == {"key0": {"mse_value": 9.0}}
    assert len(list(path.parent.iterdir())) == 2


def test_a_clock_that_went_back_and_a_move_to_another_folder_lose_nothing(store: ScoreStore, tmp_path: Path) -> None:
    path = fill(store)
    os.utime(path, (2**33, 2**33))
    with ScoreStore(store.folder.rename(tmp_path / "moved")).shelf(OF) as shelf:
        assert shelf.records == SCORES


def test_of_two_scores_with_one_key_the_last_counts(store: ScoreStore) -> None:
    fill(store)
    with store.shelf(OF) as shelf:
        shelf.add("key0", {"mse_value": -0.0})
        shelf.add("key0", {"mse_value": 0.0})
    with store.shelf(OF) as shelf:
        assert str(shelf.get("key0")) == "{'mse_value': 0.0}" and shelf.found == 3


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda line: line[:-9],
    "cut off in the middle of the file": lambda line: line[:-9] + b"\n",
    "another value": lambda line: line.replace(b"0.3333333333333333", b"0.3333333333333334"),
    "another key": lambda line: line.replace(b"key1", b"key9"),
    "no score": lambda line: b'["key1"]\n',
    "no text": lambda line: b"\xff\0\n",
    "not a number": lambda line: line.replace(b"0.3333333333333333", b"NaN"),
    "gone": lambda line: b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_is_dropped_alone_and_the_next_score_repairs_the_file(
    store: ScoreStore, damage: Callable[[bytes], bytes]
) -> None:
    path = fill(store)
    whole = lines_of(path)
    order = [0, 1, 3, 2]  # the damaged line is the last one
    lines = [whole[0], whole[1], whole[3], damage(whole[2])]
    assert lines[3] != whole[2]
    path.write_bytes(b"".join(lines))
    with store.shelf(OF) as shelf:
        assert (shelf.records, shelf.dropped) == ({key: SCORES[key] for key in ("key0", "key2")}, 1)
        assert shelf.news().endswith(f"dropped 1 damaged line of {path}, which will be measured again")
        assert path.read_bytes() == b"".join(lines)  # reading alone changes nothing
        shelf.add("key1", SCORES["key1"])
    assert lines_of(path) == [whole[number] for number in order]
    with store.shelf(OF) as shelf:
        assert (shelf.records, shelf.dropped) == (SCORES, 0)
    assert os.listdir(store.folder) == [path.name]


def test_no_changed_byte_makes_a_wrong_score(store: ScoreStore) -> None:
    path = fill(store)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with store.shelf(OF) as shelf:
            assert all(SCORES[key] == record for key, record in shelf.records.items())
            assert shelf.found >= 1 and 1 <= shelf.dropped <= 2


@pytest.mark.parametrize(
    "head", [b"", b"not a shelf\n", b'{"digest": "0", "of": {}, "version": 1}\n'], ids=["missing", "text", "edited"]
)
def test_a_damaged_head_costs_no_score_and_is_repaired(store: ScoreStore, head: bytes) -> None:
    path = fill(store)
    whole = path.read_bytes()
    path.write_bytes(head + b"".join(lines_of(path)[1:]))
    with store.shelf(OF) as shelf:
        assert (shelf.records, shelf.dropped) == (SCORES, bool(head))
        shelf.add("key3", {})
    assert path.read_bytes().startswith(whole)


def test_a_line_without_its_end_counts_if_it_is_whole(store: ScoreStore) -> None:
    path = fill(store)
    path.write_bytes(path.read_bytes()[:-1])
    with store.shelf(OF) as shelf:
        assert (shelf.found, shelf.dropped) == (3, 0)
        shelf.add("key3", {})
    with store.shelf(OF) as shelf:
        assert (shelf.found, shelf.dropped) == (4, 0)


def test_scores_of_another_context_under_this_ones_name_are_refused_and_their_lines_never_count(
    store: ScoreStore,
) -> None:
    other = fill(store, OF | {"threads": 2})
    lines = lines_of(other)
    path = fill(store)
    path.write_bytes(lines_of(path)[0] + b"".join(lines[1:]))
    with store.shelf(OF) as shelf:
        assert (shelf.found, shelf.dropped) == (0, 3)
    other.rename(path)
    with pytest.raises(InputError, match=rf"{path.name}: holds the scores of another context, {other.stem}; move"):
        store.shelf(OF)
    assert path.read_bytes() == b"".join(lines)


def test_a_second_process_is_refused_by_name_and_harms_nothing(store: ScoreStore) -> None:
    with store.shelf(OF) as shelf:
        shelf.add("key0", SCORES["key0"])
        with pytest.raises(InputError, match=rf"{shelf.path.name}: another process is writing it; wait for it"):
            store.shelf(OF)
        shelf.add("key1", SCORES["key1"])
        with store.shelf(OF | {"batch": "c"}) as other:
            other.add("key0", {})
    with store.shelf(OF) as shelf:
        assert shelf.found == 2


def test_the_lock_holds_on_after_a_repair(store: ScoreStore) -> None:
    path = fill(store)
    path.write_bytes(path.read_bytes() + b"half a li")
    with store.shelf(OF) as shelf:
        shelf.add("key3", {})
        with pytest.raises(InputError, match="another process is writing it"):
            store.shelf(OF)
        shelf.add("key4", {})
    with store.shelf(OF) as shelf:
        assert (shelf.found, shelf.dropped) == (5, 0)


def test_scores_survive_the_removal_of_their_folder_while_they_are_measured(store: ScoreStore) -> None:
    path = fill(store)
    with store.shelf(OF) as shelf:
        path.unlink()
        path.parent.rmdir()
        shelf.add("key3", {})
    with store.shelf(OF) as shelf:
        assert shelf.records == SCORES | {"key3": {}}


def test_a_killed_process_leaves_every_score_but_the_last(store: ScoreStore) -> None:
    code = (
        "import sys, pathlib\n"
        "from auto_quantize_model.measure.store import ScoreStore\n"
        "shelf = ScoreStore(pathlib.Path(sys.argv[1])).shelf({'weights': 'a', 'batch': 'b', 'threads': 1})\n"
        "for number in range(10**6):\n"
        "    shelf.add(f'key{number}', {'mse_value': number})\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        pass
    process.kill()
    said = process.stdout.read().split("\n")
    process.wait()
    last = int(([line for line in said[:-1] if line] or ["50"])[-1])
    with store.shelf(OF) as shelf:
        numbers = [int(key.removeprefix("key")) for key in shelf.records]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > last and shelf.dropped <= 1


def test_a_number_that_is_not_finite_is_refused_and_costs_nothing(store: ScoreStore) -> None:
    path = fill(store)
    before = path.read_bytes()
    with store.shelf(OF) as shelf:
        for number in (float("nan"), float("inf")):
            with pytest.raises(InputError, match=r"^key3: a number measured there is not finite \(.*\); check the"):
                shelf.add("key3", {"mse_value": number})
    assert shelf.get("key3") is None and path.read_bytes() == before


def test_a_file_that_may_grow_no_further_keeps_all_earlier_scores(store: ScoreStore) -> None:
    """As on a full disk: a part of a line fits, and the rest does not."""
    path = fill(store)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.shelf(OF) as shelf:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            for _ in range(2):  # by a line that is appended, and by a repair
                with pytest.raises(InputError, match=rf"{path.name}: too large for its file system"):
                    shelf.add("key3", {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(store.folder) == [path.name]
        shelf.add("key4", {})
    with store.shelf(OF) as shelf:
        assert (shelf.records, shelf.dropped) == (SCORES | {"key4": {}}, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_a_shelf_is_named(store: ScoreStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: Path, *_: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"/scores/[0-9a-f]{24}\.jsonl: (its disk is full|its file|permission denied)"):
        store.shelf(OF)


def test_a_folder_that_is_a_file_and_a_shelf_that_is_a_folder_are_named(store: ScoreStore) -> None:
    store.folder.write_text("")
    with pytest.raises(InputError, match="scores: a file, where a folder is needed"):
        store.shelf(OF)
    store.folder.unlink()
    path = fill(store)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"{path.name}: a folder, where a file is to be written"):
        store.shelf(OF)


def test_emptying_removes_shelves_alone_and_none_that_is_in_use(store: ScoreStore) -> None:
    assert store.empty() == (0, 0)
    path, edited = fill(store), fill(store, OF | {"batch": "c"})
    edited.write_bytes(edited.read_bytes().replace(b'"c"', b'"d"'))
    ours = path.stat().st_size
    foreign = {"notes.txt", "0" * 24 + ".jsonl", "1" * 24 + ".jsonl", edited.name}
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / ("0" * 24 + ".jsonl")).write_text('{"of": 1}\n')
    (store.folder / ("1" * 24 + ".jsonl")).write_bytes(path.read_bytes())  # a copy under another name
    with store.shelf(OF | {"batch": "in use"}) as held:
        assert store.empty() == (1, ours)
        assert set(os.listdir(store.folder)) == foreign | {held.path.name}
        held.add("key0", {})
    assert store.empty()[0] == 1
    assert set(os.listdir(store.folder)) == foreign


def test_an_emptied_store_leaves_no_folder(store: ScoreStore) -> None:
    fill(store)
    empty: Shelf = store.shelf(OF | {"batch": "c"})
    with empty:
        empty.path.write_bytes(b"")  # as a kill before the first line leaves it
    assert store.empty()[0] == 2
    assert not store.folder.exists()


def test_a_score_is_kept_under_the_code_that_makes_it():
    names = ("replay.model", "measure.metrics", "measure.probes", "models.snapshot")
    assert capture.CODE == code_digest_of_modules([f"auto_quantize_model.{name}" for name in names])
    assert engine.CODE == code_digest_of_modules(["auto_quantize_model.inc.engine"])
    assert len({capture.CODE, engine.CODE, code_digest_of_modules([])}) == 3
