"""Measure one part of the forwards of a frontier: those of the choices and controls that are known from the start.

A killed part resumes. `measure_frontier` takes all parts, and measures the choices that depend on what others lose.
"""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.records import HeldOutPart


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "scales", "capture")
    settings = ("score_store", "device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, "spec", *settings, writes=["part"])
    made.add_argument("--candidates", nargs="+", required=True, help="the schemes to choose from")
    made.add_argument("--target", type=cli.json_value, required=True, help="the config's profiles block as JSON")
    made.add_argument("--number", type=int, required=True, help="of the part, from 1")
    made.add_argument("--parts", type=int, required=True, help="how many parts share the work")
    return made


def measure_heldout(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.config import DecideSpec, Target
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.decide.in_parts import measure_part
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure.capture import arithmetic
    from auto_quantize_model.measure.parts import Place
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.model import refusals
    from auto_quantize_model.replay.scales import ALL_BATCHES

    spec, target = read_block(DecideSpec, args.spec, "decide"), read_block(Target, args.target, "profiles")
    loaded, place = Loaded(run), Place(args.number, args.parts)
    device = loaded.device
    samples, answers = loaded.heldout(spec.heldout_batches)
    model = loaded.model_to_replay()
    if refusals(model, run.plan.ops):  # the frontier says so
        nothing = HeldOutPart(number=place.number, parts=place.parts, arithmetic=arithmetic(device), records=())
        run.write("heldout", args.part, nothing)
        return
    with explained_out_of_memory(device), cli.progress_bar(f"held out, {place}") as on_progress:
        found = measure_part(
            model,
            run.plan,
            run.capture,
            args.candidates,
            loaded.scales[ALL_BATCHES],
            samples,
            answers,
            ScoreStore(args.score_store),
            spec,
            target,
            place,
            on_progress,
        )
    run.write("heldout", args.part, found)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), measure_heldout, argv)
