"""Calibrate once: find the scale and zero_point of every op's input and output, and record what the observers saw.

Each scored batch is calibrated alone, as INC does for a score. With --whole-set, all batches are calibrated together
as well, as for a deployed model; the frontier needs these scales.
"""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "plan")
    settings = ("device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, *settings, writes=["scales", "tensors"])
    made.add_argument("--whole-set", action="store_true", help="calibrate on all batches together as well")
    return made


def calibrate_scales(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.replay.calibrate import calibrate
    from auto_quantize_model.replay.scales import ranges, write_scales

    loaded = Loaded(run)
    device = loaded.device
    batches = loaded.batches(None if args.whole_set else run.plan.confidence_batches)
    with explained_out_of_memory(device), cli.progress_bar("scales") as on_progress:
        found = calibrate(loaded.model_to_replay(), run.plan, batches, args.whole_set, on_progress)
    write_scales(args.tensors, found)
    run.write("scales", args.scales, {"device": device.type, "ranges": ranges(found)}, [args.tensors])
    cli.say(f"scales: {len(run.plan.ops)} ops, {len(found)} calibrations")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), calibrate_scales, argv)
