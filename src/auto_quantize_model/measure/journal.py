"""The journal of a capture: each score on disk as soon as it is known, so that a killed run loses one op at most.

A file of JSON lines beside the output. The first line is the fingerprint of everything that a score depends on; each
other line is one record. It is no output of the workflow, so Snakemake leaves it alone; it goes when the output stands.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_quantize_model.files import InputError, digest_of, named_errors


class Journal:
    """The records of one capture by key; a context manager that holds the lock.

    Args:
        path: the journal's file.
        fingerprint: JSON-able; records made under another one are dropped.

    Attributes:
        found: number of records that an earlier run left.
        dropped: what was wrong with the journal that lay there, or empty.

    Raises:
        InputError: another process is writing it, or the disk refuses it.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        with named_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")  # noqa: SIM115  closed by __exit__
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise InputError(f"{path}: another capture is writing it; wait for it to end, or stop it") from None
        self.records, self.dropped = self._read(fingerprint)
        self.found = len(self.records)
        if not self.found:
            self._write({"fingerprint": digest_of(fingerprint), "of": fingerprint}, truncate=True)

    def _read(self, fingerprint: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The records that count, and why the others do not; a line that a kill cut off is removed from the file."""
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        whole, rest = lines[:-1], lines[-1]
        if not whole:
            return {}, ""
        try:
            head, *entries = map(json.loads, whole)
            records = {entry["key"]: entry["value"] for entry in entries}
            if head["fingerprint"] == digest_of(fingerprint):
                if rest:
                    self.file.truncate(self.file.tell() - len(rest))
                return records, ""
            before = dict(head["of"])
        except (ValueError, KeyError, TypeError):
            return {}, "the journal is damaged"
        changed = [key for key in {**before, **fingerprint} if before.get(key) != fingerprint.get(key)]
        return {}, f"{', '.join(changed)} changed"

    def news(self) -> str:
        """What became of the records of an earlier run, in words; empty without one."""
        if self.dropped:
            return f"starting over, {self.dropped} since the records of an earlier run"
        return f"going on from {self.found} records of an earlier run" if self.found else ""

    def add(self, key: str, value: Any) -> None:
        """Put a record on disk.

        Raises:
            InputError: a number of it is not finite, or the disk is full; the records before it are kept.
        """
        try:
            self._write({"key": key, "value": value})
        except ValueError:
            raise InputError(f"{key}: a number measured there is not finite ({value}); check the weights") from None
        self.records[key] = value

    def _write(self, entry: dict[str, Any], truncate: bool = False) -> None:
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with named_errors(self.path):
            if truncate:
                self.file.truncate(0)
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())

    def remove(self) -> None:
        """Delete the file; what it held stands in the output now."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the rest of a line that a full disk refused, which was said already
            self.file.close()
