"""Where a replay runs: the device by name, exact arithmetic on that device, and enough memory before long work."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.free_memory import free_memory
from auto_quantize_model.needs import (
    GIB,
    KEPT_BYTES,
    LIBRARIES,
    OUTPUT_BYTES,
    bytes_loaded,
    bytes_of_mapped,
    bytes_of_replay,
)

LOWER = "lower calibration.batch_size, max_pixels or max_tokens, or measure on a machine with more memory"


def choose_device(
    name: str, *, tf32: bool = False, deterministic: bool = True, threads: int | None = None
) -> torch.device:
    """The torch device for `auto`, `cpu` or `cuda`, set up so that float32 products are not rounded to fewer bits.

    Args:
        name: `auto` takes a GPU where torch sees one.
        tf32: let CUDA round float32 products to 10 bits of mantissa.
        deterministic: ask torch for algorithms that give the same bits each time on a GPU. For the CPU the request is
            withdrawn, because torch would refuse the INT8 kernels that INC and the replay need.
        threads: number of torch's CPU threads; None leaves the number of this process.

    Raises:
        InputError: a GPU was asked for and torch sees none, or `threads` is below 1.
    """
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads: {threads} is out of range; write a whole number of at least 1")
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"no GPU that this build of torch ({torch.__version__}) can use; set sensitivity.device to cpu, pass"
                " --resources gpu=0, or install a CUDA build"
            )
        # cuBLAS is deterministic only with a workspace of fixed size. It reads that size when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic and name == "cuda")
    return torch.device(name)


@contextmanager
def any_algorithm() -> Iterator[None]:
    """Let torch run kernels that it does not list as deterministic, and restore torch's setting afterwards.

    The INT8 kernels of the CPU are deterministic, but `torch.use_deterministic_algorithms` refuses them.
    """
    saved = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(saved)


def require_memory(
    parameters: int, replay_on: torch.device | None = None, schemes: int = 1, logits: int = 0, memory: int = 0
) -> None:
    """Refuse a model that will not fit, before it is loaded.

    Args:
        parameters: number of the model's weights.
        replay_on: the device of the replay; None without a replay. Weights pass through the host's memory to a GPU.
        schemes, logits: as `bytes_of_replay` takes them.
        memory: bytes of the host that the process may take; 0 for all that is free.

    Raises:
        InputError: the message says what is needed, what is free, and what to lower.
    """
    loaded, replayed = bytes_loaded(parameters), bytes_of_replay(parameters, schemes, logits)
    on_cpu = replay_on is not None and replay_on.type == "cpu"
    on_host = replayed if on_cpu else loaded
    here = free_memory()
    places = [(here.place, here.bytes, on_host)]
    if memory:
        places.append(("a step with this machine.memory", memory - LIBRARIES, on_host))
    if replay_on is not None and replay_on.type == "cuda":
        places.append((torch.cuda.get_device_name(replay_on), torch.cuda.mem_get_info(replay_on)[0], replayed))
    for place, free, wanted in places:
        if wanted > free:
            raise InputError(
                f"{parameters / 1e9:.2f} billion weights need {wanted / GIB:.1f} GiB, and {place} has"
                f" {free / GIB:.1f} GiB free; {LOWER}"
            )


@dataclass
class Limits:
    """The most bytes that a replay keeps to save time. What it does not keep, it makes again.

    Attributes:
        weights: for quantized weights.
        outputs: for the outputs of blocks.
    """

    weights: int = KEPT_BYTES
    outputs: int = OUTPUT_BYTES


LIMITS = Limits()  # of this process


@dataclass(frozen=True)
class Need:
    """What decides about the memory of a replay on the CPU, as `bytes_of_replay` and `bytes_of_mapped` take it."""

    weights: int
    merged: int
    largest: int
    has_codes: bool
    schemes: int
    logits: int


def stays_mapped(need: Need, memory: int = 0) -> bool:
    """Whether weights stay in their files, because the model does not fit into memory in FP32; sets `LIMITS` then.

    Args:
        need: of the replay.
        memory: bytes that the process may take; 0 for all that is free.

    Raises:
        InputError: the replay does not fit even so. The message says what is needed, what there is, and what to lower.
    """
    free = free_memory()
    is_limit = 0 < memory < free.bytes + LIBRARIES
    room = memory - LIBRARIES if is_limit else free.bytes
    if bytes_of_replay(need.weights, need.schemes, need.logits) <= room:
        return False
    codes = need.weights if need.has_codes else 0
    least = bytes_of_mapped(codes, need.merged, need.largest, need.schemes, need.logits)
    if least > room:
        left = f"machine.memory leaves {max(room, 0) / GIB:.1f} GiB for the model"
        raise InputError(
            f"{need.weights / 1e9:.2f} billion weights need {least / GIB:.1f} GiB while they stay in their files, and"
            f" {left if is_limit else f'{free.place} has {free.bytes / GIB:.1f} GiB free'};"
            f" {'raise machine.memory, or ' if is_limit else ''}{LOWER}"
        )
    LIMITS.outputs = int(min(OUTPUT_BYTES, (room - least) / 2))
    LIMITS.weights = int(min(KEPT_BYTES, room - least - LIMITS.outputs))
    return True


def require_free(wanted: float, what: str) -> None:
    """Refuse work that will not fit into memory, before the work begins.

    Args:
        wanted: bytes.
        what: the work, as the subject of a sentence.

    Raises:
        InputError: the message says what is needed and what is free.
    """
    free = free_memory()
    if wanted > free.bytes:
        raise InputError(
            f"{what} needs {wanted / GIB:.1f} GiB, and {free.place} has {free.bytes / GIB:.1f} GiB free; use a machine"
            " with more memory"
        )


@contextmanager
def explained_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory error into an error that says what was free and what to lower.

    Raises:
        InputError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.max_memory_allocated(device)
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"out of GPU memory: {held / GIB:.1f} GiB were in use, {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
            f" ({first_line}); {LOWER}"
        ) from None


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Give torch so many CPU threads for a while: sums of float32 depend on their number."""
    saved = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(saved)


def has_vnni() -> bool:
    """Whether this CPU has AVX-512 VNNI. With VNNI, INT8 products are exact and torch takes oneDNN's convolution."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def instruction_set() -> str:
    """The vector instructions that torch uses on this CPU, such as `AVX2` or `AVX512 VNNI`.

    Scores depend on them: float32 sums are split by the width of a vector, and INT8 products saturate without VNNI.
    """
    return torch.backends.cpu.get_cpu_capability() + (" VNNI" if has_vnni() else "")


def usage(device: torch.device) -> dict[str, Any]:
    """What a run took, and where it ran: for the run record, never for a report."""
    record: dict[str, Any] = {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return record
