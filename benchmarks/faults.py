"""Kill the pipeline at random moments and damage the files between its steps: figures for docs/reliability.md.

    python benchmarks/faults.py [kills] [intermediates] [--kills 26] [--cases 150] [--seed 0]

Both parts work on a clone of the last commit in tmp/faults, with a Qwen2.5-VL of one layer in each tower.
`kills`: the workflow is started and killed in every rule in turn, until it ends by itself. Then every result is
compared with the result of an undisturbed run. `intermediates`: a file between two steps is damaged, and a script that
reads the file is run by the workflow's own command.
"""

import argparse
import contextlib
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from damages import DAMAGES, Damage

from auto_quantize_model import cli
from auto_quantize_model.files import write_json
from auto_quantize_model.made.digits import build_snapshot

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("tmp/faults")
CONFIG: dict[str, Any] = {
    "model": {"name": "tiny", "source": "local", "path": "resources/models/tiny"},
    "calibration": {"num_samples": 4, "num_heldout": 4, "heldout_batch_size": 2},
    "sensitivity": {"confidence_batches": 1, "audit_ops": 2},
    "decide": {"heldout_batches": 1, "points": 3},
}
COMMAND = ["--cores", "1", "--resources", "gpu=1", "--configfile", "config/faults.yaml"]
LIMIT = 600  # seconds that a run may take before it counts as a hang
ENDING = 30  # seconds that processes may outlive a kill
# Files that differ from run to run: times, hosts, and the records of Snakemake.
VOLATILE = re.compile(r"(^|/)(logs|benchmarks|scores|\.snakemake)/|\.run\.json$|/\.[^/]*$")
# The temporary name of a file that this project writes.
LEFTOVER = re.compile(r"\.auto-quantize-[0-9a-f]+-[0-9a-f]{8}$")


@dataclass
class Tally:
    """The results of one kind of kill."""

    kills: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    unlocks: int = 0
    hangs: int = 0
    orphans: int = 0
    failed: int = 0
    leftovers: int = 0
    differing: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["kills", "intermediates"], help="what to try")
    parser.add_argument("--kills", type=int, default=26, help="kills of each kind, at least (default: 26)")
    parser.add_argument("--cases", type=int, default=150, help="damaged files (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and cases (default: 0)")
    args = parser.parse_args()
    return cli.run(lambda: faults(args), None)


def faults(args: argparse.Namespace) -> None:
    checkout = cloned(FOLDER / "checkout")
    reference, commands, seconds = undisturbed(checkout)
    for part in args.parts:
        if part == "kills":
            kill_campaign(args, checkout, reference, seconds)
        else:
            damage_campaign(args, checkout, commands)


def cloned(folder: Path) -> Path:
    """A clone of the last commit with the campaign's config and model."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    (folder / "config" / "faults.yaml").write_text(yaml.safe_dump(CONFIG))
    build_snapshot(folder / CONFIG["model"]["path"], depth=1, hidden=32, seed=0)
    return folder.resolve()


def started(checkout: Path, log: Path) -> subprocess.Popen[bytes]:
    """Snakemake in a process group of its own, as a terminal starts a command."""
    command = [sys.executable, "-m", "snakemake", *COMMAND]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIPELINE_PID")}
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def undisturbed(checkout: Path) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """The digests of all results of an undisturbed run, the command of each script, and the seconds of each rule."""
    log = checkout / "reference.log"
    process = started(checkout, log)
    if process.wait(LIMIT):
        raise SystemExit(f"error: the undisturbed run failed; see {log}")
    commands = {
        match[1]: match[0] for match in re.finditer(r"python scripts/(\w+)\.py .*", log.read_text(), re.MULTILINE)
    }
    seconds = {}
    for table in checkout.glob("results/**/benchmarks/*.tsv"):
        seconds[table.stem] = float(table.read_text().splitlines()[1].split("\t")[0])
    cli.say(f"undisturbed: {len(commands)} scripts in {sum(seconds.values()):.0f} s")
    return digests(checkout), commands, seconds


def digests(checkout: Path) -> dict[str, str]:
    """The sha256 of every result that has to be the same in every run."""
    files = [path for folder in ("results", "context") for path in (checkout / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(checkout).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items() if not VOLATILE.search(name)
    }


def emptied(checkout: Path) -> None:
    """Remove what the workflow wrote, so that the next run does everything."""
    for name in ("results", "context", ".snakemake"):
        shutil.rmtree(checkout / name, ignore_errors=True)
    subprocess.run(["git", "checkout", "--quiet", "--", "."], cwd=checkout, check=True)


def kill_campaign(
    args: argparse.Namespace, checkout: Path, reference: dict[str, str], seconds: dict[str, float]
) -> None:
    """Kill the group, Snakemake alone, and the job alone, until each kind has had its number of kills."""
    draw = random.Random(args.seed)
    tallies = {}
    for kind, kill in KILLS.items():
        tally = tallies[kind] = Tally()
        while tally.kills < args.kills:
            emptied(checkout)
            sweep(checkout, kill, tally, draw, seconds)
            found = digests(checkout)
            tally.differing += sum(found.get(name) != reference.get(name) for name in {*found, *reference})
            tally.leftovers += sum(1 for path in leftovers(checkout))
            cli.say(f"{kind}: {tally}")
    rows = [
        f"| {kind} | {tally.kills} | {len(tally.rules)} of {len(seconds)} | {tally.unlocks} | {tally.orphans} |"
        f" {tally.hangs} | {tally.failed} | {tally.leftovers} | {tally.differing} of {len(reference)} files |"
        for kind, tally in tallies.items()
    ]
    head = "| killed | kills | rules hit | `--unlock` needed | processes left after 30 s | hangs | runs that failed by"
    head += " themselves | files left behind | results that differ |"
    cli.say("\n".join([head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|", *rows]))
    write_json(FOLDER / "kills.json", {kind: vars(tally) for kind, tally in tallies.items()})


def sweep(
    checkout: Path,
    kill: Callable[[subprocess.Popen[bytes]], None],
    tally: Tally,
    draw: random.Random,
    seconds: dict[str, float],
) -> None:
    """Run the workflow to its end, killed once in every rule."""
    waiting = set(seconds)
    log = checkout / "run.log"
    for _ in range(4 * len(seconds)):
        process = started(checkout, log)
        rule = next_rule(process, log, waiting)
        if rule is None:
            if process.returncode == 0:
                return
            if "LockException" in log.read_text():
                tally.unlocks += 1
                subprocess.run(
                    [sys.executable, "-m", "snakemake", *COMMAND, "--unlock"], cwd=checkout, capture_output=True
                )
            elif process.returncode is None:
                tally.hangs += 1
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            else:
                tally.failed += 1
                shutil.copy(log, checkout / f"failed-{tally.failed}.log")
            continue
        waiting.discard(rule)
        time.sleep(draw.uniform(0, seconds[rule]))
        if process.poll() is None:
            kill(process)
            tally.kills += 1
            tally.rules[rule] += 1
        tally.orphans += outliving(checkout, process)
    raise SystemExit(f"error: the workflow did not end after {4 * len(seconds)} starts; see {log}")


def next_rule(process: subprocess.Popen[bytes], log: Path, waiting: set[str]) -> str | None:
    """The first rule of `waiting` that a run begins; None if the run ends or takes too long before."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        ended = process.poll() is not None
        begun = re.findall(r"^(?:local)?rule (\w+):", log.read_text(errors="replace"), re.MULTILINE)
        if begun and begun[-1] in waiting and not ended:
            return begun[-1]
        if ended:
            return None
        time.sleep(0.05)
    return None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill Snakemake and its job at once, as the kernel does for a container that is stopped."""
    os.killpg(process.pid, signal.SIGKILL)


def kill_snakemake(process: subprocess.Popen[bytes]) -> None:
    """Kill Snakemake alone; its job continues."""
    process.kill()


def kill_job(process: subprocess.Popen[bytes]) -> None:
    """Kill the job alone, as the kernel does when memory runs out."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            if any("scripts/" in word for word in child.cmdline()):
                child.kill()


KILLS = {"the group": kill_group, "Snakemake alone": kill_snakemake, "the job alone": kill_job}


def outliving(checkout: Path, process: subprocess.Popen[bytes]) -> int:
    """The number of processes of the workflow half a minute after a kill; they are ended then."""
    until = time.monotonic() + ENDING
    while left := list(processes_in(checkout)):
        if time.monotonic() > until:
            for orphan in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
            process.wait()
            return len(left)
        process.poll()
        time.sleep(0.1)
    process.wait()
    return 0


def processes_in(checkout: Path) -> Iterator[psutil.Process]:
    """The living processes whose working directory is the checkout."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.cwd() == str(checkout) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def leftovers(checkout: Path) -> Iterator[Path]:
    """Files and folders that a writer left under its temporary name."""
    for folder in ("results", "context", "resources"):
        for path in (checkout / folder).rglob(".*"):
            if LEFTOVER.match(path.name) and ".snakemake" not in path.parts:
                yield path


def cut(path: Path) -> None:
    """Cut the file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """Turn one bit in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TABLE_DAMAGES: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "cut": cut,
    "a bit flipped": flipped,
    "text": lambda path: path.write_text("a,b\n1,2\n") and None,
}


def damage_campaign(args: argparse.Namespace, checkout: Path, commands: dict[str, str]) -> None:
    """Damage a file, run one script that reads the file, and judge how it ends."""
    draw = random.Random(args.seed)
    readers = {
        (script, word)
        for script, command in commands.items()
        for word in options_read(command)
        if word.endswith((".json", ".parquet")) and word.startswith("results/")
    }
    counts: Counter[str] = Counter()
    for number in range(args.cases):
        script, name = draw.choice(sorted(readers))
        damages = TABLE_DAMAGES if name.endswith(".parquet") else DAMAGES
        damage = draw.choice(sorted(damages))
        outcome, said = tried(checkout, checkout / name, damages[damage], commands[script])
        counts[outcome] += 1
        if outcome != REFUSED:
            cli.say(f"{outcome}: {script} with {name} ({damage}): {said}")
        if (number + 1) % 25 == 0:
            cli.say(f"{number + 1} of {args.cases}: {dict(counts)}")
    cli.say(
        f"{args.cases} damaged files, {len(readers)} pairs of script and file: "
        + ", ".join(f"{outcome} {counts[outcome]}" for outcome in (REFUSED, *FAULTS))
    )
    write_json(FOLDER / "intermediates.json", {"cases": args.cases, "pairs": len(readers), "outcomes": counts})


REFUSED = "refused in one line that names the file"
FAULTS = ("refused without the file's name", "traceback", "hang", "accepted wrongly")
# The options of the scripts that name what a script writes.
WRITTEN = {
    "get_model.py": {"--manifest"},
    "extract_calibration.py": {"--calibration-manifest", "--calibration-set", "--heldout-set"},
    "plan_quantization.py": {"--plan"},
    "calibrate_scales.py": {"--scales", "--tensors"},
    "capture_sensitivity.py": {"--capture", "--run-record"},
    "audit_capture.py": {"--audit"},
    "measure_frontier.py": {"--frontier"},
    "build_profiles.py": {"--profiles"},
    "explain_units.py": {"--why"},
    "render_report.py": {"--json", "--markdown"},
    "archive_results.py": {"--checksums", "--archive"},
    "publish_summary.py": {"--into-json", "--into-markdown"},
}


def options_read(command: str) -> Iterator[str]:
    """The words of a command that name the files that the script reads."""
    words = shlex.split(command)
    written = WRITTEN.get(Path(words[1]).name, set())
    option = ""
    for word in words[2:]:
        if word.startswith("--"):
            option = word
        elif option not in written:
            yield word


def tried(checkout: Path, path: Path, damage: Damage, command: str) -> tuple[str, str]:
    """The end of a script on a damaged file, and the last line of its output; all files are restored afterwards."""
    kept = path.read_bytes()
    made = {found: found.read_bytes() for found in checkout.glob("results/**/*") if found.is_file()}
    damage(path)
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    words = [sys.executable, *shlex.split(command)[1:]]
    try:
        ended = subprocess.run(
            words,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return "hang", ""
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
        for found, data in made.items():
            if not found.is_file() or found.read_bytes() != data:
                found.parent.mkdir(parents=True, exist_ok=True)
                found.write_bytes(data)
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    last = said[-1] if said else ""
    if "Traceback" in ended.stderr or ended.returncode not in (0, 2):
        return "traceback", last
    if ended.returncode == 0:
        return "accepted wrongly", last
    named = last.startswith("error: ") and path.relative_to(checkout).as_posix() in last
    return (REFUSED if named else "refused without the file's name"), last


if __name__ == "__main__":
    raise SystemExit(main())
