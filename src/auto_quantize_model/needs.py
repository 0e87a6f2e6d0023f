"""What a step needs of a machine: bytes of memory, and minutes.

In: the size of the model and of its batches, as numbers. Out: the numbers that a scheduler is asked for, and that a
step compares with the memory of its machine. This is arithmetic alone, so planning imports neither torch nor INC.
"""

import math
from dataclasses import dataclass

GIB = 1 << 30
UNITS = {"MiB": 1 << 20, "GiB": GIB}
LIBRARIES = 2 * GIB  # Python with torch, transformers, and INC or CUDA
WORKING_BYTES = 2 * GIB  # kept block outputs and activations
HELD_BYTES = GIB // 2  # for the FP32 weights of a block that runs many times, where weights stay in their files
LEAST_WORKING_BYTES = HELD_BYTES + GIB // 2  # and activations, with the graph of one block in a backward pass
OUTPUT_BYTES = 2 * GIB  # for kept block outputs; outputs that do not fit are computed again
COPIES = 5  # of the logits: reference, output, their difference, a direction, and its gradient
KEPT_BYTES = 2 * GIB  # for quantized weights of a replay; a weight that does not fit is made again
# Multiply-adds in ten minutes, on two CPU cores or on a GPU.
IN_TEN_MINUTES = {"cpu": 3e13, "cuda": 1e16}
SECONDS_OF_WEIGHT = (
    1e-7  # to compare a weight with the manifest, load it and prepare its op: 6 minutes for 3.75 billion
)
AT_LEAST = 10  # minutes, for the start of a job on a slow file system
MARGIN = 2  # on the estimated time; a job that needs more resumes from the score store with twice the time


def bytes_loaded(weights: float) -> float:
    """The memory of a model in FP32."""
    return 4 * weights


def bytes_of_logits(rows: int, tokens: int, vocabulary: int) -> int:
    """The memory of a model's output on a batch of so many samples."""
    return 4 * rows * tokens * vocabulary


def bytes_of_replay(weights: float, schemes: int = 1, logits: float = 0) -> float:
    """The memory of a replay.

    Args:
        weights: number of the model's weights; each takes 4 bytes in FP32 and 1 as an INT8 code.
        schemes: how many the replay measures; with more than `inc_int8`, it keeps up to `KEPT_BYTES` of weights.
        logits: bytes of the output on the largest batch. Probes hold its error in each scheme, and a few copies.
    """
    kept = min(KEPT_BYTES, 4 * (schemes - 1) * weights)
    return 5 * weights + WORKING_BYTES + kept + (schemes + COPIES) * logits


def bytes_of_mapped(codes: float, merged: float, largest: float, schemes: int = 1, logits: float = 0) -> float:
    """The least memory of a replay on the CPU whose weights stay in the snapshot's files.

    Pages of the files do not count: the system drops them where memory is short, and reads them again.

    Args:
        codes: number of weights that have an INT8 code, of one byte.
        merged: bytes of weights that no file holds as the model does, such as experts that are stored one by one.
        largest: number of weights of the largest matrix. Its FP32 values are there twice while it is quantized.
        schemes, logits: as `bytes_of_replay` takes them.
    """
    return codes + merged + 8 * largest + LEAST_WORKING_BYTES + (schemes + COPIES) * logits


def in_bytes(memory: str) -> int:
    """The bytes of a text such as `10GiB`, as `machine.memory` takes it."""
    return int(memory[:-3]) * UNITS[memory[-3:]]


def bytes_of_checkpoint(weights: float) -> float:
    """The memory to load a written checkpoint back in FP32, with a few more weights while they are compared."""
    return 5 * weights + WORKING_BYTES


@dataclass(frozen=True)
class Size:
    """The size of a run.

    Attributes:
        weights: of the model.
        logits: bytes of the output on the largest batch.
        multiply_adds: of a forward of one scored batch.
        ops: how many are measured, each in every scheme.
        schemes: how many.
        maps: how many.
        batches: calibration batches that are scored.
        all_batches: all calibration batches, and `heldout`: held-out batches, both in forwards of a scored batch.
        audit_ops, points, refine_batches: as in the config.
        top: ops whose exact scores follow their estimates; None where all scores are exact.
        budget: minutes that the capture may take; None without a limit.
        memory: bytes that a step may take; None without a limit.
    """

    weights: float
    logits: float
    multiply_adds: float
    ops: int
    schemes: int
    maps: int
    batches: int
    all_batches: float
    heldout: float
    audit_ops: int
    points: int
    refine_batches: int
    top: int | None
    budget: float | None
    memory: int | None = None


def forwards(step: str, size: Size) -> float:
    """About how many FP32 forwards of a scored batch a step's work equals.

    A state runs half of the blocks in the mean, and takes up to twice the time of FP32. So a state counts as a forward.
    """
    if step == "plan_quantization":
        return 20.0  # INC's checks, and the trials of the schemes
    if step == "calibrate_scales":
        return 3.0 * size.all_batches  # observers take longer than the model
    if step == "capture_sensitivity":
        probes = 0.0 if size.top is None else 2 + 2 * size.schemes + 1.5 * 64
        exact = size.ops if size.top is None else min(size.ops, 2 * size.top)
        return size.batches * (probes + exact * size.schemes + size.ops * (size.maps - 1))
    if step == "audit_capture":
        return 8.0 * size.audit_ops * (size.maps + size.schemes)  # INC converts the model for each score
    if step == "measure_frontier":
        refined = 8.0 * size.refine_batches * size.schemes * 64
        return 3.0 * (2 * size.points + 16 + size.schemes) * size.heldout + refined
    if step == "explain_units":
        return 6.0 * 24 * (size.batches + size.heldout)  # six units, with the settings of all cures
    return 4.0 * size.heldout


def minutes(step: str, size: Size, device: str, threads: int, attempt: int = 1, share: float = 1.0) -> int:
    """The time to ask for: the estimate with a margin, doubled at each attempt after the first.

    Args:
        step: name of the rule.
        size: of the run.
        device: `cpu` or `cuda`.
        threads: of the job, on a CPU.
        attempt: 1, 2, 3 and so on.
        share: of the step's work, where a job does a part of it.
    """
    speed = IN_TEN_MINUTES[device] / 600 * (threads / 2 if device == "cpu" else 1)
    measuring = forwards(step, size) * share * size.multiply_adds / speed / 60
    if step == "capture_sensitivity" and size.budget is not None:
        measuring = size.budget
    loading = size.weights * SECONDS_OF_WEIGHT / 60
    return math.ceil(AT_LEAST + MARGIN * (loading + measuring)) << (attempt - 1)


def megabytes(step: str, size: Size, device: str, attempt: int = 1) -> int:
    """The host memory to ask for, in units of 10^6 bytes. An attempt after the first may follow a kill for memory.

    INC's conversion in `plan_quantization` and `audit_capture` needs as much as a replay on the CPU. With a limit, no
    step but `quantize_model` asks for more: a step that cannot keep within the limit says so before its work.
    """
    needed = {
        "plan_quantization": bytes_of_replay(size.weights),
        "audit_capture": bytes_of_replay(size.weights, size.schemes, size.logits),
        "quantize_model": bytes_of_checkpoint(size.weights),
    }.get(step)
    if needed is None and device == "cuda":
        needed = bytes_loaded(size.weights) + LIBRARIES  # weights pass through the host to the GPU
    elif needed is None:
        needed = bytes_of_replay(size.weights, size.schemes, size.logits)
    asked = (LIBRARIES + needed) * (1 + (attempt - 1) / 2)
    if size.memory is not None and step != "quantize_model":
        asked = min(asked, size.memory)
    return math.ceil(asked / 1e6)
