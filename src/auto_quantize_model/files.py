"""Files in and out: hashes, atomic writes, canonical JSON, and the error for faults that the user can correct."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pwd
import re
import secrets
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

MARKER = ".auto-quantize-model.json"  # in a folder that `folders` wrote: the names and sha256 of its files
NEXT_STEPS = {
    errno.ENOSPC: "its disk is full; free some space, and run again",
    errno.EDQUOT: "your quota on its disk is used up; free some space, and run again",
    errno.EROFS: "its file system is read-only; name a place that can be written",
    errno.ENOENT: "no such file or folder; correct the path, or make it",
    errno.ENOTDIR: "a part of this path is a file, not a folder; correct the path",
    errno.EEXIST: "a file, where a folder is needed; move the file away, or name another path",
    errno.EISDIR: "a folder, where a file is needed; name a file",
    errno.ENAMETOOLONG: "the name is too long for its file system; choose a shorter one",
    errno.ELOOP: "its links form a circle; correct the links",
    errno.EBUSY: "in use, or the root of a mounted disk; name another path, such as a folder in it",
    errno.EFBIG: "too large for its file system; name a place on another disk",
    errno.EIO: "the disk reports an input/output error; check the disk, and run again",
    errno.ESTALE: "the file server changed the file in the meantime; run again",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n), and run again",
}


class InputError(Exception):
    """Something that the user gave is wrong. The message names the thing, the place and the next step."""


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of the file at `path`, as 64 hexadecimal digits; read in pieces, so any size fits in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(document: Any) -> str:
    """`document` as JSON text that is the same bytes for the same values.

    Raises:
        ValueError: the document holds NaN or infinity, which JSON cannot express.
    """
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return sha256_bytes(json.dumps(document, sort_keys=True, allow_nan=False).encode())


def explained(error: BaseException, path: Path | str | None = None) -> str | None:
    """One line with the file and the next step, for an error that a disk or its owner causes; None for other errors.

    Args:
        error: an OSError, or a library's error that hides an OSError, such as those of safetensors and torch.save.
        path: the file to name where the error names none.
    """
    number = error.errno if isinstance(error, OSError) else _hidden_errno(error)
    named = getattr(error, "filename", None) or path
    if number is None or named is None or isinstance(named, int):
        return None
    place = Path(os.fsdecode(named))
    if number in (errno.EACCES, errno.EPERM):
        return f"{place}: permission denied; {_who_may_help(place)}, or name another path"
    return f"{place}: {NEXT_STEPS[number]}" if number in NEXT_STEPS else None


def _hidden_errno(error: BaseException) -> int | None:
    """The system's error number, where a library gives the number only as text."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, tokenizers
        return int(found[1])
    # torch.save reports where its writing stopped, and not why.
    return errno.ENOSPC if "inline_container.cc" in str(error) and "unexpected pos" in str(error) else None


def _who_may_help(path: Path) -> str:
    """Advice on who may grant the right to open or write `path`: the owner of the part of the path that exists."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            owner = place.lstat().st_uid
            if owner == os.geteuid():
                return f"allow it (chmod u+rwX {place})"
            with contextlib.suppress(KeyError):
                return f"ask {pwd.getpwuid(owner).pw_name}, who owns {place}"
            return f"ask user {owner}, who owns {place}"
    return "ask its owner"


@contextmanager
def named_errors(path: Path, hidden: Path | None = None) -> Iterator[None]:
    """Turn an error of the disk into an InputError that names `path`, or the file that the error itself names.

    Args:
        path: the file or folder that is written or read.
        hidden: a temporary path that stands for `path` and that the user does not know.
    """
    try:
        yield
    except _errors_of_a_disk() as error:
        told = getattr(error, "filename", None)
        if isinstance(error, OSError) and isinstance(told, (str, Path)) and hidden:
            inner = Path(told).absolute()
            if inner.is_relative_to(hidden.absolute()):
                error.filename = str(path / inner.relative_to(hidden.absolute()))
        message = explained(error, path)
        if message is None:
            raise
        raise InputError(message) from None


def _errors_of_a_disk() -> tuple[type[Exception], ...]:
    """The errors that can hide an error of the disk. Planning has no safetensors, so this module does not import it."""
    loaded = sys.modules.get("safetensors")
    return (OSError, RuntimeError, *([loaded.SafetensorError] if loaded else []))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it into place on success, remove it on any exception.

    Leftovers that a killed process left of this output are removed first. The file's mode follows the umask. A link at
    `path` is replaced, and the file that the link points to stays unchanged.

    Raises:
        InputError: `path` is a folder or a device, or it cannot be written.
    """
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_file(path)
        clear_leftovers(path)
        temporary, lock = claimed(path)
    try:
        with named_errors(path, temporary):
            yield temporary
            temporary.chmod(stat.S_IMODE(os.fstat(lock).st_mode))  # safetensors writes files of mode 600
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def require_file(path: Path) -> None:
    """Refuse an output path at which a folder, a device or a pipe lies.

    Raises:
        InputError: one of these lies there.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, where a file is to be written; name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not an ordinary file, so it is not replaced; name another path")


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or in which no file can be made.

    Raises:
        InputError: the message names the part of the path that exists.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    with named_errors(there):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(folder))
        if not os.access(there, os.W_OK | os.X_OK):
            read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "", str(there))


def temporary_name(path: Path) -> Path:
    """A new name in the folder of `path` that marks its writer and its output; its length does not depend on `path`."""
    return path.with_name(f".auto-quantize-{_short_digest(path)}-{secrets.token_hex(4)}")


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of the output `path`; files whose lock a live process holds stay.

    Where a file system has no locks, as some network file systems, nothing is removed.
    """
    leftover = re.compile(rf"\.auto-quantize-{_short_digest(path)}-[0-9a-f]{{8}}")
    with contextlib.suppress(PermissionError):  # a folder may be writable and not readable
        _clear(path.parent, leftover)


def _clear(folder: Path, leftover: re.Pattern[str]) -> None:
    for found in list(folder.iterdir()):
        if leftover.fullmatch(found.name) and not found.is_symlink():
            with contextlib.suppress(OSError):  # another process removed it first, or it belongs to another user
                _remove_unless_held(found)


def _remove_unless_held(leftover: Path) -> None:
    if not leftover.is_dir():
        held = os.open(leftover, os.O_RDWR)
    elif (leftover / MARKER).exists():
        held = os.open(leftover / MARKER, os.O_RDWR)
    else:
        leftover.rmdir()  # its writer was killed before it wrote a file; a folder that is not empty stays
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    finally:
        os.close(held)


def claimed(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new temporary file or folder next to `path`, and an open file whose lock shows that the writer is alive."""
    try:
        return _claimed(path, folder)
    except OSError as error:
        error.filename = os.fspath(path)  # the user does not know the temporary name
        raise


def _claimed(path: Path, folder: bool) -> tuple[Path, int]:
    # Before the marker lies in the folder, another process may take the empty folder for a leftover.
    vanished = [FileNotFoundError] if folder else []
    while True:
        temporary = temporary_name(path)
        if folder:
            temporary.mkdir()
        with contextlib.suppress(*vanished):
            lock = os.open(temporary / MARKER if folder else temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks, where no process clears
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return temporary, lock
            os.close(lock)  # another process removed it as a leftover before it was locked


def _short_digest(path: Path) -> str:
    return sha256_bytes(os.fsencode(path.name))[:12]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path` as canonical JSON, whole or not at all."""
    write_text(path, canonical_json(document))


def parse_json(text: str, infinity: bool = False) -> Any:
    """The JSON value of a text.

    Args:
        text: the document.
        infinity: accept `Infinity`, which JSON does not have and which transformers writes into configs.

    Raises:
        ValueError: the text is not JSON, or holds NaN, infinity or a number too large for float64. Or the text repeats
            a key of an object, or has too many levels.
    """

    def constant(name: str) -> float:
        return float(name) if infinity and name != "NaN" else refuse(name)

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"{number} is not a JSON number")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} is there twice")
        return found

    try:
        return json.loads(text, parse_constant=constant, parse_float=finite, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """The JSON document at `path`.

    Raises:
        InputError: the file is missing, or `parse_json` refuses its text.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, where a JSON file is needed") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file") from None


def named_path(text: str, folder: Path) -> Path:
    """The path that a file in `folder` gives as `text`, relative to `folder`; `~/` is the home folder."""
    return folder / (os.path.expanduser(text) if text.startswith("~/") else text)


def shown(path: Path) -> str:
    """A path as printable text, even if its name is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def visible(folder: Path) -> list[Path]:
    """The entries below a folder at any depth, in order, without hidden entries and the entries of hidden folders."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [path for path in sorted(folder.rglob("*")) if not hidden(path)]


def require_endpoint(url: str | None) -> None:
    """Refuse a value of HF_ENDPOINT that no hub can have; with some values the import of huggingface_hub fails.

    Args:
        url: the value, None where the variable is not set.

    Raises:
        InputError: the URL has no http or https, no host, no valid port, a query, white space or control characters.
            The message does not show the URL, because the URL may hold a password.
    """
    if url is None:
        return
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # parsed when read
    except ValueError:
        ok = False
    if not ok or any(letter in r"?#\\" or letter.isspace() or not letter.isprintable() for letter in url):
        raise InputError(
            "HF_ENDPOINT: no valid URL; write http://host:port, and in a password %2F for / and %40 for @, or unset it"
        )
