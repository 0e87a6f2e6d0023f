"""The pipeline on Kubernetes by Snakemake's plugin: here the API server is a stub, and a pod is a process.

The weights lie on a volume, and all documents go through a local S3 server. A pod has only what these two give it.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faults import digests
from slurm import CONFIG, SCALES, Pipeline, copied, environment
from stub_kubernetes import Cluster
from test_storage import BUCKET, contents, keys, server

__all__ = ["server"]
PLAN = SCALES.replace("scales_cpu", "plan")
ON_GPU = ["--config", "sensitivity={device: cuda}", "--", SCALES.replace("cpu", "cuda")]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return environment(tmp_path_factory.mktemp("python") / "venv", "kubernetes.lock", "s3.lock", "s3_server.lock")
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot install envs/kubernetes.lock, envs/s3.lock and envs/s3_server.lock here")


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Pipeline:
    """The pipeline in a clone whose config names weights outside of it."""
    run = Pipeline(python, copied(tmp_path / "checkout"))
    shutil.move(run.checkout / CONFIG["model"]["path"], tmp_path / "weights")
    subprocess.run(
        "git init --quiet && git add . && git rm --quiet --cached config/tiny.yaml",
        shell=True,
        cwd=run.checkout,
        check=True,
    )
    model = {**CONFIG["model"], "path": str(tmp_path / "weights")}
    (run.checkout / "config" / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    return run


@pytest.fixture
def cluster(python: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with the volume `weights`; its image has the plugins already, so its pip installs nothing."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, command in {"python": f'exec {python} "$@"', "pip": 'echo pip "$@"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", programs, {"weights": tmp_path / "weights"}) as made:
        yield made


@pytest.mark.slow
def test_pods_make_the_bytes_of_a_local_run_and_ask_for_what_the_rules_state_and_a_failed_one_says_why(
    python: Path, run: Pipeline, server: str, cluster: Cluster, tmp_path: Path
) -> None:
    run.local([PLAN])
    expected = {name: digest for name, digest in digests(run.checkout).items() if name.startswith("results/tiny/")}
    run.empty()
    words = ["--workflow-profile", "workflow/profiles/kubernetes", "--configfile", "config/tiny.yaml"]
    words += ["--default-storage-prefix", f"s3://{BUCKET}/folder", "--container-image", "IMAGE", "--max-threads", "1"]
    words += ["--kubernetes-persistent-volumes", f"weights:{tmp_path / 'weights'}", "--envvars", "HF_TOKEN"]
    words += ["--seconds-between-status-checks", "1", "--retries", "0"]
    settings = {**keys(server), "KUBECONFIG": str(cluster.kubeconfig()), "HF_TOKEN": "hf_secret"}

    said = run.finish(run.start(*words, *ON_GPU, **settings), 1)
    *_, where, last = said.splitlines()
    assert where.startswith("calibrate_scales failed; its log: ") and "kubernetes-logs" in where
    assert last.startswith("error: no GPU that this build of torch")
    assert not cluster.pods and not cluster.secrets

    assert not (run.checkout / "results/tiny").exists()
    found = contents(python, server)
    assert found.items() >= {f"folder/{name}": digest for name, digest in expected.items()}.items()
    assert PLAN in expected and not [name for name in found if "snakemake-workflow-sources" in name]
    assert "Nothing to be done" in run.finish(run.start("--dry-run", *words, "--", PLAN, **settings))

    small, _, planning, replaying = asked = [cluster.container(name)["resources"] for name in cluster.jobs]
    assert {one["requests"]["cpu"] for one in asked} == {"950m"}  # the plugin asks for 95 % of a thread
    assert small["requests"]["memory"] == "4000M" != planning["requests"]["memory"]
    assert replaying["requests"]["nvidia.com/gpu"] == replaying["limits"]["nvidia.com/gpu"] == "1"
    assert not any("limits" in one for one in asked[:3])
    assert "hf_secret" not in str(cluster.jobs) and str(run.checkout) not in str(cluster.jobs)
