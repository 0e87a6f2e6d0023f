"""Measure on held-out samples what keeping ops in FP32 buys. A killed run resumes."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.files import digest_of
from auto_quantize_model.run import open_run


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "capture")
    settings = ("device", "tf32", "nondeterministic", "config_digest", "log")
    made = options.parser(__doc__, *reads, *settings, writes=["tradeoff"])
    made.add_argument("--batches", type=int, required=True, help="held-out batches to measure on; 0: none at all")
    made.add_argument("--greedy-candidates", type=int, default=0, help="ops that each greedy step tries; 0: no steps")
    made.add_argument("--greedy-ops", type=int, default=0, help="ops that are chosen greedily")
    return made


def measure_tradeoff(args: argparse.Namespace) -> None:
    from auto_quantize_model.decide.ranking import most_sensitive_first
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure import heldout
    from auto_quantize_model.measure.capture import arithmetic, fingerprint
    from auto_quantize_model.measure.journal import Journal
    from auto_quantize_model.replay.model import refusals

    run = open_run(args)
    if not args.batches:
        reason = "tradeoff.heldout_batches is 0"
        run.write("tradeoff", args.tradeoff, {"status": "not_measured", "reason": reason})
        return
    device = run.device
    batches = run.batches()
    samples, answers = run.heldout(args.batches)
    model = run.model()
    if refused := refusals(model, run.plan["ops"]):
        reason = f"{len(refused)} ops, such as {min(refused)}, cannot be replayed"
        run.write("tradeoff", args.tradeoff, {"status": "not_measured", "reason": reason})
        return
    ranking = most_sensitive_first(run.plan, run.capture)
    greedy = heldout.Greedy(args.greedy_candidates, args.greedy_ops)
    of = fingerprint(run.plan, device) | run.digests
    of |= {"ranking": digest_of(ranking), "batches": args.batches, "greedy": vars(greedy)}
    with Journal(args.tradeoff.with_name(f"{args.tradeoff.name}.journal"), of) as journal:
        if news := journal.news():
            cli.say(f"trade-off: {news}")
        with explained_out_of_memory(device), cli.progress_bar("trade-off") as on_progress:
            found = heldout.measure_tradeoff(
                model.to(device), run.plan, ranking, batches, samples, answers, journal, greedy, on_progress
            )
        measured_by = {"status": "measured", "device": device.type, **arithmetic()}
        run.write("tradeoff", args.tradeoff, measured_by | found)
        journal.remove()


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), measure_tradeoff, argv)
