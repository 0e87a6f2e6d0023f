"""The model, the samples and the scales that a step's documents describe.

In: the documents of a step. Out: the snapshot, the samples, the scales and the model, each read when the step asks.
Only steps that run a model import this module, so a change of model code reruns no other step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from auto_quantize_model.commands.run import Run
from auto_quantize_model.data.batches import Batch, load_batches, load_heldout
from auto_quantize_model.documents import files_of, require_listed
from auto_quantize_model.machine import Need, choose_device, require_memory, stays_mapped
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.snapshot import (
    count_parameters,
    load_model,
    load_processor,
    stored_weights,
    verify_manifest,
)
from auto_quantize_model.needs import bytes_of_logits
from auto_quantize_model.records import Scales
from auto_quantize_model.replay.scales import name_of_batch, read_scales
from auto_quantize_model.schemes.scheme import INC_INT8


@dataclass(frozen=True)
class Loaded:
    """The files that the documents of a run describe."""

    run: Run

    @cached_property
    def directory(self) -> Path:
        """The model's snapshot, after every file is compared with the manifest, which takes minutes for gigabytes."""
        return verify_manifest(self.run.manifest)

    @cached_property
    def parameters(self) -> int:
        """Number of the model's weights."""
        return count_parameters(self.directory)

    @property
    def memory(self) -> int:
        """The bytes that the options allow this process; 0 for all that is free."""
        return int(self.run.options.memory) * 10**6

    @cached_property
    def device(self) -> torch.device:
        """The device that the options name, set up as the options say, after a check that the model fits there."""
        options = self.run.options
        device = choose_device(
            options.device, tf32=options.tf32, deterministic=not options.nondeterministic, threads=options.threads
        )
        if device.type == "cpu":
            _ = self.mapped
        else:
            require_memory(self.parameters, device, len(self.run.plan.schemes), self.logits, self.memory)
        return device

    @cached_property
    def mapped(self) -> bool:
        """Whether weights stay in their files in a replay on the CPU, after a check that the model fits so."""
        return self.stays_mapped(list(self.run.plan.schemes))

    def stays_mapped(self, schemes: Sequence[str]) -> bool:
        """As `mapped`, for other schemes than the plan's."""
        found = stored_weights(self.directory)
        sizes = found.count, found.merged, found.largest
        return stays_mapped(Need(*sizes, INC_INT8 in schemes, len(schemes), self.logits), self.memory)

    @property
    def logits(self) -> int:
        """The bytes of the output on a batch of the longest samples; 0 where the vocabulary is unknown."""
        tokens = max(sample.tokens for samples in self.run.calibration.samples.values() for sample in samples)
        calibration = self.run.calibration
        rows = max(calibration.batch_size, calibration.heldout_batch_size)
        return bytes_of_logits(rows, tokens, self.processor.vocabulary or 0)

    @cached_property
    def processor(self) -> Processor:
        """The tokenizer and image processor, with the image backend of the calibration set where the step reads one."""
        backend = self.run.calibration.image_backend if "calibration_manifest" in self.run.has else None
        return load_processor(self.directory, backend)

    def batches(self, count: int | None = None) -> list[Batch]:
        """The first `count` calibration batches, or all."""
        return load_batches(self.run.options.calibration_set, self.run.calibration, self.processor, count)

    def heldout(self, count: int) -> tuple[list[Batch], list[list[range | None]]]:
        """The first `count` held-out batches, and for each sample the positions of its answer's tokens."""
        return load_heldout(self.run.options.heldout_set, self.run.calibration, self.processor, count)

    def model(self, experts: str | None = None, mapped: bool = False) -> torch.nn.Module:
        """The model in FP32 on the CPU, loaded again at each call; its experts are ops as the plan says, if None."""
        return load_model(self.directory, experts or self.run.plan.experts, mapped)

    def model_to_replay(self) -> torch.nn.Module:
        """The model in FP32 on the device of the options. On the CPU its weights stay in their files if they must.

        INC, where it is the engine, takes this model too, on the CPU alone.
        """
        on_cpu = self.device.type == "cpu"
        model = self.model(mapped=on_cpu and self.mapped)
        return model if on_cpu else model.to(self.device)

    @cached_property
    def scales(self) -> dict[str, Scales]:
        """The scales of each calibration, by its name."""
        document = self.run.document("scales")
        (path,) = files_of(document)
        require_listed(document, path)
        return read_scales(path)

    def scales_of_batches(self) -> list[Scales]:
        """The scales of each scored batch."""
        return [self.scales[name_of_batch(index)] for index in range(self.run.plan.confidence_batches)]
