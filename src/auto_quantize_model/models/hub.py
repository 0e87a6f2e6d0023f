"""The Hugging Face hub: a snapshot at a fixed commit, in the hub's own cache, checked against the hub's hashes.

In: a repository and a commit. Out: a directory of links into the cache that other tools share. `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` have their usual meaning.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from auto_quantize_model.escape import redacted
from auto_quantize_model.files import InputError, require_endpoint

Result = TypeVar("Result")
# The files that a snapshot needs. Pickled weights and code are not fetched.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
PAUSES = (1.0, 5.0, 20.0, 60.0)  # seconds between tries, if the hub does not name a time
TRANSIENT = {408, 429, 500, 502, 503, 504}
MARGIN_BYTES = 1 << 30  # that stay free on the disk


def fetch_snapshot(repo_id: str, revision: str, bar: Any = None) -> Path:
    """The directory, in the hub's cache, of a repository at a commit; files that are already there are not fetched.

    Args:
        repo_id: `owner/name`.
        revision: the 40 digits of a commit.
        bar: a tqdm class for the progress bars.

    Raises:
        InputError: the revision can move, is unknown or cannot be reached, or access is refused. Or the disk is too
            small, or the hub sent another size than it announced.
    """
    with explained("model", repo_id, revision):
        require_commit("model", repo_id, revision)
        wanted: dict[str, Any] = {"revision": revision, "allow_patterns": PATTERNS}
        if not constants.HF_HUB_OFFLINE:
            _require_disk(repo_id, wanted)
        return Path(with_retries(lambda: snapshot_download(repo_id, tqdm_class=bar, **wanted)))


def require_commit(kind: str, repo_id: str, revision: str) -> None:
    """Refuse a revision that can move, such as a branch or a tag.

    Args:
        kind: `model` or `dataset`.
        repo_id: `owner/name`.
        revision: what the config gives.

    Raises:
        InputError: the message names the commit to which the revision points now, to be written into the config.
    """
    if re.fullmatch("[0-9a-f]{40}", revision):
        return
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{repo_id}: revision {revision!r} is not a commit of 40 hexadecimal digits; write one")
    raise InputError(
        f"{repo_id}: revision {revision!r} can move; pin the commit to which it points now: "
        f"{commit_of(kind, repo_id, revision)}"
    )


def commit_of(kind: str, repo_id: str, revision: str) -> str:
    """The commit to which a revision points now. Asking for it shows early whether repository and revision exist."""
    return str(with_retries(lambda: HfApi().repo_info(repo_id, repo_type=kind, revision=revision)).sha)


def _require_disk(repo_id: str, wanted: dict[str, Any]) -> None:
    """Compare the size of the files to fetch with the free space of the cache's disk.

    Raises:
        InputError: the space is too small.
    """
    try:
        files: Any = with_retries(lambda: snapshot_download(repo_id, dry_run=True, **wanted))
    except DryRunError:
        return  # the hub cannot be reached: a cached snapshot may be enough, or the download itself gives the reason
    missing = sum(file.file_size for file in files if file.will_download)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if missing and missing + MARGIN_BYTES > free:
        raise InputError(
            f"{repo_id}: {missing / 1e9:.2f} GB to fetch, and the disk of {constants.HF_HUB_CACHE} has"
            f" {free / 1e9:.2f} GB free (1 GB stays free). Free some, or set HF_HOME to a folder on another disk"
        )


def with_retries(work: Callable[[], Result]) -> Result:
    """`work()`, tried again while the hub is busy or out of reach, after the pause that the hub asks for.

    A new try resumes the download: the bytes that have arrived stay in the cache, marked incomplete.
    """
    for pause in PAUSES:
        try:
            return work()
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, DryRunError) as error:
            cause = error if isinstance(error, (HfHubHTTPError, httpx2.TransportError)) else error.__cause__
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            if response is None:
                # A refused connection does not mean a busy hub: it stays refused.
                if not isinstance(cause, httpx2.TransportError) or isinstance(cause, httpx2.ConnectError):
                    raise
            elif response.status_code not in TRANSIENT:
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(float(asked), 300.0) if asked.isdigit() else pause)
    return work()


def check_against_hub(directory: Path, sha256: dict[str, str]) -> None:
    """Compare the files of a cached snapshot with the hub's own hashes, which are the names of files in the cache.

    A file is a link to a blob. The blob's name is its sha256 (large files) or git's sha1. A file that differs is
    removed from the cache, so the next run fetches it again. A link that leads out of the cache stays.

    Args:
        directory: as `fetch_snapshot` returned it.
        sha256: of each file, by its name in the snapshot.

    Raises:
        InputError: the message names the file.
    """
    blobs = (directory.resolve().parents[1] / "blobs").resolve()
    for name, found in sha256.items():
        path = directory / name
        if not path.is_symlink():
            continue  # a cache without links, as some file systems need: there the hash is not known
        if path.resolve().parent != blobs:
            continue  # not a link of the hub
        expected = Path(os.readlink(path)).name
        if len(expected) == 40:
            found = _git_sha1(path)
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected) and found != expected:
            path.resolve().unlink()
            path.unlink()
            raise InputError(
                f"{name}: its hash is {found[:12]}..., the hub names {expected[:12]}...; it was removed from the cache:"
                " run again to fetch it once more"
            )


def _git_sha1(path: Path) -> str:
    """Git's name for a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def link_snapshot(snapshot: Path, path: Path) -> None:
    """Make `path` a link to a snapshot in the cache, so that manifests do not name a folder of one machine.

    Raises:
        InputError: something other than such a link lies at `path`.
    """
    require_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(snapshot.resolve(), target_is_directory=True)


def require_link(path: Path) -> None:
    """Refuse a place for `link_snapshot` that is not free. Callers also call this function before the download.

    Raises:
        InputError: something other than a link into the cache lies at `path`.
    """
    if path.is_symlink():
        # If a cache was moved or emptied, its link leads nowhere, so the form of the link's target decides.
        if not re.search(r"/models--[^/]+/snapshots/[0-9a-f]{40}/?$", os.readlink(path)):
            raise InputError(
                f"model.path: {path} is a link to {os.readlink(path)}, which is not in the hub's cache. Set"
                " model.source: local to take the link's target, or name another model.path"
            )
    elif path.exists():
        raise InputError(
            f"model.path: {path} exists and is not a link to the hub's cache. Set model.source: local to take it as it"
            " is, name another model.path, or move it away"
        )


@contextmanager
def explained(kind: str, repo_id: str, revision: str) -> Iterator[None]:
    """Turn the hub's errors into errors that name the repository and the next step.

    Args:
        kind: the block of the config, `model` or `calibration`.
        repo_id: `owner/name`.
        revision: its commit.

    Raises:
        InputError: in place of the hub's errors, or because HF_ENDPOINT is not the URL of a hub.
    """
    require_endpoint(os.environ.get("HF_ENDPOINT"))
    place, endpoint = redacted(f"{kind} {repo_id} at {revision[:12]}"), redacted(constants.ENDPOINT)
    again = "run again to resume" if kind == "model" else "run again"
    try:
        yield
    except GatedRepoError:
        raise InputError(
            f"{place}: gated; accept its licence on the hub, and set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{place}: not found, or not yours to see (401); check repo_id, and HF_TOKEN if it is private"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{place}: the repository has no such revision; check revision") from None
    except HFValidationError as error:
        raise InputError(f"{place}: {redacted(str(error))}; write repo_id as owner/name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            cache = f"the cache ({constants.HF_HUB_CACHE}) does not hold all of it"
            lacking = cache if kind == "model" else "samples are streamed"
            raise InputError(f"{place}: HF_HUB_OFFLINE is set and {lacking}; unset it once to fetch it") from None
        raise InputError(f"{place}: {endpoint} cannot be reached ({_innermost(error)}); run again") from None
    except (HfHubHTTPError, EntryNotFoundError, httpx2.TransportError) as error:
        raise InputError(f"{place}: {endpoint} answered with an error ({_innermost(error)}); {again}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{place}: the disk of {constants.HF_HUB_CACHE} is full; free some space or set HF_HOME to a folder on"
                f" another disk, and {again}"
            ) from None
        raise InputError(f"{place}: {redacted(str(error))}; {again}") from None


def _innermost(error: BaseException) -> str:
    """The first line of the original error, without secrets."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return redacted(f"{type(error).__name__}: {lines[0] if lines else ''}")
