"""Ways to damage a document, for tests and for the fuzz of every intermediate: no step may take any of them for good.

`DAMAGES` is {name: function}; each function changes the file at a path in place.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from auto_quantize_model.documents import HEAD, RULES, read_document, write_document

Damage = Callable[[Path], None]


def replaced_by(data: bytes) -> Damage:
    """The damage that puts `data` in place of the file."""

    def apply(path: Path) -> None:
        path.write_bytes(data)

    return apply


def edited(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The damage of an editor: `change` alters the parsed document, and the digest stays as it was."""

    def apply(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


def missing(path: Path) -> None:
    """Delete the file."""
    path.unlink()


def truncated(path: Path) -> None:
    """Cut the file in half."""
    os.truncate(path, path.stat().st_size // 2)


def folder(path: Path) -> None:
    """Put a folder in place of the file."""
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Put a named pipe in place of the file: a process that opens it waits without end."""
    path.unlink()
    os.mkfifo(path)


def body_alone(path: Path) -> None:
    """Remove the head, as in a file of an older version."""
    edited(lambda document: document.pop(HEAD))(path)


def other_kind(path: Path) -> None:
    """Put a whole document of another kind in place of this one."""
    document = read_document(path)
    kind = next(kind for kind in RULES if kind != document.kind)
    write_document(path, kind, document)


def first_key_removed(document: dict[str, Any]) -> None:
    """Remove the first entry of the body, or of the first object or list in it."""
    body = {key: value for key, value in document.items() if key != HEAD}
    inner = [value for value in body.values() if isinstance(value, dict | list) and value]
    if inner and isinstance(inner[0], list):
        inner[0].pop(0)
    elif inner:
        inner[0].pop(next(iter(inner[0])))
    else:
        document.pop(next(iter(body)))


def of_another_run(path: Path) -> None:
    """Put a whole document of the same kind and of another run in place of this one.

    A step that reads no other document of the run accepts it, because nothing shows that it is of another run.
    """
    document = read_document(path)
    beside = [path.parent / name for name in document.files]
    write_document(path, document.kind, {**document, "another_run": True}, files=beside)


DAMAGES: dict[str, Damage] = {
    "missing": missing,
    "empty": replaced_by(b""),
    "an empty object": replaced_by(b"{}\n"),
    "an empty list": replaced_by(b"[]\n"),
    "a list of objects": replaced_by(b'[{"model": "tiny"}]\n'),
    "a number": replaced_by(b"5\n"),
    "a text": replaced_by(b'"plan"\n'),
    "null": replaced_by(b"null\n"),
    "NaN": replaced_by(b'{"mse_value": NaN}\n'),
    "a number beyond float64": replaced_by(b'{"mse_value": 1e999}\n'),
    "no JSON": replaced_by(b"plan: yes\n"),
    "no UTF-8": replaced_by(b'{"model": "\xff\xfe"}\n'),
    "brackets without end": replaced_by(b"[" * 100_000),
    "another program's head": replaced_by(b'{"document": "plan"}\n'),
    "a head of other types": replaced_by(b'{"document": {"kind": [], "made_from": 1, "files": null, "digest": {}}}\n'),
    "an unknown kind": edited(lambda document: document[HEAD].update(kind="recipe")),
    "truncated": truncated,
    "a folder": folder,
    "a pipe": pipe,
    "another kind": other_kind,
    "the body alone": body_alone,
    "the head alone": edited(lambda document: [document.pop(key) for key in list(document) if key != HEAD]),
    "an entry removed": edited(first_key_removed),
    "an entry added": edited(lambda document: document.update(added=1)),
    "another origin": edited(lambda document: document[HEAD].update(made_from={"plan": "0" * 64})),
    "another digest": edited(lambda document: document[HEAD].update(digest="0" * 64)),
}
