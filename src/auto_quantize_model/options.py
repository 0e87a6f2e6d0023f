"""The options of the commands, each defined once, and the start of a command.

In: names of options. Out: a parser; and, from `start`, the exit code of a command.
"""

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from auto_quantize_model import cli
from auto_quantize_model.folders import SCORES, SCORES_PLACE

# Each file that a command reads or writes: its content, and the ending of its name where a command writes it.
FILES = {
    "manifest": ("the model's manifest", ".json"),
    "calibration_manifest": ("the calibration set's manifest", ".json"),
    "calibration_set": ("the calibration samples", ".parquet"),
    "heldout_set": ("the held-out samples", ".parquet"),
    "plan": ("the plan", ".json"),
    "scales": ("the scales of each calibration", ".json"),
    "tensors": ("scales and zero_points", ".safetensors"),
    "part": ("one part of the work", ".json"),
    "capture": ("the capture", ".json"),
    "run_record": ("times and host of the run", ".json"),
    "audit": ("the audit of the capture", ".json"),
    "frontier": ("the measured frontier", ".json"),
    "profiles": ("the profiles", ".json"),
    "why": ("what breaks the worst units, and what regains their loss", ".json"),
    "exports": ("the index of the exported profiles", ".json"),
    "record": ("the comparison of the quantized model with its profile", ".json"),
    "report": ("the report as data", ".json"),
    "markdown": ("the text for people", ".md"),
    "json": ("the same as data", ".json"),
    "ranking_table": ("the ranking as a table", ".csv"),
    "frontier_table": ("the frontier as a table", ".csv"),
    "profiles_table": ("the profiles as a table", ".csv"),
    "html": ("the page", ".html"),
    "into_markdown": ("the copy of the Markdown report", ".md"),
    "into_json": ("the copy of the JSON report", ".json"),
    "archive": ("the archive", ".tar"),
    "checksums": ("the sha256 of the archive and of each file in it", ".json"),
    "svg": ("the picture", ".svg"),
    "readme": ("the page, whose marked block is replaced", ".md"),
}
# Other options that several commands take, as keywords of `add_argument`.
SETTINGS: dict[str, dict[str, Any]] = {
    "spec": {
        "type": cli.json_value,
        "metavar": "JSON",
        "required": True,
        "help": "the config's block, as JSON",
    },
    "directory": {"type": Path, "metavar": "FOLDER", "required": True, "help": "the folder to write into"},
    "device": {"choices": ["auto", "cpu", "cuda"], "default": "auto", "help": "where to replay (auto: a GPU if any)"},
    "score_store": {
        "type": Path,
        "metavar": "FOLDER",
        "default": Path(os.environ.get(SCORES_PLACE) or SCORES),
        "help": "the store of all scores (%(default)s)",
    },
    "threads": {"type": int, "metavar": "N", "help": "CPU threads of torch (default: OMP_NUM_THREADS, or all cores)"},
    "memory": {
        "type": int,
        "metavar": "MB",
        "default": 0,
        "help": "memory that the step may take, in units of 10^6 bytes (0: what is free)",
    },
    "tf32": {"action": "store_true", "help": "let a GPU round float32 products to TF32"},
    "nondeterministic": {"action": "store_true", "help": "let torch choose faster algorithms"},
    "config_digest": {"help": "digest of the config that asks for the output; the output records it"},
    "log": {"type": Path, "metavar": "FILE", "help": "file for everything but progress, results and errors (.log)"},
}


def parser(
    description: str | None, *names: str, writes: Collection[str] = (), optional: Collection[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options of `FILES` and `SETTINGS` that a command takes.

    Args:
        description: the command's docstring.
        names: files that the command reads, and settings.
        writes: files that the command writes. `start` checks their names and places before the work.
        optional: those of the files that may be left out; they are None then.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*names, *writes):
        option = f"--{name.replace('_', '-')}"
        if name in SETTINGS:
            made.add_argument(option, **SETTINGS[name])
        else:
            holds, suffix = FILES[name]
            told = f"{'write' if name in writes else 'read'} {holds} ({suffix})"
            made.add_argument(option, type=Path, metavar="FILE", required=name not in optional, help=told)
    made.set_defaults(writes=tuple(writes))
    return made


def start(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse a command line, check the places of the outputs, do the work, and return the exit code of `cli.run`.

    Args:
        parser: as `parser` returns it.
        work: the command's work.
        argv: the command line without the command; None takes that of the process.
    """
    args = parser.parse_args(argv)

    def checked() -> None:
        cli.require_outputs(args, **{name: FILES[name][1] for name in args.writes})
        work(args)

    return cli.run(checked, getattr(args, "log", None))
