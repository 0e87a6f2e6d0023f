"""Choose a scheme for each unit of ops for growing budgets, and measure each choice on held-out samples.

A killed run resumes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run, read_parts
from auto_quantize_model.records import HeldOutPart, NotMeasured


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "scales", "capture")
    settings = ("score_store", "device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, "spec", *settings, writes=["frontier"])
    made.add_argument(
        "--heldout-parts", nargs="*", type=Path, default=[], metavar="FILE", help="all parts of the forwards, if any"
    )
    made.add_argument("--candidates", nargs="+", required=True, help="the schemes to choose from")
    made.add_argument("--target", type=cli.json_value, required=True, help="the config's profiles block as JSON")
    return made


def measure_frontier(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.config import DecideSpec, Target
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.decide import frontier
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.model import refusals
    from auto_quantize_model.replay.scales import ALL_BATCHES

    parts = read_parts(run, args.heldout_parts, "heldout", HeldOutPart)
    spec, target = read_block(DecideSpec, args.spec, "decide"), read_block(Target, args.target, "profiles")
    loaded = Loaded(run)
    if not spec.heldout_batches:
        run.write("frontier", args.frontier, NotMeasured("not_measured", "decide.heldout_batches is 0"))
        return
    frontier.options_of(run.plan, run.capture, args.candidates, spec)  # refuses a pattern before the long work
    device = loaded.device
    samples, answers = loaded.heldout(spec.heldout_batches)
    model = loaded.model_to_replay()
    if refused := refusals(model, run.plan.ops):
        reason = f"{len(refused)} ops, such as {min(refused)}, cannot be replayed"
        run.write("frontier", args.frontier, NotMeasured("not_measured", reason))
        return
    with explained_out_of_memory(device), cli.progress_bar("frontier") as on_progress:
        found = frontier.measure_frontier(
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
            loaded.batches(),
            on_progress,
            parts,
        )
    run.write("frontier", args.frontier, found)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), measure_frontier, argv)
