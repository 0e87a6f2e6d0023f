"""Do one part of a capture: its share of the probes, or with --estimated its share of the exact scores.

A killed part resumes. `join_parts` makes the capture of all parts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run, read_parts
from auto_quantize_model.files import write_json
from auto_quantize_model.records import Part
from auto_quantize_model.schemes.scheme import INC_INT8


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "plan", "scales")
    settings = ("score_store", "device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, *settings, writes=["part", "run_record"])
    made.add_argument("--number", type=int, required=True, help="of the part, from 1")
    made.add_argument("--parts", type=int, required=True, help="how many parts share the work")
    made.add_argument("--exact", default="auto", help="scores to measure: auto, all, none or top:N (%(default)s)")
    made.add_argument("--candidates", nargs="*", default=[], help="schemes in which units of several ops are measured")
    made.add_argument(
        "--estimated", nargs="*", type=Path, metavar="FILE", help="all parts of the probes; measures exact scores"
    )
    return made


def measure_part(args: argparse.Namespace) -> None:
    run = open_run(args)
    estimated = None if args.estimated is None else read_parts(run, args.estimated, "probes", Part)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure import capture, parts
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.scales import ALL_BATCHES

    loaded, place = Loaded(run), parts.Place(args.number, args.parts)
    device = loaded.device
    batches = loaded.batches(run.plan.confidence_batches)
    with explained_out_of_memory(device), cli.progress_bar(str(place)) as on_progress:
        part, record = parts.measure_part(
            loaded.model_to_replay(),
            batches,
            run.plan,
            ScoreStore(args.score_store),
            place,
            loaded.scales_of_batches(),
            loaded.scales.get(ALL_BATCHES),
            args.exact,
            [name for name in args.candidates if name != INC_INT8],
            estimated,
            on_progress,
            lambda text: cli.announce(f"capture: {text}"),
        )
    cli.say(f"capture, {place}: {capture.news(record)}")
    write_json(args.run_record, record)
    run.write("probes" if estimated is None else "scores", args.part, part)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), measure_part, argv)
