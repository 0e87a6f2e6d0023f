"""How much memory this process can still take: what the machine has free, or less where a cgroup limits the job.

In: Linux's files about cgroups, of version 1 or 2. Out: bytes, and whose limit they are. A scheduler or a container
engine sets such limits. The kernel kills a process that exceeds one, whatever the machine has free.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

OWN = Path("/proc/self/cgroup")  # in which groups this process is
MOUNTED = Path("/sys/fs/cgroup")
FILES = {  # by the file with the limit: the file with the usage
    "memory.max": "memory.current",
    "memory.limit_in_bytes": "memory.usage_in_bytes",
}
# Pages of files, which the kernel drops where memory is short. Version 1 has sums with the groups inside.
PAGES = (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file"))


class Free(NamedTuple):
    """Bytes, and the place that has them, as the subject of a sentence."""

    bytes: int
    place: str


def free_memory(own: Path = OWN, mounted: Path = MOUNTED) -> Free:
    """The memory that this process can still take.

    Args:
        own: the list of this process's cgroups.
        mounted: where the files of cgroups are.
    """
    machine = Free(psutil.virtual_memory().available, "this machine")
    left = [Free(left, "this job's cgroup") for group in memory_groups(own, mounted) for left in left_in(group)]
    return min(machine, *left) if left else machine


def memory_groups(own: Path, mounted: Path) -> Iterator[Path]:
    """The folders of the cgroups that limit this process's memory: its own, and those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # another system than Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mounted / controllers  # version 2 names no controllers
        group = root / path.lstrip("/")
        # In a container the path may be that outside, and its own group is then the root.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir())


def left_in(group: Path) -> Iterator[int]:
    """The bytes that a cgroup leaves; nothing without a limit."""
    for limit, usage in FILES.items():
        try:
            most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            pages = next(names for names in PAGES if names[0] in stat)
            yield int(most) - used + sum(int(stat[name]) for name in pages)
