"""The inputs of a step: its documents, and the model and samples that the documents describe.

In: the parsed options of a command. Out: documents, checked to be unchanged and of one run. The snapshot, the samples
and the model are read when the step asks for them.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_quantize_model.documents import Document, files_of, read_documents, require_listed, write_document
from auto_quantize_model.records import (
    Audit,
    Capture,
    NotMeasured,
    Plan,
    Profiles,
    Scales,
    Tradeoff,
    as_record,
    body_of,
)

if TYPE_CHECKING:
    import torch

    from auto_quantize_model.data.batches import Batch
    from auto_quantize_model.models.snapshot import Processor

# Each option that names a document, with the document's kind, in the order of the workflow.
DOCUMENTS = {
    "manifest": "model_manifest",
    "calibration_manifest": "calibration_manifest",
    "plan": "plan",
    "scales": "scales",
    "capture": "capture",
    "audit": "audit",
    "tradeoff": "tradeoff",
    "profiles": "profiles",
    "exports": "exports",
    "report": "report",
}


@dataclass(frozen=True)
class Run:
    """The inputs of one step.

    Attributes:
        options: the command's parsed options.
        documents: those that the options name, in the order of the workflow; an output is made from them.
    """

    options: argparse.Namespace
    documents: tuple[Document, ...]

    def document(self, kind: str) -> Document:
        """The document of a kind."""
        return next(document for document in self.documents if document.kind == kind)

    @property
    def manifest(self) -> Document:
        return self.document("model_manifest")

    @property
    def calibration(self) -> Document:
        return self.document("calibration_manifest")

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
    def tradeoff(self) -> Tradeoff | NotMeasured:
        document = self.document("tradeoff")
        if document.get("status") == "not_measured":
            return as_record(NotMeasured, document)
        return as_record(Tradeoff, document)

    @cached_property
    def profiles(self) -> Profiles:
        return as_record(Profiles, self.document("profiles"))

    @property
    def exports(self) -> Document:
        return self.document("exports")

    @property
    def report(self) -> Document:
        return self.document("report")

    @cached_property
    def scales(self) -> dict[str, Scales]:
        """The scales of each calibration, by its name."""
        from auto_quantize_model.replay.scales import read_scales

        document = self.document("scales")
        (path,) = files_of(document)
        require_listed(document, path)
        return read_scales(path)

    def scales_of_batches(self) -> list[Scales]:
        """The scales of each scored batch."""
        from auto_quantize_model.replay.scales import name_of_batch

        return [self.scales[name_of_batch(index)] for index in range(self.plan.confidence_batches)]

    @property
    def has(self) -> frozenset[str]:
        """The kinds of the documents that the options name."""
        return frozenset(document.kind for document in self.documents)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each document by its kind."""
        return {document.kind: document.digest for document in self.documents}

    @cached_property
    def directory(self) -> Path:
        """The model's snapshot, after every file is compared with the manifest, which takes minutes for gigabytes."""
        from auto_quantize_model.models.snapshot import verify_manifest

        return verify_manifest(self.manifest)

    @cached_property
    def parameters(self) -> int:
        """Number of the model's weights."""
        from auto_quantize_model.models.snapshot import count_parameters

        return count_parameters(self.directory)

    @cached_property
    def device(self) -> "torch.device":
        """The device that the options name, set up as the options say, after a check that the model fits there."""
        from auto_quantize_model.machine import choose_device, require_memory

        device = choose_device(
            self.options.device,
            tf32=self.options.tf32,
            deterministic=not self.options.nondeterministic,
            threads=self.options.threads,
        )
        require_memory(self.parameters, device)
        return device

    @cached_property
    def processor(self) -> "Processor":
        """The tokenizer and image processor, with the image backend of the calibration set where the step reads one."""
        from auto_quantize_model.models.snapshot import load_processor

        backend = self.calibration["image_backend"] if "calibration_manifest" in self.has else None
        return load_processor(self.directory, backend)

    def batches(self, count: int | None = None) -> list["Batch"]:
        """The first `count` calibration batches, or all."""
        from auto_quantize_model.data.batches import load_batches

        return load_batches(self.options.calibration_set, self.calibration, self.processor, count)

    def heldout(self, count: int) -> tuple[list["Batch"], list[list[range | None]]]:
        """The first `count` held-out batches, and for each sample the positions of its answer's tokens."""
        from auto_quantize_model.data.batches import load_heldout

        return load_heldout(self.options.heldout_set, self.calibration, self.processor, count)

    def model(self, device: "torch.device | str" = "cpu") -> "torch.nn.Module":
        """The model in FP32 on a device, loaded again at each call."""
        import torch

        from auto_quantize_model.models.snapshot import load_model

        model: torch.nn.Module = load_model(self.directory)
        return model.to(device)

    def write(self, kind: str, path: Path, record: Any, files: Iterable[Path] = ()) -> None:
        """Write a record or a body as a document that is made from the step's documents and its part of the config."""
        body = record if isinstance(record, Mapping) else body_of(record)
        write_document(path, kind, body, self.documents, self.options.config_digest, files)


def open_run(args: argparse.Namespace) -> Run:
    """The inputs of a step by its parsed options. Documents that the step writes are not read.

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
            require_listed(run.calibration, getattr(args, option))
    return run
