"""Measure on held-out samples how much error keeping ops in FP32 removes. A killed run resumes."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.records import NotMeasured


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "scales", "capture")
    settings = ("score_store", "device", "threads", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, *settings, writes=["tradeoff"])
    made.add_argument("--batches", type=int, required=True, help="held-out batches to measure on; 0: no measurement")
    made.add_argument("--greedy-candidates", type=int, default=0, help="ops that each greedy step tries; 0: no steps")
    made.add_argument("--greedy-ops", type=int, default=0, help="number of greedy steps, each of which keeps one op")
    return made


def measure_tradeoff(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.config import TradeoffSpec
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.decide.ranking import most_sensitive_first
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure import heldout
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.model import refusals
    from auto_quantize_model.replay.scales import ALL_BATCHES

    greedy = {"greedy_candidates": args.greedy_candidates, "greedy_ops": args.greedy_ops}
    spec = read_block(TradeoffSpec, {"heldout_batches": args.batches, **greedy}, "tradeoff")
    loaded = Loaded(run)
    if not spec.heldout_batches:
        run.write("tradeoff", args.tradeoff, NotMeasured("not_measured", "tradeoff.heldout_batches is 0"))
        return
    device = loaded.device
    batches = loaded.batches()
    samples, answers = loaded.heldout(spec.heldout_batches)
    model = loaded.model()
    if refused := refusals(model, run.plan.ops):
        reason = f"{len(refused)} ops, such as {min(refused)}, cannot be replayed"
        run.write("tradeoff", args.tradeoff, NotMeasured("not_measured", reason))
        return
    ranking = most_sensitive_first(run.plan, run.capture)
    with explained_out_of_memory(device), cli.progress_bar("trade-off") as on_progress:
        found = heldout.measure_tradeoff(
            model.to(device),
            run.plan,
            ranking,
            batches,
            samples,
            answers,
            ScoreStore(args.score_store),
            spec,
            loaded.scales[ALL_BATCHES],
            on_progress,
        )
    run.write("tradeoff", args.tradeoff, found)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), measure_tradeoff, argv)
