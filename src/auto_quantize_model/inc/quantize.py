"""INC quantizes the model by an exported profile, and its error is compared with the error that the profile promises.

In: a model, its calibration batches, an exported op_name_dict, held-out batches. Out: INC's INT8 model on disk, loaded
back; and its metrics, for `measure.heldout.compared`.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.utils.pytorch import is_int8_model, load
from torch.ao.quantization.fx.utils import assert_and_get_unique_device

from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc_pytorch_mse_patching import copies_sharing_parameters, temporary_workspace
from auto_quantize_model.measure.heldout import record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.models.sample import samples_in
from auto_quantize_model.models.snapshot import zero_model
from auto_quantize_model.replay.model import Batch

WEIGHTS = "best_model.pt"  # INC's name of the file that it saves


def quantize(model: torch.nn.Module, batches: Sequence[Batch], op_name_dict: dict[str, Any], directory: Path) -> None:
    """Have INC quantize a model to static INT8 and save it into `directory`.

    Args:
        model: FP32, eval mode, on the CPU; INC changes it, so it cannot be used afterwards.
        batches: the calibration batches, all of one size.
        op_name_dict: {regular expression: configuration} as exported; INC chooses for all other ops.
        directory: INC writes best_model.pt there.

    Raises:
        InputError: INC quantized nothing, because the profile keeps every op, or INC could not write its model.
    """
    conf = PostTrainingQuantConfig(
        approach="static",
        quant_level=1,
        calibration_sampling_size=[sum(map(samples_in, batches))],
        op_name_dict=op_name_dict or None,
    )
    with temporary_workspace(), copies_sharing_parameters(), modules_told_by_name():
        quantized = quantization.fit(model, conf, calib_dataloader=CalibrationLoader(batches))
    if quantized is None or not is_int8_model(quantized.model):
        raise InputError("INC quantized nothing: this profile keeps every op in FP32; take one that keeps fewer")
    quantized.save(str(directory))
    if not (directory / WEIGHTS).is_file():  # INC logs the disk's error and continues
        raise InputError(f"{directory}: INC could not write its model there; free some space, and see the log for why")


@contextlib.contextmanager
def modules_told_by_name() -> Iterator[None]:
    """Let `str(module)` be only the class name of the module, without a description of its content.

    INC looks for fused ops by the class name in `str(module)`, of every module for every op. For a quantized module
    this unpacks each weight in it. At 3.75 billion weights that takes hours instead of a second.
    """
    with contextlib.ExitStack() as stack:
        for kind in {torch.nn.Module, *subclasses(torch.nn.Module)}:
            if "__repr__" in vars(kind):
                stack.enter_context(mock.patch.object(kind, "__repr__", lambda module: f"{module._get_name()}()"))
        yield


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """All subclasses of `kind`, direct or not; a class that inherits by several ways comes several times."""
    children: list[type[Any]] = kind.__subclasses__()
    for child in children:
        yield child
        yield from subclasses(child)


def release() -> None:
    """Free what INC leaves behind after its use: modules that torch keeps in caches, and reference cycles."""
    assert_and_get_unique_device.cache_clear()
    gc.collect()


def load_quantized(directory: Path, snapshot: Path) -> torch.nn.Module:
    """INC's saved model, put into the modules of a snapshot whose weights are not read.

    The file holds every weight, those that stay in FP32 as well. INC only needs modules, and quantizes what they hold
    before the file replaces it. Zeros serve for that.

    Raises:
        InputError: as `models.snapshot.empty_model` says.
    """
    with copies_sharing_parameters():
        loaded: torch.nn.Module = load(str(directory), zero_model(snapshot))
    return loaded


def measure_error(
    references: Sequence[Reference],
    quantized: torch.nn.Module,
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The error of a quantized model on held-out batches, in the fields of a point.

    Args:
        references: the FP32 output of each batch.
        quantized: INC's model, on the CPU.
        heldout: the batches.
        answers: as `heldout.HeldOut` takes them.
        on_batch: called after each batch with the number done and the total.
    """
    records = []
    for index, (reference, batch) in enumerate(zip(references, heldout, strict=True)):
        records.append(record_of(logits(quantized, batch), reference, batch, answers[index]))
        on_batch(index + 1, len(heldout))
    asked = sum(span is not None for spans in answers for span in spans)
    return summary(records, [totals(reference, index) for index, reference in enumerate(references)], asked)


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The model's output: float32 (samples, tokens, vocabulary), or (samples, classes)."""
    with torch.no_grad():
        output: torch.Tensor = model(**batch).logits
    return output
