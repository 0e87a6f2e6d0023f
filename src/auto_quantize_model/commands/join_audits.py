"""Join the parts of an audit. The audit has the bytes that one job would have written."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run, read_parts
from auto_quantize_model.records import Audit


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "plan", "scales", "capture")
    made = options.parser(__doc__, *reads, "config_digest", "log", writes=["audit"])
    made.add_argument("--audited", nargs="+", type=Path, metavar="FILE", help="all parts, in their order")
    return made


def join_audits(args: argparse.Namespace) -> None:
    run = open_run(args)
    parts = read_parts(run, args.audited, "audit_part", Audit)
    from auto_quantize_model.inc.audit import joined

    found = joined(parts)
    run.write("audit", args.audit, found)
    cli.say(f"audit: {found.status}, {found.compared} values compared in {len(parts)} parts")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), join_audits, argv)
