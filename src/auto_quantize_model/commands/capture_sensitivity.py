"""Score every planned op on each batch, by the engine that the plan names. A killed run resumes."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.files import write_json
from auto_quantize_model.schemes.scheme import INC_INT8

if TYPE_CHECKING:
    from auto_quantize_model.measure.capture import Engine


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "plan", "scales")
    settings = ("score_store", "device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, *settings, writes=["capture", "run_record"])
    made.add_argument("--exact", default="auto", help="scores to measure: auto, all, none or top:N (%(default)s)")
    made.add_argument("--candidates", nargs="*", default=[], help="schemes in which units of several ops are measured")
    made.add_argument("--time-budget", metavar="TIME", help="time for the capture, such as 20m (no limit)")
    return made


def capture_sensitivity(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure import capture
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.scales import ALL_BATCHES

    loaded = Loaded(run)
    device = loaded.device
    batches = loaded.batches(run.plan.confidence_batches)
    by_inc = inc_engine() if run.plan.engine != "replay" else None
    with explained_out_of_memory(device), cli.progress_bar("capture") as on_progress:
        captured, record = capture.capture_sensitivity(
            loaded.model_to_replay(),
            batches,
            run.plan,
            ScoreStore(args.score_store),
            loaded.scales_of_batches(),
            on_progress,
            by_inc,
            loaded.scales.get(ALL_BATCHES),
            args.exact,
            args.time_budget,
            lambda text: cli.announce(f"capture: {text}"),
            [name for name in args.candidates if name != INC_INT8],
        )
    cli.say(f"capture: {capture.news(record)}")
    write_json(args.run_record, record)
    run.write("capture", args.capture, capture.described(captured, run.calibration))


def inc_engine() -> "Engine":
    """INC. It is imported only where a plan needs it, so machines that only replay need no INC."""
    from auto_quantize_model.inc.engine import measure_by_inc

    return measure_by_inc


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), capture_sensitivity, argv)
