"""Join the parts of a capture. The capture has the bytes that one job would have written."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run, read_parts
from auto_quantize_model.files import read_json, write_json
from auto_quantize_model.records import Part


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "plan", "scales")
    made = options.parser(__doc__, *reads, "config_digest", "log", writes=["capture", "run_record"])
    made.add_argument("--estimated", nargs="*", type=Path, default=[], metavar="FILE", help="all parts of the probes")
    made.add_argument("--measured", nargs="+", type=Path, metavar="FILE", help="all parts of the exact scores")
    made.add_argument("--records", nargs="*", type=Path, default=[], metavar="FILE", help="the run record of each part")
    return made


def join_parts(args: argparse.Namespace) -> None:
    run = open_run(args)
    estimated, measured = (
        read_parts(run, paths, kind, Part) for paths, kind in ((args.estimated, "probes"), (args.measured, "scores"))
    )
    from auto_quantize_model.measure import capture, parts

    joined = parts.joined(run.plan, estimated, measured)
    write_json(args.run_record, {"parts": {path.stem: read_json(path) for path in args.records}})
    run.write("capture", args.capture, capture.described(joined, run.calibration))
    cli.say(f"capture: {len(joined.scores)} scores of {len(measured)} parts")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), join_parts, argv)
