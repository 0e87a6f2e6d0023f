"""`--sdm apptainer` runs each job in the image that the config names. A stand-in of apptainer notes what it gets.

With apptainer on the PATH and an image of the Dockerfile in the variable AUTO_QUANTIZE_IMAGE, jobs run in that too.
"""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import digests
from test_workflow import TINY, copy_checkout, snakemake, write_config, write_samples

from auto_quantize_model.made.digits import build_snapshot

# As apptainer does, it makes --home the home folder, and takes folders to show from the environment.
APPTAINER = """#!{python}
import json, os, sys
if sys.argv[1] == "--version":
    print("apptainer version 1.3.4")
    sys.exit()
*options, image, shell, _, job = sys.argv[1:]
home = options[options.index("--home") + 1]
shown = [home, *os.environ.get("APPTAINER_BIND", "").split(",")]
with open({log!r}, "a") as log:
    print(json.dumps(dict(image=image, job=job, shown=shown, environment=dict(os.environ))), file=log)
os.environ["HOME"] = home
os.execvp(shell, [shell, "-c", job])
"""
MANIFEST = "results/digits_vlm/model_manifest.json"
SAMPLES = "results/tiny/digits/calibration_manifest.json"
IN_CONTAINERS = ("--cores", "1", "--sdm", "apptainer")
IMAGE = os.environ.get("AUTO_QUANTIZE_IMAGE", "")
real = pytest.mark.skipif(not (IMAGE and shutil.which("apptainer")), reason="no apptainer, or no image for it")


class StandIn:
    """A stand-in of apptainer in a folder of its own, for `PATH`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        program = folder / "bin" / "apptainer"
        program.parent.mkdir()
        program.write_text(APPTAINER.format(python=sys.executable, log=str(self.log)))
        program.chmod(0o755)
        self.path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"

    def jobs(self) -> list[dict[str, Any]]:
        """What each job got."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@dataclass(frozen=True)
class Scattered:
    """A run whose checkout, model, samples, scores and hub cache lie outside its working directory."""

    folder: Path

    def run(self, image: str, *more: str, **settings: str) -> Path:
        """The working directory, after the steps that get model and samples."""
        directory = self.folder / "run"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "config").mkdir(parents=True)
        places = {
            "model": {"path": str(self.folder / "link")},
            "calibration": {"path": str(self.folder / "samples" / "digits.jsonl")},
            "machine": {"score_store": str(self.folder / "volume" / "scores"), "image": image},
        }
        config = {block: TINY.get(block, {}) | places.get(block, {}) for block in (*TINY, "machine")}
        (directory / "config" / "config.yaml").write_text(yaml.safe_dump(config))
        snakefile = str(self.folder / "checkout" / "workflow" / "Snakefile")
        settings = {"XDG_CACHE_HOME": str(self.folder / "cache")} | settings
        ended = snakemake(directory, SAMPLES, "--snakefile", snakefile, "--cores", "1", *more, **settings)
        assert ended.returncode == 0, ended.stdout
        return directory


@pytest.fixture
def scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scattered:
    monkeypatch.delenv("HF_HOME", raising=False)
    copy_checkout(tmp_path / "checkout")
    build_snapshot(tmp_path / "weights" / "tiny", depth=1, hidden=32)
    weights = tmp_path / "weights" / "tiny" / "model.safetensors"  # a link, as in a cache of the hub
    (tmp_path / "blobs").mkdir()
    weights.rename(tmp_path / "blobs" / "1")
    weights.symlink_to("../../blobs/1")
    (tmp_path / "link").symlink_to("weights/tiny")
    write_samples(tmp_path / "samples" / "digits.jsonl")
    return Scattered(tmp_path)


@pytest.mark.slow
def test_a_job_runs_in_the_image_of_the_config(tmp_path: Path, stand_in: StandIn) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    (directory / "mine.sif").touch()
    write_config(directory, {"machine": {"image": "mine.sif"}})
    ended = snakemake(directory, MANIFEST, *IN_CONTAINERS, PATH=stand_in.path)
    assert ended.returncode == 0, ended.stdout
    assert (directory / MANIFEST).exists()
    (job,) = stand_in.jobs()
    assert job["image"] == "mine.sif" and "exec python scripts/get_model.py " in job["job"]


@pytest.mark.slow
def test_a_container_sees_all_that_a_run_uses_outside_of_its_working_directory(
    scattered: Scattered, stand_in: StandIn
) -> None:
    scattered.run("mine.sif", "--sdm", "apptainer", PATH=stand_in.path, APPTAINER_BIND="/of/the/user")
    jobs = stand_in.jobs()
    assert len(jobs) == 2
    for job in jobs:
        variables = [job["environment"][name] for name in ("PYTHONPATH", "PIPELINE_SCORES", "HF_HOME")]
        linked = [str(scattered.folder / name) for name in ("weights/tiny", "blobs/1", "samples")]
        words = [word for word in shlex.split(job["job"]) if word.startswith("/")]
        assert len(words) == (2 if "get_model" in job["job"] else 1)
        for path in (*words, *variables, *linked):
            assert any(Path(path).is_relative_to(folder) for folder in job["shown"]), (path, job["shown"])
        assert job["environment"]["HF_HOME"] == str(scattered.folder / "cache" / "huggingface")
        assert "/of/the/user" in job["shown"]
        assert all(os.path.exists(folder) for folder in job["shown"] if folder != "/of/the/user")


@real
@pytest.mark.slow
def test_a_real_container_sees_them_too_and_makes_the_same_bytes(scattered: Scattered) -> None:
    expected = digests(scattered.run(IMAGE))
    # Without the host's /tmp, which the folders of this test may lie in.
    found = digests(scattered.run(IMAGE, "--sdm", "apptainer", "--apptainer-args=--contain"))
    assert SAMPLES in found and found == expected


@pytest.mark.slow
def test_without_an_image_a_run_in_containers_is_refused_before_its_first_job(
    tmp_path: Path, stand_in: StandIn
) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    write_config(directory, {})
    ended = snakemake(directory, MANIFEST, *IN_CONTAINERS, PATH=stand_in.path)
    assert ended.returncode != 0 and not stand_in.log.exists()
    assert "machine.image names none; make one (make image)" in ended.stdout


@pytest.mark.slow
def test_a_folder_that_apptainer_cannot_show_is_refused_by_name(tmp_path: Path, stand_in: StandIn) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    write_config(directory, {"machine": {"image": "mine.sif", "score_store": f"{tmp_path}/scores, old"}})
    ended = snakemake(directory, MANIFEST, *IN_CONTAINERS, PATH=stand_in.path)
    assert ended.returncode != 0 and not stand_in.log.exists()
    assert f"{tmp_path}/scores, old: apptainer cannot show a folder whose name has a comma" in ended.stdout


@pytest.mark.slow
def test_runs_of_several_models_take_the_image_of_their_configs(tmp_path: Path, stand_in: StandIn) -> None:
    directory = copy_checkout(tmp_path / "checkout")
    write_config(directory, {"machine": {"image": "mine.sif"}})
    (directory / "mine.sif").touch()
    (directory / "config" / "models.tsv").write_text("model\tconfig\tcalibration\ndigits_vlm\tconfig/config.yaml\t\n")
    snakefile = ("--snakefile", "workflow/models.smk")
    ended = snakemake(directory, MANIFEST, *snakefile, *IN_CONTAINERS, PATH=stand_in.path)
    assert ended.returncode == 0, ended.stdout
    assert [job["image"] for job in stand_in.jobs()] == ["mine.sif"]
