"""The pipeline where hosts share no files: its documents lie in an S3 bucket. Here the S3 server is local.

On Kubernetes, Snakemake's plugin starts the steps. Here its API server is a stub, and a pod is a process. The weights
lie on a volume, so a pod has only what volume and bucket give it.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faults import digests
from slurm import CONFIG, SCALES, Pipeline, copied, environment
from stub_kubernetes import Cluster

BUCKET = "runs"
PLAN = SCALES.replace("scales_cpu", "plan")
WEIGHTS = "weights"  # the folder of the volume, next to the checkout
STORED = ["--cores", "1", "--configfile", "config/tiny.yaml", "--shared-fs-usage", "none"]
STORED += ["--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}"]

ON_GPU = ["--config", "sensitivity={device: cuda}", "--", SCALES.replace("cpu", "cuda")]

LIST = f"""
import boto3, hashlib, json, sys
keys = dict(aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")
found = boto3.resource("s3", endpoint_url=sys.argv[1], **keys).Bucket("{BUCKET}").objects.all()
print(json.dumps({{one.key: hashlib.sha256(one.get()["Body"].read()).hexdigest() for one in found}}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    locks = ("kubernetes.lock", "s3.lock", "s3_server.lock")
    try:
        return environment(tmp_path_factory.mktemp("python") / "venv", *locks)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot install {', '.join(f'envs/{lock}' for lock in locks)} here")


@pytest.fixture(scope="module")
def made(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline in a clone whose config names weights outside of it, and the digests of a local run."""
    folder = tmp_path_factory.mktemp("made")
    run = Pipeline(python, copied(folder / "checkout"))
    shutil.move(run.checkout / CONFIG["model"]["path"], folder / WEIGHTS)
    git = "git init --quiet && git add . && git rm --quiet --cached config/tiny.yaml"
    subprocess.run(git, shell=True, cwd=run.checkout, check=True)
    model = {**CONFIG["model"], "path": str(folder / WEIGHTS)}
    (run.checkout / "config" / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    run.local([SCALES])
    found = digests(run.checkout).items()
    return run, {name: digest for name, digest in found if name.startswith("results/tiny/")}


@pytest.fixture
def run(made: tuple[Pipeline, dict[str, str]]) -> Pipeline:
    """The pipeline without results."""
    made[0].empty()
    return made[0]


@pytest.fixture
def expected(made: tuple[Pipeline, dict[str, str]]) -> dict[str, str]:
    return made[1]


@pytest.fixture
def server(python: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "server.log", "wb") as log:
        running = subprocess.Popen([python, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    yield address
    running.kill()
    running.wait()


def keys(address: str) -> dict[str, str]:
    """What tells Snakemake of the server."""
    values = {"ENDPOINT_URL": address, "ACCESS_KEY": "a", "SECRET_KEY": "b"}
    return {f"SNAKEMAKE_STORAGE_S3_{name}": value for name, value in values.items()}


def contents(python: Path, address: str) -> dict[str, str]:
    """The digest of each object in the bucket."""
    listed = subprocess.run([python, "-c", LIST, address], capture_output=True, text=True, check=True)
    return dict(json.loads(listed.stdout))


@pytest.fixture
def cluster(python: Path, run: Pipeline, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with the volume `weights`; its image has the plugins already, so its pip installs nothing."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, command in {"python": f'exec {python} "$@"', "pip": 'echo pip "$@"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", programs, {"weights": run.checkout.parent / WEIGHTS}) as made:
        yield made


@pytest.mark.slow
def test_documents_in_a_bucket_have_the_bytes_of_a_local_run_and_are_up_to_date_afterwards(
    python: Path, run: Pipeline, expected: dict[str, str], server: str
) -> None:
    settings = keys(server)
    run.finish(run.start(*STORED, "--", SCALES, **settings))
    assert not (run.checkout / SCALES).exists()
    assert expected.keys() >= {SCALES, "results/tiny/model_manifest.json", PLAN}
    assert {name: digest for name, digest in contents(python, server).items() if name in expected} == expected
    assert "Nothing to be done" in run.finish(run.start(*STORED, "--dry-run", "--", SCALES, **settings))


@pytest.mark.slow
def test_pods_make_the_bytes_of_a_local_run_and_ask_for_what_the_rules_state_and_a_failed_one_says_why(
    python: Path, run: Pipeline, expected: dict[str, str], server: str, cluster: Cluster
) -> None:
    weights = run.checkout.parent / WEIGHTS
    words = ["--workflow-profile", "workflow/profiles/kubernetes", "--configfile", "config/tiny.yaml"]
    words += ["--default-storage-prefix", f"s3://{BUCKET}/folder", "--container-image", "IMAGE", "--max-threads", "1"]
    words += ["--kubernetes-persistent-volumes", f"weights:{weights}", "--envvars", "HF_TOKEN"]
    words += ["--seconds-between-status-checks", "1", "--retries", "0"]
    settings = {**keys(server), "KUBECONFIG": str(cluster.kubeconfig()), "HF_TOKEN": "hf_secret"}

    said = run.finish(run.start(*words, *ON_GPU, **settings), 1)
    *_, where, last = said.splitlines()
    assert where.startswith("calibrate_scales failed; its log: ") and "kubernetes-logs" in where
    assert last.startswith("error: no GPU that this build of torch")
    assert not cluster.pods and not cluster.secrets

    assert not (run.checkout / "results/tiny").exists()
    found = contents(python, server)
    planned = {name: digest for name, digest in expected.items() if "/scales_cpu." not in name}
    assert found.items() >= {f"folder/{name}": digest for name, digest in planned.items()}.items()
    assert PLAN in planned and not [name for name in found if "snakemake-workflow-sources" in name]
    assert "Nothing to be done" in run.finish(run.start("--dry-run", *words, "--", PLAN, **settings))

    small, _, planning, replaying = asked = [cluster.container(name)["resources"] for name in cluster.jobs]
    assert {one["requests"]["cpu"] for one in asked} == {"950m"}  # the plugin asks for 95 % of a thread
    assert small["requests"]["memory"] == "4000M" != planning["requests"]["memory"]
    assert replaying["requests"]["nvidia.com/gpu"] == replaying["limits"]["nvidia.com/gpu"] == "1"
    assert not any("limits" in one for one in asked[:3])
    assert "hf_secret" not in str(cluster.jobs) and str(run.checkout) not in str(cluster.jobs)
