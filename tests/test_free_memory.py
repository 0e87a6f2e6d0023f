"""A job in a cgroup has the memory that the tightest group around it leaves, in both versions of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from auto_quantize_model.files import InputError
from auto_quantize_model.free_memory import MOUNTED, Free, free_memory
from auto_quantize_model.machine import require_free

UNLIMITED = 2**63 - 4096  # what version 1 writes where there is no limit
ABOVE = 2**50


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": ABOVE}))


def group(folder: Path, limit: str, usage: str, stat: str, values: tuple[str | int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((limit, usage), values, strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


def version_1(folder: Path, limit: int, used: int, pages: int) -> None:
    stat = f"cache 0\ntotal_inactive_file {pages - 1}\ntotal_active_file 1\ninactive_file 7\nactive_file 7\n"
    group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", stat, (limit, used))


def version_2(folder: Path, limit: str | int, used: int, pages: int) -> None:
    stat = f"anon 1\nfile 9\ninactive_file {pages - 2}\nactive_file 2\n"
    group(folder, "memory.max", "memory.current", stat, (limit, used))


def found(folder: Path, own: str) -> Free:
    (folder / "own").write_text(own)
    return free_memory(folder / "own", folder / "cgroup")


def test_pages_of_files_count_as_free_in_version_2(tmp_path: Path) -> None:
    version_2(tmp_path / "cgroup/jobs/7", 1000, 700, 300)
    assert found(tmp_path, "0::/jobs/7\n") == (600, "this job's cgroup")


def test_pages_of_files_count_as_free_in_version_1(tmp_path: Path) -> None:
    version_1(tmp_path / "cgroup/memory/jobs/7", 1000, 700, 300)
    assert found(tmp_path, "9:cpu,cpuacct:/other\n4:memory:/jobs/7\n0::/\n") == (600, "this job's cgroup")


def test_the_tightest_of_all_groups_around_the_process_counts(tmp_path: Path) -> None:
    version_2(tmp_path / "cgroup/jobs/7/step", "max", 500, 300)
    version_2(tmp_path / "cgroup/jobs/7", 900, 500, 300)
    version_2(tmp_path / "cgroup/jobs", 800, 500, 300)
    version_2(tmp_path / "cgroup", 5000, 500, 300)
    assert found(tmp_path, "0::/jobs/7/step\n").bytes == 600


def test_in_a_container_the_root_is_its_own_group(tmp_path: Path) -> None:
    version_1(tmp_path / "cgroup/memory", 1000, 700, 300)
    assert found(tmp_path, "4:memory:/docker/0123\n").bytes == 600


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    version_1(tmp_path / "cgroup/memory/jobs/7", UNLIMITED, 700, 300)
    version_2(tmp_path / "cgroup/jobs/7", "max", 700, 300)
    assert found(tmp_path, "4:memory:/jobs/7\n0::/jobs/7\n") == (ABOVE, "this machine")
    assert free_memory(tmp_path / "absent", tmp_path) == (ABOVE, "this machine")


def test_what_does_not_fit_names_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auto_quantize_model.machine.free_memory", lambda: Free(2**30, "this job's cgroup"))
    with pytest.raises(InputError, match="The work needs 2.0 GiB, and this job's cgroup has 1.0 GiB free"):
        require_free(2**31, "The work")


def test_a_real_cgroup_limits_a_process() -> None:
    """Where this process may make a group; version 1, as on this project's machines."""
    parent = MOUNTED / "memory"
    if not os.access(parent, os.W_OK) or not (parent / "memory.limit_in_bytes").exists():
        pytest.skip("no cgroup of version 1 that this user may change")
    made = parent / f"free_memory_{os.getpid()}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(2**30))
    except OSError as error:
        pytest.skip(f"cgroups are read-only here ({error})")
    code = "from auto_quantize_model.free_memory import free_memory; print(*free_memory(), sep=';')"
    try:
        into = f'echo $$ > {made}/cgroup.procs && exec {sys.executable} -c "{code}"'
        ended = subprocess.run(["bash", "-c", into], capture_output=True, text=True, check=True)
        count, place = ended.stdout.strip().split(";")
        assert place == "this job's cgroup" and 2**29 < int(count) < 2**30
    finally:
        made.rmdir()
