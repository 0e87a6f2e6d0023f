"""Folders that are written whole or not at all, and that never replace files of the user.

A folder that this module writes holds a marker, which lists the folder's files with their sha256. Only such a folder is
replaced, and only while all its files are as they were written.
"""

import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from auto_quantize_model.files import (
    MARKER,
    InputError,
    canonical_json,
    claimed,
    clear_leftovers,
    named_errors,
    sha256_file,
    temporary_name,
    visible,
)

SCORES = Path("results/scores")  # the score store of a checkout
SCORES_PLACE = "PIPELINE_SCORES"  # the environment variable with another place, which the workflow sets by its config
MOVE_AWAY = "name another folder, or move what is yours out of it"
SNAKEMAKES = ".snakemake_timestamp"  # Snakemake's own file in a folder that is an output; older exports have one


@contextmanager
def atomic_folder(path: Path, advice: str = MOVE_AWAY, beside: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; move it into place on success, remove it on any exception.

    Only an empty folder, or one that this function wrote and nobody changed since, is replaced: `MARKER` in it lists
    its files with their sha256. File modes follow the umask, whatever the libraries set that write into the folder.

    Args:
        path: the folder to write.
        advice: what the user can do where `path` may not be replaced.
        `beside`: names of files in `path` that the caller writes later, and that may be removed with the old folder.

    Raises:
        InputError: files of the user lie at `path`, or `path` cannot be written.
    """
    require_own_folder(path, advice, beside)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        temporary, lock = claimed(path, folder=True)
    try:
        with named_errors(path, temporary):
            yield temporary
            _finish_folder(temporary, lock)
            require_own_folder(path, advice, beside)  # hours may have passed
            _swap_folders(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def require_own_folder(path: Path, advice: str = MOVE_AWAY, beside: Collection[str] = ()) -> None:
    """Refuse a folder that `atomic_folder` may not replace. Callers also call this function before long work.

    Raises:
        InputError: the path is a link, a file, the current folder or a folder above it. Or the folder holds an empty
            folder, or a file that `atomic_folder` did not write or that was changed since.
    """
    with named_errors(path):
        if path.is_symlink():
            raise InputError(f"{path}: a link to {os.readlink(path)}, and a folder does not replace a link; {advice}")
        if not path.exists():
            return
        if not path.is_dir():
            raise InputError(f"{path}: a file lies there, and a folder does not replace a file; {advice}")
        if Path.cwd().is_relative_to(path.resolve()):
            raise InputError(f"{path}: the current folder lies in it, so it is not replaced; {advice}")
        written = _files_of_marker(path)
        for place, folders, files in os.walk(path):
            if Path(place) != path and not folders and not files:
                name = Path(place).relative_to(path).as_posix()
                raise InputError(
                    f"{path}: the folder is not replaced, because the empty folder {name} in it was not written by this"
                    f" tool; {advice}"
                )
        for inner in files_in(path):
            name = inner.relative_to(path).as_posix()
            if name in {MARKER, SNAKEMAKES, *beside}:
                continue
            if inner.is_symlink() or not inner.is_file() or written.get(name) != sha256_file(inner):
                what = "was changed since it was written" if name in written else "was not written by this tool"
                raise InputError(f"{path}: the folder is not replaced, because {name} in it {what}; {advice}")


def require_unchanged(path: Path, advice: str) -> None:
    """Refuse a folder whose visible files differ from those that `atomic_folder` wrote.

    Args:
        path: the folder; its marker lists the files with their sha256.
        advice: what the user can do.

    Raises:
        InputError: the folder or its marker is missing, or a file is missing, added or changed.
    """
    with named_errors(path):
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; {advice}")
        written = _files_of_marker(path)
        if not written:
            raise InputError(f"{path}: the folder has no list of its files ({MARKER}); {advice}")
        found = {file.relative_to(path).as_posix() for file in visible(path) if not file.is_dir()}
        for name in sorted(written.keys() | found):
            file = path / name
            if name not in written:
                raise InputError(f"{file}: {MARKER} does not list this file; {advice}")
            if not file.is_file():
                raise InputError(f"{file}: missing, and {MARKER} lists this file; {advice}")
            if sha256_file(file) != written[name]:
                raise InputError(f"{file}: differs from the sha256 in {MARKER}; {advice}")


def files_in(folder: Path) -> Iterator[Path]:
    """All files and links below a folder, at any depth; an unreadable folder raises an error and is not skipped."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in sorted(files + links))


def _files_of_marker(folder: Path) -> dict[str, str]:
    """{name: sha256} of the files that `atomic_folder` wrote into a folder; empty where it wrote none."""
    if not (folder / MARKER).is_file():  # reading a pipe of that name would never end
        return {}
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _finish_folder(folder: Path, marker: int) -> None:
    """Give each file the mode that a plain open() gives, and list the files in the marker, open as `marker`."""
    files = sorted(inner for inner in files_in(folder) if inner != folder / MARKER)
    for file in files:
        file.chmod(stat.S_IMODE(os.fstat(marker).st_mode))
    listed = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
    with open(marker, "w", encoding="utf-8", closefd=False) as opened:
        opened.write(canonical_json({"written_by": "auto-quantize-model", "files": listed}))


def _swap_folders(new: Path, path: Path) -> None:
    """Put `new` at `path`. An old folder is removed after `new` is in place, and restored if `new` cannot be moved."""
    old = temporary_name(path)
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
