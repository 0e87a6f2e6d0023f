"""Run the pipeline on a real SLURM with two virtual nodes on this machine, and disturb it.

    python benchmarks/slurm.py [plain] [killed] [limit] [stopped] [failed] [--short]

Debian's munge and slurm-wlm must be installed, and root must start this. Daemons and nodes run in namespaces of their
own, so /etc/slurm and /run/munge of this machine stay as they are. All processes end with this script. A node has its
own host name and its own process ids, as another machine has.

The pipeline measures a tiny model. Every result must have the bytes of a run without SLURM. The cases:
`plain`: nothing disturbs the run. `--resources gpu=0` turns a config that asks for a GPU into a run on the CPU.
`killed`: the node of the capture is drained in the middle, and the job on it is killed.
`limit`: the capture hits its time limit in the middle.
`stopped`: a signal ends Snakemake, which cancels the job.
`failed`: the config asks for a GPU, the job finds none where it runs, and its own sentence is Snakemake's last.
With --short, `plain` ends with the scales, and only `failed` follows.
"""

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import yaml
from faults import CONFIG, ROOT, digests

from auto_quantize_model import cli
from auto_quantize_model.files import InputError, read_json
from auto_quantize_model.made.digits import build_snapshot

Found = TypeVar("Found")
FOLDER = Path("tmp/slurm")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort=16817
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1
KillWait=10
ReturnToService=2
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
"""
NODE = "NodeName={name} NodeHostName={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=16000 Gres=gpu:1\n"
PARTITION = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
PROFILE = ["--workflow-profile", "workflow/profiles/slurm", "--default-resources", "slurm_partition=main"]
# This cluster has no accounting, and nobody wants to wait for it.
QUICK = ["--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
QUICK += [
    "--seconds-between-status-checks",
    "2",
    "--jobs",
    "2",
    "--max-threads",
    "1",
    "--configfile",
    "config/tiny.yaml",
]
ON_GPU = "sensitivity={device: cuda}"
CAPTURE = "results/tiny/digits/capture_cpu.json"
SCALES = "results/tiny/digits/scales_cpu.json"
RECORD = "results/tiny/digits/op_sensitivity_mse_v2_cpu.run.json"
LIMIT = 600  # seconds that a step of this script may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["plain", "killed", "limit", "stopped", "failed"], help="(all)")
    parser.add_argument("--short", action="store_true", help="a run up to the scales, and the failure")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where all files go (%(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if why := why_not():
        print(f"error: {why}", file=sys.stderr)
        return 2
    if not args.inside:
        # The first process of the new namespace takes all others with it when it ends.
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.run([*spaces, sys.executable, *sys.argv, "--inside"]).returncode
    return cli.run(
        lambda: prove(args.folder.resolve(), ["plain", "failed"] if args.short else args.cases, args.short), None
    )


def why_not() -> str:
    """What this machine lacks for a SLURM of its own; empty if nothing."""
    if os.geteuid():
        return "only root can start SLURM's daemons; run as root"
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        return f"no {', '.join(missing)}; apt-get install munge slurm-wlm"
    return ""


def prove(folder: Path, cases: list[str], short: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run = Pipeline(environment(folder / "venv", "slurm.lock"), copied(folder / "checkout"))
    wanted = [SCALES] if short else []
    run.local(wanted)
    expected = digests(run.checkout)
    with cluster(folder / "cluster"):
        for case in [plain, killed, limit, stopped, failed]:
            if case.__name__ not in cases:
                continue
            started = time.monotonic()
            case(run, wanted)
            found = digests(run.checkout)
            if differing := [name for name in found | expected if found.get(name) != expected.get(name)]:
                raise InputError(f"{case.__name__}: {', '.join(differing)} differ from those of a local run")
            seconds = time.monotonic() - started
            cli.say(f"{case.__name__}: {len(expected)} files with the bytes of a local run, {seconds:.0f} s")


def environment(folder: Path, *locks: str) -> Path:
    """The Python of this environment with the packages of more locks, which are installed into another folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "base.pth").write_text(str(next(path for path in sys.path if path.endswith("site-packages"))))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wanted = [part for lock in locks for part in ("-r", ROOT / "envs" / lock)]
    subprocess.run([*install, "--target", site, *wanted], check=True)
    return folder / "bin" / "python"


def copied(folder: Path) -> Path:
    """A copy of the working tree with a tiny model and a config for it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    build_snapshot(folder / CONFIG["model"]["path"], depth=1, hidden=32, seed=0)
    return folder


class Pipeline:
    """The pipeline in a checkout, on this host or on the cluster."""

    def __init__(self, python: Path, checkout: Path) -> None:
        self.python, self.checkout = python, checkout
        self.log = checkout / "snakemake.log"

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        """Snakemake with settings in its environment; its output goes to `log`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "PYTHONPATH"))}
        with open(self.log, "wb") as file:
            return subprocess.Popen(
                [self.python, "-m", "snakemake", *arguments],
                cwd=self.checkout,
                env=kept | settings,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def finish(self, running: subprocess.Popen[bytes], status: int = 0) -> str:
        """What Snakemake said until its end, which must have this exit status."""
        if running.wait(LIMIT) != status:
            raise InputError(f"Snakemake ended with {running.returncode}, not {status}; see {self.log}")
        return self.log.read_text()

    def local(self, wanted: list[str]) -> None:
        arguments = ["--cores", "1", "--resources", "gpu=1", "--configfile", "config/tiny.yaml", "--", *wanted]
        self.finish(self.start(*arguments))

    def on_cluster(self, wanted: list[str], *more: str) -> subprocess.Popen[bytes]:
        return self.start(*PROFILE, *QUICK, *more, "--", *wanted)

    def empty(self) -> None:
        """Remove what the workflow wrote."""
        for path in [*self.checkout.glob("results/*/"), self.checkout / "context", self.checkout / ".snakemake"]:
            shutil.rmtree(path, ignore_errors=True)

    def forget_capture(self) -> None:
        """Remove the capture and all scores, and keep what was made before and after."""
        for name in (CAPTURE, RECORD):
            (self.checkout / name).unlink()
        shutil.rmtree(self.checkout / "results" / "scores")

    def host(self) -> str:
        """The host on which the capture ended."""
        return str(read_json(self.checkout / RECORD)["host"])

    def resumed(self) -> int:
        """How many scores the capture found in the store."""
        return int(read_json(self.checkout / RECORD)["resumed_scores"])

    def in_the_middle(self) -> psutil.Process:
        """The capture, when it has stored scores, stopped."""

        def capture() -> psutil.Process | None:
            if not any(path.read_bytes().count(b"\n") > 4 for path in self.checkout.glob("results/scores/*.jsonl")):
                return None
            for process in psutil.process_iter(["cmdline"]):
                if "scripts/capture_sensitivity.py" in (process.info["cmdline"] or [])[1:2]:
                    return process
            return None

        process = until(capture, "a capture with scores", 0.02)
        process.suspend()
        return process


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A SLURM with two nodes, in this process's own namespaces."""
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    for place in ("/etc/slurm", "/run/munge"):
        Path(place).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    shutil.chown("/run/munge", "munge", "munge")
    Path("/run/munge").chmod(0o755)
    host = platform.node()
    nodes = [NODE.format(name=name, host=host, port=16821 + index) for index, name in enumerate(NODES)]
    text = CONFIGURATION.format(host=host, state=folder) + "".join(nodes) + PARTITION
    Path("/etc/slurm/slurm.conf").write_text(text)
    Path("/etc/slurm/gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu Count=1 File=/dev/null\n")
    running = [daemon(folder, "runuser", "-u", "munge", "--", "munged", "--foreground")]
    until(Path("/run/munge/munge.socket.2").exists, "munge")
    running.append(daemon(folder, "slurmctld", "-D", "-i"))
    for node in NODES:
        alone = ["unshare", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child", "bash", "-c"]
        running.append(daemon(folder, *alone, f"hostname {node}; exec slurmd -D -N {node}"))
    until(lambda: tell("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(NODES), "idle nodes")
    try:
        yield
    finally:
        for process in reversed(running):
            process.kill()  # of a namespace: the kernel ends all processes in it


def daemon(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    with open(folder / "daemons.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd="/")


def tell(*command: str) -> str:
    """What a command of SLURM says; empty while the controller starts."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def until(found: Callable[[], Found], what: str, seconds: float = 0.5) -> Found:
    """Wait for a value that counts as true."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(seconds)
    raise InputError(f"no {what} after {LIMIT} s")


def plain(run: Pipeline, wanted: list[str]) -> None:
    run.empty()
    said = run.finish(run.on_cluster(wanted, "--config", ON_GPU, "--resources", "gpu=0"))
    if "has been submitted with SLURM jobid" not in said:
        raise InputError(f"no job went to SLURM; see {run.log}")
    if not wanted and run.host() not in NODES:
        raise InputError(f"the capture ran on {run.host()}, and not on {' or '.join(NODES)}")


def killed(run: Pipeline, wanted: list[str]) -> None:
    run.forget_capture()
    running = run.on_cluster([CAPTURE])
    capture = run.in_the_middle()
    job, node, _ = running_job()
    tell("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    capture.kill()
    run.finish(running)
    tell("scontrol", "update", f"nodename={node}", "state=resume")
    require_resumed(run)
    if run.host() == node:
        raise InputError(f"the capture ended on {node}, which was drained")


def limit(run: Pipeline, wanted: list[str]) -> None:
    run.forget_capture()
    running = run.on_cluster([CAPTURE])
    run.in_the_middle()
    job, _, minutes = running_job()
    tell("scontrol", "update", f"jobid={job}", "timelimit=1")
    _, _, doubled = until(lambda: running_job() if running_job()[:1] not in ((), (job,)) else None, "second job")
    said = run.finish(running)
    require_resumed(run)
    if doubled != 2 * minutes:
        raise InputError(f"{minutes} minutes at first, and then {doubled}")
    if not re.search("^stopped by SIG(TERM|HUP); run again to resume$", said, re.MULTILINE):
        raise InputError(f"the sentence of the stopped job is not in {run.log}")


def stopped(run: Pipeline, wanted: list[str]) -> None:
    run.forget_capture()
    running = run.on_cluster([CAPTURE])
    run.in_the_middle()
    running.send_signal(signal.SIGTERM)
    run.finish(running, 1)
    until(lambda: not tell("squeue", "-h"), "end of the cancelled job")
    run.finish(run.on_cluster([CAPTURE]))
    require_resumed(run)


def failed(run: Pipeline, wanted: list[str]) -> None:
    scales = SCALES.replace("cpu", "cuda")
    said = run.finish(run.on_cluster([scales], "--config", ON_GPU, "--retries", "0"), 1)
    last = said.splitlines()[-1]
    if not last.startswith("error: no GPU that this build of torch"):
        raise InputError(f"Snakemake's last line is {last!r}; see {run.log}")


def running_job() -> tuple[str, str, int] | tuple[()]:
    """Id, node and minutes of the job that runs."""
    told = tell("squeue", "-h", "-t", "R", "-o", "%i %N %l").split()
    return (told[0], told[1], in_minutes(told[2])) if told else ()


def in_minutes(limit: str) -> int:
    """A time limit of SLURM, such as `11:00` or `1-02:30:00`, in minutes."""
    days, _, time_of_day = limit.rpartition("-")
    *hours, minutes, _ = map(int, time_of_day.split(":"))
    return 60 * (24 * int(days or 0) + sum(hours)) + minutes


def require_resumed(run: Pipeline) -> None:
    if not run.resumed():
        raise InputError("the capture began again, and did not resume with its scores")


if __name__ == "__main__":
    sys.exit(main())
