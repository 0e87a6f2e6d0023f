"""The pipeline with its documents in an S3 bucket, as pods without shared files have it; here the server is local."""

import json
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

LIST = f"""
import boto3, hashlib, json, sys
keys = dict(aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")
found = boto3.resource("s3", endpoint_url=sys.argv[1], **keys).Bucket("{BUCKET}").objects.all()
print(json.dumps({{one.key: hashlib.sha256(one.get()["Body"].read()).hexdigest() for one in found}}))
"""


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


def keys(address: str) -> dict[str, str]:
    """What tells Snakemake of the server."""
    values = {"ENDPOINT_URL": address, "ACCESS_KEY": "a", "SECRET_KEY": "b"}
    return {f"SNAKEMAKE_STORAGE_S3_{name}": value for name, value in values.items()}


def contents(python: Path, address: str) -> dict[str, str]:
    """The digest of each object in the bucket."""
    listed = subprocess.run([python, "-c", LIST, address], capture_output=True, text=True, check=True)
    return dict(json.loads(listed.stdout))


@pytest.mark.slow
def test_documents_in_a_bucket_have_the_bytes_of_a_local_run_and_are_up_to_date_afterwards(
    python: Path, server: str, tmp_path: Path
) -> None:
    run = Pipeline(python, copied(tmp_path / "checkout"))
    run.local([SCALES])
    expected = digests(run.checkout)
    run.empty()
    settings = keys(server)
    run.finish(run.start(*STORED, "--", SCALES, **settings))
    assert not (run.checkout / SCALES).exists()
    wanted = {name: digest for name, digest in expected.items() if name.startswith("results/tiny/")}
    found = {name: digest for name, digest in contents(python, server).items() if name in wanted}
    assert found.keys() >= {SCALES, "results/tiny/model_manifest.json", "results/tiny/digits/plan.json"}
    assert found == wanted
    assert "Nothing to be done" in run.finish(run.start(*STORED, "--dry-run", "--", SCALES, **settings))
