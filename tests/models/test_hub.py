"""Downloads through a loopback hub: a failure is said clearly or recovers; nothing half-written counts as whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import Fault, Hub, serving, write_captions

from auto_quantize_model.data.batches import read_samples
from auto_quantize_model.documents import read_document, write_document
from auto_quantize_model.files import read_json
from auto_quantize_model.models.snapshot import build_manifest
from auto_quantize_model.records import ModelManifest, as_record, body_of

COMMIT = "6" * 40
REPO = "org/tiny"
# A process that imports the named modules once, and then forks for each call. Most of a call's time is imports, and
# Python's search for cycles at its end.
FORKS = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    code, sys.argv, environment, said = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    try:
        exec(code, {"__name__": "__main__"})
        ended = 0
    except SystemExit as end:
        ended = end.code
    if isinstance(ended, str):
        print(ended, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(ended, str) else ended or 0)
os._exit(0)
"""
ROOT = Path(__file__).parents[2]


@dataclass
class Forks:
    """Runs Python code in processes that have the modules of `server` loaded."""

    server: subprocess.Popen[str]
    folder: Path

    def __call__(self, code: str, argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        said = [self.folder / "stdout", self.folder / "stderr"]
        assert self.server.stdin and self.server.stdout
        print(json.dumps([code, argv, environment, list(map(str, said))]), file=self.server.stdin, flush=True)
        code_of_exit = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(argv, code_of_exit, *(path.read_text() for path in said))


@contextmanager
def forking(folder: Path, *modules: str, **environment: str) -> Iterator[Forks]:
    """A server of forks with modules loaded in an environment, until the block ends."""
    command, pipes = [sys.executable, "-c", FORKS, *modules], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, **pipes) as server:
        yield Forks(server, folder)


# huggingface_hub reads the hub's address from the environment when it is imported, so each download imports it.
DRIVER = """
import sys, time
from pathlib import Path
from auto_quantize_model.models import hub
time.sleep = lambda seconds: None  # huggingface_hub's own pauses between tries
from auto_quantize_model.files import InputError, sha256_file
{setup}
try:
    path = hub.fetch_snapshot(sys.argv[1], sys.argv[2])
    hub.check_against_hub(path, {{file.name: sha256_file(file) for file in path.iterdir()}})
except InputError as error:
    raise SystemExit(f"InputError: {{error}}")
print(path)
"""
WEIGHTS = "^GET /large/.*safetensors"


@dataclass
class Downloader:
    """Fetches from a hub into a cache of its own."""

    hub: Hub
    home: Path
    forks: Forks

    def __call__(
        self, revision: str = COMMIT, repo_id: str = REPO, setup: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": self.hub.address, "HF_HOME": str(self.home), **environment}
        return self.forks(DRIVER.format(setup=setup), ["-c", repo_id, revision], **settings)

    def succeeds(self, **options: str) -> Path:
        ended = self(**options)
        assert ended.returncode == 0, ended.stderr
        return Path(ended.stdout.strip())

    def fails(self, **options: str) -> str:
        ended = self(**options)
        assert ended.returncode == 1 and "InputError: " in ended.stderr, ended.stderr
        return ended.stderr.split("InputError: ")[1]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes with all libraries loaded that huggingface_hub imports, and without huggingface_hub."""
    libraries = ("auto_quantize_model.files", "httpx2", "httpcore2", "tqdm.auto", "yaml", "filelock")
    with forking(tmp_path_factory.mktemp("downloads"), *libraries) as forks:
        yield forks


@pytest.fixture
def download(downloads: Forks, tiny_snapshot: Path, tmp_path: Path) -> Iterator[Downloader]:
    with serving() as hub:
        hub.repositories[("model", REPO, COMMIT)] = tiny_snapshot
        hub.branches["main"] = COMMIT
        yield Downloader(hub, tmp_path / "home", downloads)


def test_a_snapshot_arrives_whole_and_only_what_is_read(download: Downloader, tiny_snapshot: Path) -> None:
    (tiny_snapshot / "pytorch_model.bin").write_bytes(b"a pickle")
    try:
        path = download.succeeds(HF_TOKEN="hf_secret")
    finally:
        (tiny_snapshot / "pytorch_model.bin").unlink()
    assert {file.name for file in path.iterdir()} == {file.name for file in tiny_snapshot.iterdir()}
    assert all((path / file.name).read_bytes() == file.read_bytes() for file in tiny_snapshot.iterdir())
    asked = dict(zip(download.hub.requests, download.hub.tokens, strict=True))
    assert asked[f"HEAD /{REPO}/resolve/{COMMIT}/config.json"] == "Bearer hf_secret"
    # The storage that large files are redirected to is another host, which must not see the token.
    assert {token for request, token in asked.items() if request.startswith("GET /large/")} == {""}


def test_a_cached_snapshot_is_used_again_without_a_download(download: Downloader) -> None:
    path = download.succeeds()
    download.hub.requests.clear()
    assert download.succeeds() == path
    assert not [request for request in download.hub.requests if "resolve" in request or "large" in request]


def test_offline_mode_takes_the_cache_and_asks_nobody(download: Downloader) -> None:
    path = download.succeeds()
    download.hub.requests.clear()
    assert download.succeeds(HF_HUB_OFFLINE="1") == path
    assert download.hub.requests == []


def test_offline_mode_without_a_cache(download: Downloader) -> None:
    assert "HF_HUB_OFFLINE is set and the cache" in download.fails(HF_HUB_OFFLINE="1")


def test_offline_mode_with_half_a_cache(download: Downloader) -> None:
    download.hub.faults.append(Fault(WEIGHTS, status=403))
    download.fails()
    assert "does not hold all of it" in download.fails(HF_HUB_OFFLINE="1")


def test_a_cut_connection_is_resumed_where_it_ended(download: Downloader, tiny_snapshot: Path) -> None:
    download.hub.faults.append(Fault(WEIGHTS, times=1, cut_after=10_000))
    # A piece is written when it is whole; at their usual 10 MB this file would be one.
    path = download.succeeds(setup="hub.constants.DOWNLOAD_CHUNK_SIZE = 1000")
    assert [wanted for wanted in download.hub.ranges if 9_000 <= int(wanted[6:].split("-")[0]) <= 10_000]
    assert (path / "model.safetensors").read_bytes() == (tiny_snapshot / "model.safetensors").read_bytes()


def test_a_connection_that_is_always_cut_leaves_nothing_that_counts_as_whole(download: Downloader) -> None:
    download.hub.faults.append(Fault(WEIGHTS, cut_after=0))
    setup = "hub.PAUSES = ()"
    assert "run again" in download.fails(setup=setup)
    assert "does not hold all of it" in download.fails(HF_HUB_OFFLINE="1")
    download.hub.faults.clear()
    download.succeeds()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"0"], ids=["shorter", "longer"])
def test_a_wrong_size_is_refused(download: Downloader, tiny_snapshot: Path, change: Callable[[bytes], bytes]) -> None:
    data = (tiny_snapshot / "model.safetensors").read_bytes()
    download.hub.faults.append(Fault(WEIGHTS, body=change(data)))
    download.fails(setup="hub.PAUSES = ()")
    assert "does not hold all of it" in download.fails(HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("name", "pattern"), [("model.safetensors", WEIGHTS), ("config.json", "^GET .*/resolve/.*/config.json")]
)
def test_a_wrong_hash_is_refused_and_the_file_fetched_anew(
    download: Downloader, tiny_snapshot: Path, name: str, pattern: str
) -> None:
    data = (tiny_snapshot / name).read_bytes()
    download.hub.faults.append(Fault(pattern, times=1, body=data[:-1] + bytes([data[-1] ^ 1])))
    assert f"{name}: its hash is" in download.fails()
    path = download.succeeds()
    assert (path / name).read_bytes() == data


def test_an_unknown_repository_and_an_unknown_revision(download: Downloader) -> None:
    assert "org/none at 666666666666: not found, or not yours to see (401)" in download.fails(repo_id="org/none")
    assert "the repository has no such revision" in download.fails(revision="7" * 40)
    assert "owner/name" in download.fails(repo_id="a/b/c")


def test_a_gated_repository(download: Downloader) -> None:
    download.hub.faults.append(Fault("/api/models/org/tiny", status=403, headers={"X-Error-Code": "GatedRepo"}))
    assert "gated; accept its licence" in download.fails()


def test_a_moving_revision_is_refused_with_the_commit_that_it_is_now(download: Downloader) -> None:
    assert f"'main' can move; pin the commit to which it points now: {COMMIT}" in download.fails(revision="main")
    assert "not a commit of 40 hexadecimal digits" in download.fails(revision="main", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"Retry-After": "0"}), (500, {}), (503, {})], ids=["429", "500", "503"]
)
@pytest.mark.parametrize("pattern", ["/api/models/.*/tree", "^HEAD .*/config.json", WEIGHTS])
def test_a_busy_hub_is_asked_again(download: Downloader, pattern: str, status: int, headers: dict[str, str]) -> None:
    download.hub.faults.append(Fault(pattern, times=2, status=status, headers=headers))
    download.succeeds(setup="hub.PAUSES = (0.0, 0.0, 0.0)")


def test_a_hub_that_stays_broken(download: Downloader) -> None:
    download.hub.faults.append(Fault("/api/models/.*/tree", status=503))
    assert "503" in download.fails(setup="hub.PAUSES = ()")


def test_a_hub_that_cannot_be_reached(download: Downloader) -> None:
    assert "http://127.0.0.1:9 cannot be reached" in download.fails(HF_ENDPOINT="http://127.0.0.1:9")


def with_password(address: str) -> str:
    return address.replace("://", "://user:pass-word@")


def test_no_error_of_the_hub_shows_a_password(download: Downloader) -> None:
    unreachable = download.fails(HF_ENDPOINT=with_password("http://127.0.0.1:9"))
    assert "http://***@127.0.0.1:9 cannot be reached" in unreachable and "pass-word" not in unreachable
    download.hub.faults.append(Fault("/api/models/.*/tree", status=503))
    broken = download.fails(setup="hub.PAUSES = ()", HF_ENDPOINT=with_password(download.hub.address))
    assert "503" in broken and "pass-word" not in broken
    assert "pass-word" not in download.fails(repo_id="https://user:pass-word@127.0.0.1:9/org/tiny")


@pytest.fixture
def small_disk(download: Downloader) -> Iterator[Downloader]:
    """A cache on a disk of 256 KiB, where this machine lets a test mount one."""
    download.home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(download.home)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield download
    subprocess.run(["umount", str(download.home)], check=True)


def test_too_small_a_disk_is_seen_before_the_download(small_disk: Downloader) -> None:
    assert "GB to fetch, and the disk of" in small_disk.fails()
    assert not [request for request in small_disk.hub.requests if request.startswith("GET /large")]


def test_a_disk_that_fills_up_on_the_way(small_disk: Downloader) -> None:
    message = small_disk.fails(setup="hub._require_disk = lambda *args: None")
    assert "is full; free some space" in message
    assert "does not hold all of it" in small_disk.fails(HF_HUB_OFFLINE="1")


# datasets waits five seconds so that its threads end before Python does. A fork ends at once, whatever its threads do.
SCRIPT = """
import runpy, sys
from datasets import config
config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Scripts:
    """Runs scripts with their libraries loaded, on a hub of their own."""

    hub: Hub
    forks: Forks


@pytest.fixture(scope="module")
def scripts(tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """The hub's address has a password, and huggingface_hub logs each request (HF_DEBUG)."""
    folder = tmp_path_factory.mktemp("scripts")
    with serving() as hub:
        hub.repositories[("model", REPO, COMMIT)] = tiny_snapshot
        environment = {"HF_ENDPOINT": with_password(hub.address), "HF_HOME": str(folder / "home"), "HF_DEBUG": "1"}
        with forking(folder, "auto_quantize_model.commands.loaded", HF_TOKEN="opaque-token", **environment) as forks:
            yield Scripts(hub, forks)


def get_model(scripts: Scripts, path: Path, manifest: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script of the model rule."""
    words = ["scripts/get_model.py", "--name", "tiny", "--source", "hub", "--repo-id", REPO, "--revision", COMMIT]
    return scripts.forks(SCRIPT, [*words, "--path", str(path), "--manifest", str(manifest), *options])


def test_no_log_of_a_script_shows_a_password_or_a_token(scripts: Scripts, tmp_path: Path) -> None:
    """With HF_DEBUG huggingface_hub logs each request; the log also holds the traceback of an unexpected error."""
    log = tmp_path / "get_model.log"
    ended = get_model(scripts, tmp_path / "model", Path("/proc/nowhere/manifest.json"), "--log", str(log))
    assert ended.returncode != 0
    everything = ended.stdout + ended.stderr + log.read_text()
    assert scripts.hub.address.replace("://", "://***@") in everything
    assert "pass-word" not in everything and "opaque-token" not in everything


def test_a_later_run_of_the_model_rule_verifies_the_manifest(scripts: Scripts, tmp_path: Path) -> None:
    """The script as the rule calls it: manifest with the hub's commit, a sha256 per file, through a link."""
    link, manifest = tmp_path / "models" / "tiny", tmp_path / "manifest.json"
    ended = get_model(scripts, link, manifest)
    assert ended.returncode == 0, ended.stderr
    written = json.loads(manifest.read_text())
    assert written["details"] == {"hub": {"repo_id": REPO, "commit": COMMIT}}
    assert written["path"] == str(link) and link.is_symlink()

    from auto_quantize_model.files import InputError
    from auto_quantize_model.models.snapshot import verify_manifest

    recorded = as_record(ModelManifest, read_document(manifest, "model_manifest"))
    assert verify_manifest(recorded) == link
    (link / "config.json").resolve().write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: differs from the sha256"):
        verify_manifest(recorded)


COLUMNS = {"id": "question_id", "image": "image", "prompt": "question", "answer": "answer"}
DATASET = "5" * 40


@dataclass
class Calibrator:
    """Extracts a calibration set from a hub by the rule's own script."""

    hub: Hub
    folder: Path
    model: Path
    scripts: Forks

    def __call__(self, setup: str = "", **changes: Any) -> subprocess.CompletedProcess[str]:
        """Run the script for the usual set with `changes`, after the code `setup`."""
        spec = {"name": "captions", "source": "hub", "repo_id": "org/captions", "revision": DATASET, "split": "val"}
        spec |= {"columns": COLUMNS, "num_samples": 2, "num_heldout": 1, "seed": 0, "batch_size": 1}
        spec |= {"min_pixels": 3136, "max_pixels": 3136, "max_tokens": 512} | changes
        manifest = self.folder / "model.json"
        write_document(manifest, "model_manifest", body_of(build_manifest(self.model, "tiny", "local", {})))
        words = ["scripts/extract_calibration.py", "--manifest", str(manifest)]
        words += ["--spec", json.dumps(spec), "--calibration-set", str(self.folder / "calibration.parquet")]
        words += ["--heldout-set", str(self.folder / "heldout.parquet")]
        words += ["--calibration-manifest", str(self.folder / "calibration.json")]
        return self.scripts(setup + SCRIPT, words)

    def succeeds(self, **changes: Any) -> dict[str, Any]:
        ended = self(**changes)
        assert ended.returncode == 0, ended.stderr
        return read_json(self.folder / "calibration.json")

    def fails(self, setup: str = "", **changes: Any) -> str:
        ended = self(setup, **changes)
        assert ended.returncode == 2, ended.stderr
        assert not (self.folder / "calibration.json").exists()
        return ended.stderr


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions"))


@pytest.fixture
def calibrate(captions: Path, tiny_snapshot: Path, scripts: Scripts, tmp_path: Path) -> Calibrator:
    scripts.hub.repositories[("dataset", "org/captions", DATASET)] = captions
    return Calibrator(scripts.hub, tmp_path, tiny_snapshot, scripts.forks)


def test_a_streamed_set_is_drawn_by_the_seed_and_stored_with_its_images(calibrate: Calibrator) -> None:
    first, other = calibrate.succeeds(), calibrate.succeeds(seed=1)
    manifest = calibrate.succeeds()
    assert manifest == first
    assert manifest["digest"] != other["digest"]
    drawn = manifest["samples"]["calibration"] + manifest["samples"]["heldout"]
    assert len({sample["id"] for sample in drawn}) == 3
    assert all(sample["image_tokens"] > 0 for sample in drawn)
    assert manifest["details"] == {
        "hub": {"repo_id": "org/captions", "commit": DATASET, "split": "val", "columns": COLUMNS}
    }
    stored = read_samples(calibrate.folder / "calibration.parquet")
    assert [item.sample.id for item in stored] == [sample["id"] for sample in manifest["samples"]["calibration"]]
    sample = stored[0].sample
    part, number = sample.id[4:5], sample.id[5:7]
    assert (sample.prompt, sample.answer) == ("What is this?", f"noise {part} {int(number)}")
    assert bool(sample.images) and sample.images[0].size == (56, 28)


def test_only_the_rows_that_are_needed_are_fetched(calibrate: Calibrator, tmp_path: Path) -> None:
    """The draw takes row groups from a random place; most of a data set never leaves the hub."""
    calibrate.hub.repositories[("dataset", "org/large", DATASET)] = write_captions(tmp_path / "large", 1)
    calibrate.hub.ranges.clear()
    calibrate.succeeds(repo_id="org/large", num_samples=1, num_heldout=0)
    reads = [wanted.removeprefix("bytes=").split("-") for wanted in calibrate.hub.ranges]
    # Readers ask for everything from a place on, and hang up when they have what they want: places tell them apart.
    groups = {first for first, _ in reads}
    assert 1 < len(groups) < 50
    assert read_samples(calibrate.folder / "heldout.parquet") == []


def test_captions_alone_make_a_set_of_text(calibrate: Calibrator) -> None:
    manifest = calibrate.succeeds(columns={"id": None, "image": None, "prompt": "answer", "answer": None})
    assert manifest["text_only"]
    (first, _) = read_samples(calibrate.folder / "calibration.parquet")
    sample = first.sample
    assert sample.prompt.startswith("noise ") and not sample.images and sample.answer is None


def test_the_configs_prompt_is_asked_where_there_is_no_column_of_prompts(calibrate: Calibrator) -> None:
    calibrate.succeeds(columns=COLUMNS | {"prompt": None}, prompt="What do you see?")
    assert {item.sample.prompt for item in read_samples(calibrate.folder / "calibration.parquet")} == {
        "What do you see?"
    }


def test_data_sets_that_cannot_be_drawn_from(calibrate: Calibrator) -> None:
    calibrate.hub.branches["main"] = DATASET
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": "test"}, "split test cannot be read"),
        ({"revision": "7" * 40}, "the repository has no such revision"),
        ({"revision": "main"}, f"can move; pin the commit to which it points now: {DATASET}"),
        ({"repo_id": "org/none"}, "calibration org/none at 555555555555: not found, or not yours to see"),
        ({"num_samples": 90, "num_heldout": 20}, "10 samples left for the heldout split, 20 asked"),
        ({"columns": COLUMNS | {"image": "answer"}}, "split val cannot be read"),
        (
            {"columns": COLUMNS | {"answer": "caption"}},
            "no column 'caption' (calibration.columns.answer); there are question_id, image, question, answer",
        ),
    ]
    for changes, expected in cases:
        assert expected in calibrate.fails(**changes)


def test_streaming_is_refused_offline(calibrate: Calibrator) -> None:
    offline = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True\n"
    assert "HF_HUB_OFFLINE is set and samples are streamed" in calibrate.fails(offline)
