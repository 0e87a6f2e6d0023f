"""Archives are the same bytes for the same files, and nothing is left behind when one cannot be made."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from auto_quantize_model.archive import MEMBER_TIME, archive_results, why_outdated
from auto_quantize_model.files import InputError

SCRIPT = Path(__file__).parents[1] / "scripts" / "archive_results.py"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "b.json").write_text("{}\n")
    (tmp_path / "results" / "a, é.md").write_bytes(b"# report\n")
    return tmp_path


FILES = [Path("results/b.json"), Path("results/a, é.md")]


def test_same_files_give_the_same_bytes_whatever_their_order_times_and_modes(project: Path) -> None:
    archive_results(Path("one.tar"), Path("one.json"), FILES)
    os.utime(FILES[0], (1, 1))
    FILES[0].chmod(0o600)
    archive_results(Path("two.tar"), Path("two.json"), FILES[::-1])
    assert Path("one.tar").read_bytes() == Path("two.tar").read_bytes()


def test_members_keep_relative_names_and_say_nothing_of_time_or_owner(project: Path) -> None:
    archive_results(Path("one.tar"), Path("one.json"), [FILES[0], project / FILES[1]])
    with tarfile.open("one.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == sorted(str(file) for file in FILES)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (MEMBER_TIME, 0, 0, "", "", 0o644)
        }
        extracted = tar.extractfile(str(FILES[1]))
        assert extracted is not None and extracted.read() == b"# report\n"


def test_checksums_are_those_of_the_archive_and_its_members(project: Path) -> None:
    document = archive_results(Path("out/one.tar"), Path("out/one.json"), FILES)
    assert json.loads(Path("out/one.json").read_text()) == document
    assert document["archive"] == "one.tar"
    assert document["sha256"] == hashlib.sha256(Path("out/one.tar").read_bytes()).hexdigest()
    assert document["bytes"] == Path("out/one.tar").stat().st_size
    for entry in document["files"]:
        content = Path(entry["name"]).read_bytes()
        assert entry == {
            "name": entry["name"],
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_an_archive_of_other_files_is_told_from_one_of_those_that_lie_here(project: Path) -> None:
    assert why_outdated(Path("one.json")) == ""
    archive_results(Path("one.tar"), Path("one.json"), FILES)
    assert why_outdated(Path("one.json")) == ""
    FILES[0].write_text("[]\n")
    assert why_outdated(Path("one.json")) == "one.json is of another results/b.json"
    Path("one.json").write_text("{}")
    assert why_outdated(Path("one.json")) == ""


def test_an_archive_of_the_same_name_that_lacks_a_file_of_this_run_is_told(project: Path) -> None:
    """Model a-b with set c, and model a with set b-c."""
    for run in ("results/a-b/c", "results/a/b-c"):
        Path(run).mkdir(parents=True)
        Path(run, "plan.json").write_text("{}\n")
    archive_results(Path("a-b-c.tar"), Path("a-b-c.json"), [Path("results/a-b/c")])
    assert why_outdated(Path("a-b-c.json"), [Path("results/a-b/c/plan.json")]) == ""
    lacking = why_outdated(Path("a-b-c.json"), [Path("results/a/b-c/plan.json")])
    assert lacking == "a-b-c.json does not list results/a/b-c/plan.json"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "no files to archive"),
        (["results/gone.json"], "results/gone.json: no such file"),
        (["../outside.json"], "outside"),
        (["/etc/passwd"], "outside"),
        (["results/b.json", "./results/b.json"], "named twice"),
        (["results", "results/b.json"], "named twice"),
    ],
)
def test_bad_members_are_refused_and_nothing_is_written(project: Path, files: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        archive_results(Path("one.tar"), Path("one.json"), [Path(file) for file in files])
    assert sorted(path.name for path in project.iterdir()) == ["results"]


def test_a_folder_stands_for_the_files_in_it(project: Path) -> None:
    files = [path for path in Path("results").rglob("*") if path.is_file()]
    named = archive_results(Path("one.tar"), Path("one.json"), files)
    whole = archive_results(Path("two.tar"), Path("two.json"), [Path("results")])
    assert files and whole["sha256"] == named["sha256"]


def test_the_script_reports_a_missing_file_in_one_line_and_with_exit_code_2(project: Path) -> None:
    command = [sys.executable, SCRIPT, "--archive", "one.tar", "--checksums", "one.json", "gone.json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: gone.json: no such file; run the rule that makes it, or leave it out"]
    assert not Path("one.tar").exists()
