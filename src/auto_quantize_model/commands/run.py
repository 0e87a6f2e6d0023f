"""The documents of a step.

In: the parsed options of a command. Out: documents, checked to be unchanged and of one run. `commands.loaded` reads the
model and the samples that the documents describe.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from auto_quantize_model.documents import (
    Document,
    read_document,
    read_documents,
    require_listed,
    require_one_run,
    write_document,
)
from auto_quantize_model.records import (
    Audit,
    CalibrationManifest,
    Capture,
    Frontier,
    ModelManifest,
    NotMeasured,
    Plan,
    Profiles,
    Record,
    Why,
    as_record,
    body_of,
)

# Each option that names a document, with the document's kind, in the order of the workflow.
DOCUMENTS = {
    "manifest": "model_manifest",
    "calibration_manifest": "calibration_manifest",
    "plan": "plan",
    "scales": "scales",
    "capture": "capture",
    "audit": "audit",
    "frontier": "frontier",
    "profiles": "profiles",
    "why": "why",
    "exports": "exports",
    "report": "report",
}


@dataclass(frozen=True)
class Run:
    """The documents of one step.

    Attributes:
        options: the command's parsed options.
        documents: those that the options name, in the order of the workflow; an output is made from them.
    """

    options: argparse.Namespace
    documents: tuple[Document, ...]

    def document(self, kind: str) -> Document:
        """The document of a kind."""
        return next(document for document in self.documents if document.kind == kind)

    @cached_property
    def manifest(self) -> ModelManifest:
        return as_record(ModelManifest, self.document("model_manifest"))

    @cached_property
    def calibration(self) -> CalibrationManifest:
        return as_record(CalibrationManifest, self.document("calibration_manifest"))

    @cached_property
    def plan(self) -> Plan:
        return as_record(Plan, self.document("plan"))

    @cached_property
    def capture(self) -> Capture:
        return as_record(Capture, self.document("capture"))

    @cached_property
    def audit(self) -> Audit:
        return as_record(Audit, self.document("audit"))

    @cached_property
    def frontier(self) -> Frontier | NotMeasured:
        return either(Frontier, self.document("frontier"))

    @cached_property
    def profiles(self) -> Profiles:
        return as_record(Profiles, self.document("profiles"))

    @cached_property
    def why(self) -> Why | NotMeasured:
        return either(Why, self.document("why"))

    @property
    def exports(self) -> Document:
        return self.document("exports")

    @property
    def report(self) -> Document:
        return self.document("report")

    @property
    def has(self) -> frozenset[str]:
        """The kinds of the documents that the options name."""
        return frozenset(document.kind for document in self.documents)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each document by its kind."""
        return {document.kind: document.digest for document in self.documents}

    def write(self, kind: str, path: Path, record: Any, files: Iterable[Path] = ()) -> None:
        """Write a record or a body as a document that is made from the step's documents and its part of the config."""
        body = record if isinstance(record, Mapping) else body_of(record)
        write_document(path, kind, body, self.documents, self.options.config_digest, files)


def either(kind: type[Record], document: Document) -> Record | NotMeasured:
    """The record of a document, or the record that says why nothing was measured."""
    return as_record(NotMeasured, document) if document.get("status") == "not_measured" else as_record(kind, document)


def read_parts(run: Run, paths: Sequence[Path], kind: str, record: type[Record]) -> list[Record]:
    """The parts of a step's work, after a check that each is of this run.

    Args:
        run: the documents of the step.
        paths: of the parts.
        kind: of their documents.
        record: what each holds.

    Raises:
        InputError: a part is missing, damaged or of another run.
    """
    found = [read_document(path, kind) for path in paths]
    for document in found:
        require_one_run([*run.documents, document])
    return [as_record(record, document) for document in found]


def open_run(args: argparse.Namespace) -> Run:
    """The documents of a step by its parsed options. Documents that the step writes are not read.

    A command calls this function before it imports torch, so that a damaged document ends the command at once.

    Raises:
        InputError: a document or a stored set is missing, damaged or of another run.
    """
    paths = {
        kind: getattr(args, option)
        for option, kind in DOCUMENTS.items()
        if option not in args.writes and getattr(args, option, None) is not None
    }
    run = Run(args, tuple(read_documents(paths)))
    for option in ("calibration_set", "heldout_set"):
        if option in args and option not in args.writes:
            require_listed(run.document("calibration_manifest"), getattr(args, option))
    return run
