"""Which host and which Snakemake a job belongs to. A process id means something on its own host alone.

In: the environment that the workflow gave its jobs. Out: whether the workflow of this host has ended.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import psutil

PID = "PIPELINE_PID"  # of the Snakemake process that starts the job
HOST = "PIPELINE_HOST"  # where that process runs, as `this_host` names it


def this_host() -> str:
    """This host until its next boot, and the namespace of its process ids, which each container has for itself."""
    try:
        boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:  # another system than Linux
        boot = namespace = ""
    return f"{platform.node()} {boot} {namespace}".strip()


def workflow_process(environment: Mapping[str, str]) -> int | None:
    """The process id of this job's Snakemake; None without one on this host."""
    pid = environment.get(PID, "")
    here = this_host()
    return int(pid) if pid.isdecimal() and environment.get(HOST, here) == here else None


def has_ended(pid: int) -> bool:
    """Whether a process has ended. A process that nobody has waited for has ended too."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
