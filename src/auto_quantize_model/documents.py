"""Documents: the JSON files that one step hands to the next. Each has a head that says where the document came from.

The head stands under the key `document`. It holds the kind, the version of the format, and the digests of all documents
that this one was made from. It also holds the sha256 of the files that belong to the document, and the digest of
everything else in the document. All other keys are the body.

In: a body, and the documents that it was made from. Out: a file. Read back, the file gives the body, after checks that
the document is unchanged and that all documents of a step are of one run.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from auto_quantize_model.files import InputError, canonical_json, digest_of, read_json, sha256_file, write_text

HEAD = "document"
CONFIG = "config"  # a key of `made_from`: the digest of the config's part that the step reads
# The version of all bodies, of whatever kind. Raise it when readers need a key that older documents lack.
VERSION = 3
HEAD_KEYS = {"kind": str, "version": int, "made_from": dict, "files": dict, "digest": str}
# Each kind with the rule that makes it, in the order of the workflow.
RULES = {
    "model_manifest": "get_model",
    "calibration_manifest": "extract_calibration",
    "plan": "plan_quantization",
    "scales": "calibrate_scales",
    "probes": "measure_probes",
    "scores": "measure_scores",
    "capture": "capture_sensitivity",
    "audit_part": "audit_part",
    "audit": "audit_capture",
    "heldout": "measure_heldout",
    "frontier": "measure_frontier",
    "profiles": "build_profiles",
    "why": "explain_units",
    "exports": "export_profiles",
    "report": "render_report",
    "quantized": "quantize_model",
}


class OtherVersion(InputError):
    """The document was written by a version of this code that gives documents other keys."""


class Document(dict[str, Any]):
    """The body of a document; the attributes hold its place and its head.

    Attributes:
        path: of the file.
        kind: one of `RULES`.
        made_from: {kind: digest} of every document that this one was made from, directly or by way of others. The key
            `config` holds the digest of the config's part that the step read; absent where the step read none.
        files: {path relative to the document's folder: sha256} of the files that were written with the document.
        digest: SHA-256 of body and head, without this digest.
    """

    def __init__(
        self, path: Path, body: Mapping[str, Any], kind: str, made_from: dict[str, str], files: dict[str, str]
    ) -> None:
        super().__init__(body)
        self.path, self.kind, self.made_from, self.files = path, kind, made_from, files
        self.digest = digest_of({**body, HEAD: self._head()})

    def text(self) -> str:
        """The document as JSON text, its head first."""
        return canonical_json({HEAD: {**self._head(), "digest": self.digest}, **self})

    def _head(self) -> dict[str, Any]:
        """The head without the digest."""
        return {"kind": self.kind, "version": VERSION, "made_from": self.made_from, "files": self.files}


def make_again(kind: str) -> str:
    """The next step where a document of a kind is missing or unusable."""
    return f"make it again (snakemake --cores 1 --forcerun {RULES[kind]})"


def named(kind: str) -> str:
    """A kind in words."""
    return kind.replace("_", " ")


def write_document(
    path: Path,
    kind: str,
    body: Mapping[str, Any],
    made_from: Iterable[Document] = (),
    config: str | None = None,
    files: Iterable[Path] = (),
) -> Document:
    """Write a document, whole or not at all, and return it.

    Args:
        path: the file.
        kind: one of `RULES`.
        body: JSON-able, without NaN and infinity.
        made_from: the documents that the body was made from.
        config: the digest of the config's part that the step read; None where a person asked for the document.
        files: files that were written with the document and belong to it.
    """
    origin: dict[str, str] = {}
    for source in made_from:
        origin |= {name: digest for name, digest in source.made_from.items() if name != CONFIG}
        origin[source.kind] = source.digest
    if config:
        origin[CONFIG] = config
    listed = {_name_of(file, path): sha256_file(file) for file in sorted(files)}
    # The body as it will be read back: JSON turns keys into text, and tuples into lists.
    document = Document(path, json.loads(canonical_json(body)), kind, origin, listed)
    write_text(path, document.text())
    return document


def read_document(path: Path, kind: str | None = None) -> Document:
    """The document at `path`, after a check that it is as it was written.

    Args:
        path: the file.
        kind: the kind that the document must have; None takes any kind.

    Raises:
        InputError: the file is missing, is not JSON, is not a document, has another kind, or was changed since it was
            written. The message names the file and the rule that makes it.
        OtherVersion: another version of this code wrote the document.
    """
    again = make_again(kind) if kind else "make it again with the rule that writes it"
    wanted = named(kind) if kind else "document"
    if not path.is_file():
        raise InputError(f"{path}: no such file, where the {wanted} is asked for; {again}")
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; or {again}") from None
    head: Any = found.get(HEAD) if isinstance(found, dict) else None
    if not _is_head(head):
        raise InputError(
            f"{path}: no {wanted} of this version: it does not say under {HEAD!r} what it was made from; {again}"
        )
    if kind not in (None, head["kind"]):
        raise InputError(
            f"{path}: a {named(head['kind'])}, where the {wanted} is asked for; name the right file, or {again}"
        )
    if head.get("version") != VERSION:
        raise OtherVersion(
            f"{path}: written by another version of this code (format {head.get('version', 0)}, and this one reads"
            f" {VERSION}); {make_again(head['kind'])}"
        )
    body = {key: value for key, value in found.items() if key != HEAD}
    document = Document(path, body, head["kind"], head["made_from"], head["files"])
    if document.digest != head["digest"]:
        raise InputError(
            f"{path}: changed since it was written, as its digest says; restore it, or {make_again(head['kind'])}"
        )
    return document


def _is_head(head: Any) -> bool:
    """Whether a value is a head of any version; heads of the first version do not name their version."""
    if isinstance(head, dict):
        head = {"version": 0, **head}
    return (
        isinstance(head, dict)
        and set(head) == set(HEAD_KEYS)
        and all(isinstance(head[key], expected) for key, expected in HEAD_KEYS.items())
        and head["kind"] in RULES
    )


def read_documents(paths: Mapping[str, Path]) -> list[Document]:
    """The documents of a step, {kind: path}, in that order, after a check that they are of one run.

    Raises:
        InputError: as `read_document` and `require_one_run` say.
    """
    documents = [read_document(path, kind) for kind, path in paths.items()]
    require_one_run(documents)
    return documents


def require_one_run(documents: Sequence[Document]) -> None:
    """Refuse documents that were made from other versions than those that are here, or than each other.

    Raises:
        InputError: the message names both files, and the rule that makes the later one again.
    """
    in_order = sorted(documents, key=lambda document: list(RULES).index(document.kind))
    for earlier, later in combinations(in_order, 2):
        if later.made_from.get(earlier.kind, earlier.digest) != earlier.digest:
            raise InputError(
                f"{later.path}: made from another {named(earlier.kind)} than {earlier.path}; {make_again(later.kind)}"
            )
    for earlier, later in combinations(in_order, 2):
        for kind in (kind for kind in RULES if kind in earlier.made_from and kind in later.made_from):
            if earlier.made_from[kind] != later.made_from[kind]:
                raise InputError(
                    f"{later.path} and {earlier.path}: made from different versions of the {named(kind)};"
                    f" {make_again(later.kind)}"
                )


def require_listed(document: Document, path: Path) -> None:
    """Refuse a file that differs from the one that was written with a document.

    Raises:
        InputError: the file is missing, or its sha256 is not the one that the document lists.
    """
    again = make_again(document.kind)
    if not path.is_file():
        raise InputError(f"{path}: no such file; {again}")
    name = _name_of(path, document.path)
    if name not in document.files:
        raise InputError(
            f"{path}: no file of {document.path}, which lists other files; name the right file, or {again}"
        )
    if sha256_file(path) != document.files[name]:
        raise InputError(f"{path}: changed since it was written, as {document.path} says; restore it, or {again}")


def files_of(document: Document) -> list[Path]:
    """The paths of the files that a document lists."""
    return [document.path.parent / name for name in document.files]


def why_stale(path: Path, config: str | None) -> str:
    """Why the document at `path` must be made again before any step reads it, in words; empty if there is no reason.

    A damaged document is not a reason, because the script that reads the document reports the damage. A file of another
    sort is not a reason either.

    Args:
        path: a file, which may be a document.
        config: the digest of the config's part that the step reads today; None where the step reads none.
    """
    if path.suffix != ".json":
        return ""
    if not path.exists():
        return f"{path} is gone"
    try:
        document = read_document(path)
    except OtherVersion:
        return f"{path} was written by another version of this code"
    except InputError:
        return ""
    if config != document.made_from.get(CONFIG):
        return f"{path} was made by another config"
    gone = [file for file in files_of(document) if not file.exists()]
    return f"{gone[0]} is gone" if gone else ""


def _name_of(file: Path, document: Path) -> str:
    """A file's path as seen from the folder of a document."""
    return Path(os.path.relpath(file, document.parent)).as_posix()
