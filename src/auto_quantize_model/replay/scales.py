"""Scales as a file: one step writes the scales of each calibration, and every step that replays reads them.

In: the scales of calibrations, each by a name. Out: a safetensors file, and the same scales read back. The document
that lists the file holds what the observers saw (`ranges`), because a replay does not need it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from auto_quantize_model.files import InputError, atomic_path, digest_of, named_errors
from auto_quantize_model.records import ObservedRange, OpScales, Scales

ALL_BATCHES = "all_batches"  # the calibration on the whole set, with which a deployed model is quantized
KEYS = {
    "in_scale": torch.float32,
    "in_zero_point": torch.int32,
    "out_scale": torch.float32,
    "out_zero_point": torch.int32,
}
# The range of an op's input, for schemes of compressed-tensors. An Embedding has none.
RANGE = ("minimum", "maximum")


def name_of_batch(index: int) -> str:
    """The name of the calibration on one scored batch alone, as INC calibrates for a score."""
    return f"batch_{index}"


def write_scales(path: Path, calibrations: Mapping[str, Scales]) -> None:
    """Write the scales of all calibrations: tensors of one value under `CALIBRATION/OP/KEY`.

    Each op has four, and the minimum and the maximum of its input where it has one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, scales in calibrations.items():
        for op_name, found in scales.items():
            values = {key: torch.tensor([getattr(found, key)], dtype=dtype) for key, dtype in KEYS.items()}
            if found.input:
                values |= {key: torch.tensor([getattr(found.input, key)], dtype=torch.float32) for key in RANGE}
            tensors |= {f"{name}/{op_name}/{key}": value for key, value in values.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def read_scales(path: Path) -> dict[str, Scales]:
    """The calibrations that `write_scales` wrote.

    Raises:
        InputError: the file is missing, damaged, or holds other tensors.
    """
    again = "make the file again (snakemake --cores 1 --forcerun calibrate_scales)"
    try:
        with named_errors(path):
            tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error}); {again}") from None
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, tensor in tensors.items():
        calibration, _, rest = name.partition("/")
        op_name, _, key = rest.rpartition("/")
        found.setdefault(calibration, {}).setdefault(op_name, {})[key] = tensor.item()
    for calibration, ops in found.items():
        for op_name, values in ops.items():
            if set(values) not in (set(KEYS), {*KEYS, *RANGE}):
                raise InputError(f"{path}: {calibration}/{op_name} has not exactly {', '.join(KEYS)}; {again}")
            seen = ObservedRange(*(values.pop(key) for key in RANGE)) if RANGE[0] in values else None
            values["input"] = seen
    return {
        calibration: {op_name: OpScales(**values) for op_name, values in ops.items()}
        for calibration, ops in found.items()
    }


def ranges(calibrations: Mapping[str, Scales]) -> dict[str, Any]:
    """What the observers saw: {calibration: {op_name: {input, output}}}, each null for an op without observers."""
    return {
        name: {op_name: {key: asdict(found)[key] for key in ("input", "output")} for op_name, found in scales.items()}
        for name, scales in calibrations.items()
    }


def digest_of_scales(scales: Scales) -> str:
    """SHA-256 of scales and zero_points."""
    return digest_of({name: [getattr(found, key) for key in KEYS] for name, found in scales.items()})
