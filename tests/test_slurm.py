"""The pipeline on a real SLURM: `make test-slurm` runs the long form, with kills and time limits."""

import subprocess
import sys
from pathlib import Path

import pytest
import slurm

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.slurm
def test_jobs_on_two_nodes_write_the_bytes_of_a_local_run_and_a_failed_job_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/slurm.py", "--short", "--folder", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = [line.partition(":") for line in ended.stdout.splitlines()[-2:]]
    assert [name for name, _, _ in told] == ["plain", "failed"]
    assert all(" files with the bytes of a local run, " in what for _, _, what in told)


@pytest.mark.parametrize(("told", "minutes"), [("11:00", 11), ("1:30:00", 90), ("0:30", 0), ("1-02:00:00", 1560)])
def test_a_time_limit_of_slurm_is_read_in_minutes(told: str, minutes: int) -> None:
    assert slurm.in_minutes(told) == minutes
