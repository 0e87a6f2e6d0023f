"""A capture in parts on simulated nodes: wall time and overhead against the number of parts, and equal bytes.

    python benchmarks/parts.py [--parts 1 2 4 8] [--shape medium]

Each node is a process that is pinned to one core, with one thread. As many nodes run at once as there are cores. The
wall time is that of a cluster with a node for each part. It sums the longest part of the probes, the longest part of
the exact scores, and the join. Everything lies in tmp/bench/parts.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from auto_quantize_model import cli
from auto_quantize_model.made.shapes import SHAPES

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tmp" / "bench" / "parts"
CONFIG = {
    "calibration": {
        "name": "photos",
        "source": "local",
        "path": "photos/photos.jsonl",
        "num_samples": 3,
        "num_heldout": 1,
        "batch_size": 1,
        "heldout_batch_size": 1,
        "max_pixels": 50176,
    },
    "sensitivity": {
        "schemes": ["W8A8", "FP8_DYNAMIC", "NVFP4"],
        "maps": ["isolated"],
        "confidence_batches": 1,
        "exact": "top:10",
        "threads": 1,
    },
    "decide": {"heldout_batches": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of parts (1 2 4 8)")
    parser.add_argument("--shape", default="medium", choices=list(SHAPES), help="of the stand-in (medium: 148 million)")
    args = parser.parse_args()
    return cli.run(lambda: bench(args.parts, args.shape), None)


def bench(numbers: list[int], shape: str) -> None:
    results = prepared(shape)
    started = time.monotonic()
    command("capture_sensitivity", results, "--capture", FOLDER / "one.json", "--score-store", FOLDER / "scores_one")
    one = time.monotonic() - started
    print(f"one job: {one:.0f} s", flush=True)
    print("| parts | wall time, s | of one job | all parts, s | a part besides its measuring, s | bytes |")
    print("|---:|---:|---:|---:|---:|---|")
    for number in numbers:
        print(row(results, number, one), flush=True)


def prepared(shape: str) -> Path:
    """The folder of results with plan and scales, which the pipeline makes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    snapshot = FOLDER / f"standin_{shape}"
    if not snapshot.exists():
        made = [ROOT / "scripts" / "make_standin.py", "--snapshot", snapshot, "--shape", shape, "--small-tokenizer"]
        run([*made, "--photos", FOLDER / "photos"])
    config = CONFIG | {"model": {"name": shape, "source": "local", "path": str(snapshot)}}
    (FOLDER / "config.json").write_text(json.dumps(config))
    results = FOLDER / "results" / shape / "photos"
    snakemake = [sys.executable, "-m", "snakemake", "-s", ROOT / "workflow" / "Snakefile", "--directory", FOLDER]
    subprocess.run(
        [*map(str, snakemake), "--configfile", str(FOLDER / "config.json"), "--cores", "1", "--"]
        + [str((results / "scales_cpu.json").relative_to(FOLDER))],
        check=True,
        env=os.environ | {"PIPELINE_QUIET": "1"},
    )
    return results


def row(results: Path, number: int, one: float) -> str:
    """The line of the table for so many parts."""
    folder = FOLDER / f"in_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    probes = stage(results, folder, number, "probes", [])
    estimated = ["--estimated", *(folder / f"probes_{index}.json" for index in range(1, number + 1))]
    scores = stage(results, folder, number, "scores", estimated)
    measured = ["--measured", *(folder / f"scores_{index}.json" for index in range(1, number + 1))]
    started = time.monotonic()
    command("join_parts", results, *estimated, *measured, "--capture", folder / "capture.json")
    join = time.monotonic() - started
    wall = max(seconds for seconds, _ in probes) + max(seconds for seconds, _ in scores) + join
    both = [*probes, *scores]
    spent = sum(seconds for seconds, _ in both) + join
    besides = sum(seconds - measuring for seconds, measuring in both) / len(both)
    same = (folder / "capture.json").read_bytes() == (FOLDER / "one.json").read_bytes()
    return (
        f"| {number} | {wall:.0f} | {wall / one:.2f} | {spent:.0f} | {besides:.1f} |"
        f" {'those of one job' if same else 'DIFFER'} |"
    )


def stage(results: Path, folder: Path, number: int, kind: str, more: list[Any]) -> list[tuple[float, float]]:
    """The wall time of each part, and the time in which it measured, in seconds."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def part(index: int) -> tuple[float, float]:
        core, started = cores.get(), time.monotonic()
        written = ["--part", folder / f"{kind}_{index}.json", "--run-record", folder / f"{kind}_{index}.run.json"]
        place = ["--number", index, "--parts", number, "--score-store", folder / "scores"]
        command("measure_part", results, *written, *place, *more, core=core)
        cores.put(core)
        record = json.loads((folder / f"{kind}_{index}.run.json").read_text())
        return time.monotonic() - started, record["seconds"]

    with ThreadPoolExecutor(cores.qsize()) as pool:
        return list(pool.map(part, range(1, number + 1)))


def command(name: str, results: Path, *options: Any, core: int | None = None) -> None:
    """Run a step on the results, pinned to a core."""
    files = {
        "manifest": results.parent / "model_manifest.json",
        "calibration-manifest": results / "calibration_manifest.json",
        "plan": results / "plan.json",
        "scales": results / "scales_cpu.json",
    }
    given = [word for option, path in files.items() for word in (f"--{option}", path)]
    if name != "join_parts":
        given += ["--calibration-set", results / "calibration" / "calibration.parquet"]
        given += ["--device", "cpu", "--threads", 1, "--exact", CONFIG["sensitivity"]["exact"]]
        given += ["--candidates", "NVFP4", "FP8_DYNAMIC"]
    if "--run-record" not in options:
        given += ["--run-record", FOLDER / f"{name}.run.json"]
    run([ROOT / "scripts" / f"{name}.py", *given, *options], core)


def run(words: list[Any], core: int | None = None) -> None:
    """Run a script of the checkout; its output is shown where it fails."""
    cores = os.sched_getaffinity(0) if core is None else {core}
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=FOLDER,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if ended.returncode:
        raise SystemExit(f"{words[0]}: {ended.stdout}{ended.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
