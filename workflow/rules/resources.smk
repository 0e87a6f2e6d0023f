"""What steps ask of a scheduler: memory, time, threads and a GPU, in the words that Snakemake's executors read.

Snakemake calls these functions when it plans, and again before it starts a job. By then the manifest and the plan exist.
"""

from pathlib import Path

from auto_quantize_model import needs
from auto_quantize_model.models.size import size_of_run

KINDS = ("manifest", "calibration_manifest", "plan")
# As many as --cores or --max-threads allow: Snakemake lowers the number.
MEASURING_THREADS = config["sensitivity"]["threads"] or 64
# The plugin for SLURM reads `gpu`, and that for Kubernetes both. On the CPU neither is there, because Kubernetes would
# read `gpu: 0` as the wish for a node with GPUs. A cluster refuses a GPU without a limit, and its plugin writes limits for
# a job with `scale: 0` alone. These limits are of the disk too: room for sources, plugins, documents and scores.
ONE_GPU = dict(gpu=1, gpu_manufacturer="nvidia", scale=0, disk_mb=10000) if DEVICE == "cuda" else {}
# The memory that a step may take, in megabytes; 0 without a limit. A resource, because results do not depend on it.
LIMIT = needs.in_bytes(config["machine"]["memory"] or "0MiB") // 10**6
# The steps that need no model in memory: megabytes and minutes.
SMALL_MEMORY, SMALL_TIME = 4000, 20
DOWNLOAD_TIME = 240


def size_for(input):
    """The size of the run that a job belongs to, by the documents among its inputs that exist."""
    documents = {kind: Path(getattr(input, kind)) for kind in KINDS if kind in input.keys()}
    return size_of_run(config, documents, DEVICE)


def memory(step):
    """`mem_mb` of a step that loads the model, as a function. It grows with each attempt."""
    return lambda wildcards, input, attempt: needs.megabytes(step, size_for(input), DEVICE, attempt)


def minutes(step, device=None, share=1.0):
    """`runtime` of a step that loads the model, as a function. It doubles with each attempt.

    `device` is that of the step, where it is not the run's. `share` is the share of the work that one job does.
    """
    return lambda wildcards, input, attempt, threads: needs.minutes(
        step, size_for(input), device or DEVICE, threads, attempt, share
    )


def doubled(first):
    """`runtime` of a step whose time does not depend on the model, as a function. It doubles with each attempt."""
    return lambda wildcards, attempt: first * 2 ** (attempt - 1)
