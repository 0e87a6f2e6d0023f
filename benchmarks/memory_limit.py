"""A whole run of the 3B's stand-in with its weights in memory, and one within a limit: seconds, memory, equal bytes.

    make standin-3b && python benchmarks/memory_limit.py [--limit 10GiB]

The rival is the same command without `machine.memory`, which keeps 14 GiB of FP32 weights in memory. As root, each run
begins with an empty page cache, and a cgroup limits the second run. That limit counts pages of files too. So the
kernel drops pages of the weights' files where memory is short, and reads them again. Everything lies in
tmp/bench/memory.
"""

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from faults import digests

from auto_quantize_model import cli
from auto_quantize_model.files import InputError
from auto_quantize_model.free_memory import FILES, MOUNTED, OWN, memory_groups
from auto_quantize_model.needs import GIB, in_bytes

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tmp" / "bench" / "memory"
RESOURCES = ROOT / "resources"
CONFIGS = [str(ROOT / "config" / name) for name in ("qwen2_5_vl_3b.yaml", "standin.yaml")]
SHORT = 5  # seconds: steps that take less have no line of their own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", default="10GiB", help="machine.memory of the second run (10GiB)")
    args = parser.parse_args()
    return cli.run(lambda: bench(args.limit), None)


def bench(limit: str) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    seconds, peaks = {}, {}
    for name, memory in (("in_memory", None), ("limited", limit)):
        seconds[name], peaks[name] = measured(FOLDER / name, memory)
        told = f"{name}: {seconds[name]:.0f} s, at most {peaks[name] / GIB:.1f} GiB of anonymous memory"
        print(told, flush=True)
    print("\n".join(table(*(steps(FOLDER / name) for name in seconds))))
    print(f"from start to end: {seconds['limited'] / seconds['in_memory']:.3f} times the seconds")
    first, second = (digests(FOLDER / name) for name in seconds)
    other = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    print(f"{len(first)} results, {len(other)} with other bytes{': ' if other else ''}{', '.join(other)}")


def measured(directory: Path, memory: str | None) -> tuple[float, int]:
    """The seconds of a run in a directory, and the most bytes of anonymous memory that its processes had at a time."""
    directory.mkdir(parents=True)
    settings = [
        f"model={{path: '{RESOURCES / 'models' / 'qwen2_5_vl_3b_standin'}'}}",
        f"calibration={{path: '{RESOURCES / 'photos' / 'photos.jsonl'}'}}",
        "sensitivity={maps: [isolated], exact: 'top:16'}",
    ]
    settings += [f"machine={{memory: {memory}}}"] if memory else []
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile")]
    command += ["--directory", str(directory), "--cores", "2", "--resources", "gpu=0", "--configfile", *CONFIGS]
    with group(in_bytes(memory) if memory else None) as joined, open(directory / "log", "wb") as log:
        drop_pages()
        started = time.monotonic()
        running = subprocess.Popen(
            [*joined, *command, "--config", *settings], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        peak = peak_of(running)
        if running.wait():
            raise InputError(f"Snakemake ended with {running.returncode}; see {directory / 'log'}")
    return time.monotonic() - started, peak


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[list[str]]:
    """What to write before a command so that it runs in a cgroup with this limit; nothing where none can be made."""
    parent = next(memory_groups(OWN, MOUNTED), None)
    if limit is None or parent is None:
        yield []
        return
    made = parent / "memory_limit"
    joined = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(made / "cgroup.procs")]
    try:
        made.mkdir(exist_ok=True)
        next(made / name for name in FILES if (made / name).exists()).write_text(str(limit))
    except (OSError, StopIteration):
        print(
            "no cgroup could be made here, so the ratio is that of a run whose pages of files have no limit", flush=True
        )
        joined = []
    try:
        yield joined
    finally:
        with contextlib.suppress(OSError):
            made.rmdir()


def drop_pages() -> None:
    """Let the kernel forget the pages of files, where this process may ask for that."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache could not be emptied, because this process is not root", flush=True)


def peak_of(running: "subprocess.Popen[bytes]") -> int:
    """The most bytes of anonymous memory of a process and its children, until it has ended."""
    peak = 0
    while running.poll() is None:
        peak = max(peak, sum(anonymous(process) for process in family(running.pid)))
        time.sleep(0.2)
    return peak


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def anonymous(process: psutil.Process) -> int:
    """The bytes of a process's memory without pages of files."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def steps(directory: Path) -> dict[str, dict[str, float]]:
    """What Snakemake measured of each step: seconds, and megabytes read."""
    found = {}
    for path in (directory / "results").rglob("benchmarks/*.tsv"):
        with open(path, newline="") as file:
            (row,) = csv.DictReader(file, delimiter="\t")
        found[path.stem] = {name: float(row[name].replace("NA", "0")) for name in ("s", "io_in")}
    return found


def table(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of a table of two runs, the longest step first."""
    yield "| step | in memory, s | within the limit, s | ratio | read within the limit |"
    yield "|---|---:|---:|---:|---:|"
    rows = {name: (first[name], second[name]) for name in first}
    total = tuple({key: sum(step[key] for step in run.values()) for key in ("s", "io_in")} for run in (first, second))
    long = sorted((name for name in rows if second[name]["s"] > SHORT), key=lambda name: -second[name]["s"])
    for name, (before, after) in [*((f"`{name}`", rows[name]) for name in long), ("all steps", total)]:
        yield (
            f"| {name} | {before['s']:.0f} | {after['s']:.0f} | {after['s'] / before['s']:.2f} |"
            f" {after['io_in'] / 1000:.0f} GB |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
