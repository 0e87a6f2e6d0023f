"""The pipeline with its documents in an S3 bucket, as pods without shared files have it; here the server is local."""

import hashlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import digests
from slurm import SCALES, Pipeline, copied, environment

BUCKET = "runs"
STORED = ["--cores", "1", "--configfile", "config/tiny.yaml", "--shared-fs-usage", "none"]
STORED += ["--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return environment(tmp_path_factory.mktemp("python") / "venv", "s3.lock", "s3_server.lock")
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot install envs/s3.lock and envs/s3_server.lock here")


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


@pytest.mark.slow
def test_documents_in_a_bucket_have_the_bytes_of_a_local_run_and_are_up_to_date_afterwards(
    python: Path, server: str, tmp_path: Path
) -> None:
    run = Pipeline(python, copied(tmp_path / "checkout"))
    run.local([SCALES])
    expected = digests(run.checkout)
    run.empty()
    settings = {
        "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": server,
        "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "a",
        "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "b",
    }
    run.finish(run.start(*STORED, "--", SCALES, **settings))
    assert not (run.checkout / SCALES).exists()
    found = {}
    for name in expected:
        if name.startswith("results/tiny/"):
            with urllib.request.urlopen(f"{server}/{BUCKET}/{name}") as answer:
                found[name] = hashlib.sha256(answer.read()).hexdigest()
    assert found.keys() >= {SCALES, "results/tiny/model_manifest.json", "results/tiny/digits/plan.json"}
    assert found.items() <= expected.items()
    assert "Nothing to be done" in run.finish(run.start(*STORED, "--dry-run", "--", SCALES, **settings))
