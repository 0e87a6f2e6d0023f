"""Measure a sample of ops again with INC's unmodified helpers and compare: a difference on the CPU is an error.

Where the plan says that INC cannot measure the model, torch's own quantized modules measure instead.
"""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "plan", "scales", "capture")
    made = options.parser(__doc__, *reads, "config_digest", "log", writes=["audit"])
    made.add_argument("--ops", type=int, default=6, help="ops to compare, the most and least sensitive among them")
    return made


def audit_capture(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.inc import audit

    loaded = Loaded(run)
    batches = loaded.batches(run.plan.confidence_batches)
    cli.say(audit.announce(run.plan, run.capture, args.ops))
    with cli.progress_bar("audit") as on_progress:
        scales = loaded.scales_of_batches()
        result = audit.audit_capture(loaded.model(), batches, run.plan, run.capture, args.ops, scales, on_progress)
    run.write("audit", args.audit, result)
    cli.say(f"audit: {result.status}, {result.compared} values compared")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), audit_capture, argv)
