"""The score store: each measured number is written to disk at once, under everything that the number depends on.

In: what the scores depend on, apart from the measured state. Out: a shelf, which holds those scores by key.

A shelf is one file of JSON lines. Its name is the first 24 digits of the digest of its context. So the same context
finds the same file in every later run, and another context never reads it. The first line is the context. Each other
line is a score, with a checksum over the context's digest, the key and the value. A line that was cut off, damaged or
edited is dropped alone.

Locks: a shelf is locked from its opening to its closing, because any process that opens a shelf measures. A second
process is refused, because waiting could take hours. Shelves do not lock one another. `ScoreStore.empty` locks a shelf
while it removes the file, so a shelf in use stays. On a file system without locks, two processes may append to one
shelf. Each line still has its checksum.
"""

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_quantize_model.files import (
    InputError,
    claimed,
    clear_leftovers,
    digest_of,
    named_errors,
    parse_json,
    require_file,
)

VERSION = 1  # of a shelf's lines; a shelf of another version has another name
NAME = re.compile(r"[0-9a-f]{24}\.jsonl")


class ScoreStore:
    """The shelves in one folder. They outlive the run that filled them; only `empty` removes them.

    Args:
        folder: made when the first shelf is opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shelf(self, of: dict[str, Any]) -> "Shelf":
        """Open the scores of a context, for a `with` statement.

        Args:
            of: everything that the scores depend on apart from their key; JSON-able, without NaN.

        Raises:
            InputError: another process holds the shelf, the file holds the scores of another context, or the disk
                refuses the file.
        """
        return Shelf(self.folder, of)

    def empty(self) -> tuple[int, int]:
        """Remove all shelves that no process holds: (files, bytes) that were removed.

        A file stays unless its name and its first line are those of a shelf.

        Raises:
            InputError: the disk refuses the removal.
        """
        files = size = 0
        with named_errors(self.folder):
            for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
                if not _is_shelf(path):
                    continue
                with contextlib.suppress(Held):
                    lock = _locked(path)
                    try:
                        files, size = files + 1, size + os.fstat(lock).st_size
                        path.unlink()
                    finally:
                        os.close(lock)
                    clear_leftovers(path)
            with contextlib.suppress(OSError):  # not empty, a link, or not there
                self.folder.rmdir()
        return files, size


class Shelf:
    """The scores of one context by key; a context manager that holds the lock.

    A key is text. The caller makes it from the state that was measured, such as the digest of an assignment.

    Attributes:
        path: the file.
        records: the scores.
        found: how many scores were there when the shelf was opened.
        dropped: how many lines were cut off, damaged or edited. Their scores are absent, and the next `add` rewrites
            the file without those lines.
    """

    def __init__(self, folder: Path, of: dict[str, Any]) -> None:
        self._digest = digest_of({"version": VERSION, "of": of})
        # Sorted, so that equal contexts have equal bytes. A score keeps its order of keys, which reports show.
        self._head = _line({"digest": self._digest, "version": VERSION, "of": of}, sort_keys=True)
        self.path = folder / f"{self._digest[:24]}.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        with named_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            require_file(self.path)
            self._file = _locked(self.path)
            try:
                if not os.fstat(self._file).st_size:
                    _write(self._file, self._head)
                self.dropped, self._whole = self._read()
            except BaseException:
                os.close(self._file)
                raise
        self.found = len(self.records)

    def _read(self) -> tuple[int, bool]:
        """Read the scores of the file; return how many lines do not count, and whether an appended line would count."""
        with open(self._file, "rb", closefd=False) as file:
            *lines, rest = file.read().split(b"\n")
        headed = lines[:1] == [self._head.rstrip()]
        if lines and not headed and (other := _context_digest(lines[0])):
            raise InputError(f"{self.path}: holds the scores of another context, {other[:24]}; move the file away")
        scores = [self._score(line) for line in lines[headed:] + [rest] * bool(rest)]
        self.records.update(score for score in scores if score)
        return scores.count(None), headed and not rest and None not in scores

    def _score(self, line: bytes) -> tuple[str, dict[str, Any]] | None:
        """Key and value of a line; None if its checksum does not fit them."""
        try:
            entry = parse_json(line.decode())
            key, value, checksum = entry["key"], entry["value"], entry["sha256"]
        except (ValueError, KeyError, TypeError):
            return None
        return (key, value) if checksum == self._checksum(key, value) else None

    def _checksum(self, key: str, value: dict[str, Any]) -> str:
        return digest_of([self._digest, key, value])

    def news(self) -> str:
        """What an earlier run left, in words; empty if it left nothing."""
        parts = [f"resuming with {self.found} scores of an earlier run"] * bool(self.found)
        if self.dropped:
            lines = "line" if self.dropped == 1 else "lines"
            parts.append(f"dropped {self.dropped} damaged {lines} of {self.path}, which will be measured again")
        return "; ".join(parts)

    def get(self, key: str) -> dict[str, Any] | None:
        """The score of a key, or None."""
        return self.records.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Put a score on disk; another score of the same key is replaced.

        Args:
            key: text that names the state.
            record: JSON-able.

        Raises:
            InputError: a number in the record is not finite, or the disk refuses the line. All earlier scores are kept.
        """
        try:
            value = json.loads(json.dumps(record, allow_nan=False))  # as a later run will read the record
        except ValueError:
            raise InputError(f"{key}: a number measured there is not finite ({record}); check the weights") from None
        line = self._line(key, value)
        if key in self.records and self._line(key, self.records[key]) == line:
            return
        with named_errors(self.path):
            # If the file was removed in the meantime, it is written again.
            append = self._whole and os.fstat(self._file).st_nlink
            self._whole = False  # until the line is on disk
            if append:
                _write(self._file, line)
            else:
                self._rewrite(self.records | {key: value})
        self._whole = True
        self.records[key] = value

    def _line(self, key: str, value: dict[str, Any]) -> bytes:
        return _line({"key": key, "value": value, "sha256": self._checksum(key, value)})

    def _rewrite(self, records: dict[str, dict[str, Any]]) -> None:
        """Replace the file, whole or not at all; the new file is locked before it takes the place of the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.path)
        temporary, new = claimed(self.path)
        try:
            with named_errors(self.path, temporary):
                _write(new, self._head + b"".join(self._line(*score) for score in records.items()))
                os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(new)
            raise
        os.close(self._file)
        self._file = new

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


class Held(InputError):
    """Another process holds the lock of a shelf."""


def _locked(path: Path) -> int:
    """The shelf at `path`, made if it is not there, open and locked.

    Raises:
        Held: another process holds the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise Held(f"{path}: another process is writing it; wait for it to end, or stop it") from None
        except OSError:  # a file system without locks
            return file
        # Between opening and locking, another process may have removed or replaced the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _write(file: int, data: bytes) -> None:
    """Write all of `data`, and wait until it is on disk."""
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _line(entry: dict[str, Any], sort_keys: bool = False) -> bytes:
    return json.dumps(entry, sort_keys=sort_keys, allow_nan=False).encode() + b"\n"


def _context_digest(line: bytes) -> str | None:
    """The digest of the context that a line names; None if the line is not the first line of a shelf."""
    try:
        head = parse_json(line.decode())
        digest = digest_of({"version": head["version"], "of": head["of"]})
        return digest if head["digest"] == digest else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_shelf(path: Path) -> bool:
    """Whether a file is a shelf, by its name and its first line; the file may be empty after a kill."""
    if not NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        line = file.readline()
    return not line or (_context_digest(line) or "").startswith(path.stem)
