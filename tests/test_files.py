"""Files are written whole or not at all, with the umask's mode, never over the user's files; leftovers are removed."""

import argparse
import base64
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from build import a_plan, profiles_of
from safetensors.torch import save_file

from auto_quantize_model.clean import clean_results
from auto_quantize_model.commands import clean_results as clean_command
from auto_quantize_model.files import InputError, atomic_path, explained, require_writable, write_text
from auto_quantize_model.folders import MARKER, atomic_folder, require_own_folder
from auto_quantize_model.measure.store import ScoreStore

ROOT = Path(__file__).parents[1]
ADVICE = "name another folder"


def write_folder(path: Path, **files: str) -> None:
    with atomic_folder(path, ADVICE) as folder:
        for name, text in files.items():
            (folder / "inner").mkdir(exist_ok=True)
            (folder / "inner" / name).write_text(text)


def everything(folder: Path) -> dict[str, str]:
    """All files below a folder with what they hold, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_was_written_here_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", old="1", both="2")
    (tmp_path / "out" / ".snakemake_timestamp").touch()
    write_folder(tmp_path / "out", both="3")
    assert {name for name in everything(tmp_path) if MARKER not in name} == {"out/inner/both"}
    assert (tmp_path / "out" / "inner" / "both").read_text() == "3"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", a="1")
    assert (tmp_path / "out" / "inner" / "a").read_text() == "1"


def foreign(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("mine")


def copied_marker(path: Path) -> None:
    write_folder(path.with_name("ours"), a="1")
    foreign(path)
    shutil.copy(path.with_name("ours") / MARKER, path / MARKER)


def one_file_more(path: Path) -> None:
    write_folder(path, a="1")
    (path / "inner" / "notes.txt").write_text("mine")


def one_file_changed(path: Path) -> None:
    write_folder(path, a="1")
    (path / "inner" / "a").write_text("mine")


def a_link_inside(path: Path) -> None:
    write_folder(path, a="1")
    (path / "weights").symlink_to(path.parent, target_is_directory=True)


def a_link_to_our_own(path: Path) -> None:
    write_folder(path.with_name("ours"), a="1")
    path.symlink_to("ours", target_is_directory=True)


def a_link_that_leads_nowhere(path: Path) -> None:
    path.symlink_to("an unmounted disk")


def a_pipe_inside(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "pipe")


def an_empty_folder_inside(path: Path) -> None:
    write_folder(path, a="1")
    (path / "inner" / "mine").mkdir()


def a_pipe_for_a_marker(path: Path) -> None:
    foreign(path)
    os.mkfifo(path / MARKER)


def a_damaged_marker(path: Path) -> None:
    foreign(path)
    (path / MARKER).write_text('{"files": ["config.json"]}')


@pytest.mark.parametrize(
    "lay",
    [
        foreign,
        copied_marker,
        one_file_more,
        one_file_changed,
        a_link_inside,
        a_link_to_our_own,
        a_link_that_leads_nowhere,
        a_pipe_inside,
        an_empty_folder_inside,
        a_pipe_for_a_marker,
        a_damaged_marker,
        lambda path: path.write_text("a file"),
    ],
)
def test_what_is_the_users_stays_as_it_is(tmp_path: Path, lay: Callable[[Path], None]) -> None:
    lay(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(InputError, match=f"out.*{ADVICE}"), atomic_folder(tmp_path / "out", ADVICE):
        pytest.fail("work began")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_the_current_folder_and_those_above_it_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=ADVICE):
        require_own_folder(Path(path), ADVICE)


def test_what_the_user_adds_meanwhile_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", a="1")
    with pytest.raises(InputError, match=r"notes\.txt"), atomic_folder(tmp_path / "out", ADVICE):
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_comes_back_where_the_new_one_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out", a="1")
    rename, calls = Path.rename, iter(range(9))

    def fails_the_second_time(path: Path, target: Path) -> Path:
        if next(calls) == 1:
            raise OSError(errno.EIO, "broken", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_the_second_time)
    with pytest.raises(InputError, match="input/output error"):
        write_folder(tmp_path / "out", a="2")
    assert (tmp_path / "out" / "inner" / "a").read_text() == "1"


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "out.json").symlink_to("mine.json")
    write_text(tmp_path / "out.json", "new")
    assert (tmp_path / "mine.json").read_text() == "mine"
    assert not (tmp_path / "out.json").is_symlink()


def test_no_folder_and_no_device_is_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    for name in ("real", "link", "pipe", "/dev/null"):
        with pytest.raises(InputError, match="folder|not an ordinary file"):
            write_text(tmp_path / name, "new")
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "pipe"}


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask_whatever_a_library_does(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "inner" / "text", "")
        with atomic_path(tmp_path / "inner" / "weights") as weights:
            save_file({}, weights)
        with atomic_folder(tmp_path / "out", ADVICE) as out:
            save_file({}, out / "weights")
    finally:
        os.umask(before)
    files = ("inner/text", "inner/weights", "out/weights", f"out/{MARKER}")
    for path in (tmp_path / name for name in files):
        assert path.stat().st_mode & 0o777 == file
    for path in (tmp_path / "inner", tmp_path / "out"):
        assert path.stat().st_mode & 0o777 == folder


WRITER = """
import sys, time
from pathlib import Path
from auto_quantize_model.files import atomic_path
from auto_quantize_model.folders import atomic_folder
with atomic_path(Path("a.tar")) as file, atomic_folder(Path("model"), "") as folder:
    file.write_text("half"); (folder / "inner").mkdir(); (folder / "inner" / "weights").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing a.tar and model/; it ends when its input does."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_what_a_killed_writer_left_is_cleared_by_the_next_of_the_same_output(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    writer.kill()
    writer.wait()
    mine = {".a.tar.abcdefgh", ".auto-quantize-notes", ".auto-quantize-0123456789ab-01234567"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert len(list(tmp_path.iterdir())) == 5
    write_text(tmp_path / "another.tar", "")
    assert len(list(tmp_path.iterdir())) == 6
    write_text(tmp_path / "a.tar", "whole")
    write_folder(tmp_path / "model", a="whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "another.tar", "model", *mine}


def test_what_a_live_writer_holds_stays(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    write_text(tmp_path / "a.tar", "of another")
    write_folder(tmp_path / "model", a="of another")
    assert len(list(tmp_path.iterdir())) == 4
    writer.communicate()
    assert writer.returncode == 0
    assert (tmp_path / "a.tar").read_text() == "half"
    assert (tmp_path / "model" / "inner" / "weights").read_text() == "half"
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "model"}


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "text")
    with pytest.raises(InputError, match="name is too long.*shorter"):
        write_text(tmp_path / ("n" * 256), "text")


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_of_the_disk_names_the_output_and_the_next_step(tmp_path: Path, number: int, step: str) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}/out: .*{step}"), atomic_path(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(InputError, match=rf"{tmp_path}/out/a: .*{step}"), atomic_folder(tmp_path / "out", "") as folder:
        raise OSError(number, os.strerror(number), str(folder / "a"))
    with pytest.raises(InputError, match=rf"in\.json: .*{step}"), atomic_path(tmp_path / "out"):
        raise OSError(number, os.strerror(number), "in.json")
    assert not list(tmp_path.iterdir())


def test_libraries_that_hide_the_systems_error_are_understood() -> None:
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert [explained(error, "best_model.pt") for error in (rust, torchs)] == [
        "best_model.pt: its disk is full; free some space, and run again"
    ] * 2
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "best_model.pt") is None


def test_another_users_file_is_told_by_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    told = explained(PermissionError(errno.EACCES, "", str(tmp_path / "theirs" / "deep")))
    assert told and str(tmp_path / "theirs") in told and ", who owns " in told


@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), write_folder])
def test_a_folder_without_the_right_to_write_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write
) -> None:
    def refuse(path: Path, *others: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=rf"^{tmp_path}/out: permission denied; .*, or name another path$"):
        write(tmp_path / "out")


def test_a_component_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: a file, where a folder is needed"):
        write_text(tmp_path / "file" / "out.json", "")
    for refuse in (lambda path: write_text(path, ""), lambda path: require_writable(path.parent)):
        with pytest.raises(InputError, match=r"file.*a part of this path is a file"):
            refuse(tmp_path / "file" / "inner" / "out.json")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_loses_nothing_and_leaves_nothing(tiny_disk: Path) -> None:
    write_text(tiny_disk / "out.json", "before")
    write_folder(tiny_disk / "model", a="before")
    with pytest.raises(InputError, match=r"disk/out\.json: its disk is full; free some space"):
        write_text(tiny_disk / "out.json", "x" * 2_000_000)
    with pytest.raises(InputError, match=r"disk/model: its disk is full; free some space"):
        write_folder(tiny_disk / "model", a="x" * 2_000_000)
    assert (tiny_disk / "out.json").read_text() == "before"
    assert (tiny_disk / "model" / "inner" / "a").read_text() == "before"
    assert {path.name for path in tiny_disk.iterdir()} == {"out.json", "model"}


def test_the_error_of_safetensors_on_a_full_disk_is_a_line(tiny_disk: Path) -> None:
    numpy, safetensors = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    with (
        pytest.raises(InputError, match=r"disk/model: its disk is full"),
        atomic_folder(tiny_disk / "model", "") as folder,
    ):
        safetensors.save_file({"a": numpy.zeros(1_000_000)}, folder / "model.safetensors")
    assert not list(tiny_disk.iterdir())


def test_a_read_only_disk_is_told_before_long_work(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(InputError, match=r"disk: its file system is read-only"):
        require_writable(tiny_disk / "a" / "b")


def recorded(root: Path, name: str) -> None:
    record = root / ".snakemake" / "metadata" / base64.urlsafe_b64encode(name.encode()).decode()
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"rule": "any"}))


def test_clean_removes_what_the_workflow_wrote_and_names_the_rest(tmp_path: Path) -> None:
    run = tmp_path / "results" / "tiny" / "digits"
    write_folder(run / "exports_cpu", a="1")
    write_folder(run / "exports_cuda", a="1")
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    ours = ["plan.json", "capture_cpu.json", "logs/plan_quantization.log", "benchmarks/get_model.tsv"]
    mine = ["notes.txt", "logs/mine.log", "exports_cuda/mine.txt", "capture_cuda.json"]
    for name in ours + mine:
        write_text(run / name, name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.json").touch()
    (run / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "results" / "README.md").touch()
    for name in ("plan.json", "capture_cpu.json", "exports_cpu", "exports_cuda", "../../../elsewhere/a.json"):
        recorded(tmp_path, f"results/tiny/digits/{name}")
    left = clean_results(tmp_path)
    for name in mine:
        assert (run / name).is_file()
    assert {str(path.relative_to(run)) for path in left} >= {*mine, "link"}
    assert not any((run / name).exists() for name in ours) and not (run / "exports_cpu").exists()
    assert (tmp_path / "elsewhere" / "a.json").exists() and (tmp_path / "results" / "README.md").exists()


def test_clean_empties_the_score_store_and_can_do_that_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = clean_command.clean_results
    scores = tmp_path / "results" / "scores"
    for alone in (True, False):
        with ScoreStore(scores).shelf({"weights": "a"}) as shelf:
            shelf.add("key", {"mse_value": 1.0})
        (scores / "mine.jsonl").touch()
        clean(argparse.Namespace(root=tmp_path, scores=alone))
        assert os.listdir(scores) == ["mine.jsonl"]
        first, second = capsys.readouterr().out.splitlines()
        assert first == "removed 1 score files (0.0 MB) from results/scores"
        assert second.endswith(f": {scores / 'mine.jsonl'}")
    (scores / "mine.jsonl").unlink()
    scores.rmdir()
    clean(argparse.Namespace(root=tmp_path, scores=True))
    assert capsys.readouterr().out == "removed 0 score files (0.0 MB) from results/scores\n"


def test_a_signal_is_not_mistaken_for_a_failure(tmp_path: Path) -> None:
    """A temporary folder goes when its writer is interrupted, and what was there before stays."""
    write_folder(tmp_path / "model", a="before")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model", ""):
        os.kill(os.getpid(), signal.SIGINT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_photos_and_exports_never_mix_with_what_is_the_users(tmp_path: Path) -> None:
    """Each writer of a folder goes by the one rule."""
    from auto_quantize_model.export.exports import export
    from auto_quantize_model.made.shapes import SHAPES
    from auto_quantize_model.made.standin import build, write_photos

    foreign(tmp_path / "mine")
    for write in (
        write_photos,
        lambda path: build(SHAPES["tiny"], path),
        lambda path: export(path, profiles_of({}), a_plan(), {}, [], 1),
    ):
        with pytest.raises(InputError, match=r"config\.json in it was not written by this tool"):
            write(tmp_path / "mine")
    assert everything(tmp_path) == {"mine/config.json": "mine"}


def test_the_hubs_link_replaces_no_link_of_the_users(tmp_path: Path) -> None:
    from auto_quantize_model.models.hub import link_snapshot, require_link

    cache = tmp_path / "models--a--b" / "snapshots"
    first, second = cache / ("1" * 40), cache / ("2" * 40)
    for snapshot in (first, second):
        snapshot.mkdir(parents=True)
    foreign(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine", target_is_directory=True)
    for name in ("mine", "link"):
        with pytest.raises(InputError, match=r"model\.path: .*model\.source: local"):
            link_snapshot(first, tmp_path / name)
        with pytest.raises(InputError, match=r"model\.path: .*model\.source: local"):
            require_link(tmp_path / name)  # before the download
    assert (tmp_path / "link" / "config.json").read_text() == "mine"
    link_snapshot(first, tmp_path / "model")
    link_snapshot(second, tmp_path / "model")
    assert (tmp_path / "model").resolve() == second


def test_a_damaged_file_is_removed_from_the_hubs_cache_alone(tmp_path: Path) -> None:
    from auto_quantize_model.models.hub import check_against_hub

    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("1" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for folder, name in ((tmp_path, "mine"), (blobs, "weights")):
        (folder / ("0" * 64)).write_text(name)
        (snapshot / name).symlink_to(folder / ("0" * 64))
    check_against_hub(snapshot, {"mine": "1" * 64})
    with pytest.raises(InputError, match="removed from the cache"):
        check_against_hub(snapshot, {"weights": "1" * 64})
    assert (snapshot / "mine").read_text() == "mine" and not list(blobs.iterdir())
