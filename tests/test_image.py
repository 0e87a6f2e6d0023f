"""`--sdm apptainer` runs each job in the image that the config names. A stand-in of apptainer notes what it gets."""

import os
from pathlib import Path

import pytest
from test_workflow import copy_checkout, snakemake, write_config

APPTAINER = """#!/bin/sh
if [ "$1" = --version ]; then echo "apptainer version 1.3.4"; exit; fi
echo "$@" >> {log}
while [ $# -gt 3 ]; do shift; done  # the shell, -c, and the job
exec "$@"
"""
ASKED = ("results/digits_vlm/model_manifest.json", "--cores", "1", "--sdm", "apptainer")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with a stand-in of apptainer."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER.format(log=tmp_path / "log"))
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_a_job_runs_in_the_image_of_the_config(tmp_path: Path, path: str) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    (directory / "mine.sif").touch()
    write_config(directory, {"machine": {"image": "mine.sif"}})
    ended = snakemake(directory, *ASKED, PATH=path)
    assert ended.returncode == 0, ended.stdout
    assert (directory / ASKED[0]).exists()
    (job,) = (tmp_path / "log").read_text().splitlines()
    assert job.startswith("exec ") and " mine.sif bash -c " in job
    assert "exec python scripts/get_model.py " in job


@pytest.mark.slow
def test_without_an_image_a_run_in_containers_is_refused_before_its_first_job(tmp_path: Path, path: str) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    write_config(directory, {})
    ended = snakemake(directory, *ASKED, PATH=path)
    assert ended.returncode != 0 and not (tmp_path / "log").exists()
    assert "machine.image names none; make one (make image)" in ended.stdout
