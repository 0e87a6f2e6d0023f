"""Explain why the worst units break in a scheme, and measure the cures that cost no bytes.

A killed run resumes.
"""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.records import NotMeasured
from auto_quantize_model.schemes.scheme import INC_INT8


def parser() -> argparse.ArgumentParser:
    samples = ("manifest", "calibration_manifest", "calibration_set", "heldout_set")
    reads = ("plan", "scales", "frontier", "profiles")
    settings = ("score_store", "device", "threads", "memory", "tf32", "nondeterministic", "config_digest", "log")
    return options.parser(__doc__, *samples, *reads, *settings, writes=["why"])


def explain_units(args: argparse.Namespace) -> None:
    run = open_run(args)
    if isinstance(run.frontier, NotMeasured):
        run.write("why", args.why, run.frontier)
        return
    if INC_INT8 in run.frontier.candidates:
        reason = "causes and cures are measured for schemes of compressed-tensors alone, and the candidate is inc_int8"
        run.write("why", args.why, NotMeasured("not_measured", reason))
        return
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.decide.causes import explain
    from auto_quantize_model.machine import explained_out_of_memory
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.replay.scales import ALL_BATCHES

    loaded = Loaded(run)
    device = loaded.device
    heldout, _ = loaded.heldout(run.frontier.batches)
    ranges = run.document("scales")["ranges"][ALL_BATCHES]
    seen = {name: (found.get("input") or {}).get("percentiles") or {} for name, found in ranges.items()}
    with explained_out_of_memory(device), cli.progress_bar("causes and cures") as on_progress:
        found = explain(
            loaded.model_to_replay(),
            run.plan,
            run.frontier,
            run.profiles,
            loaded.scales[ALL_BATCHES],
            seen,
            loaded.batches(),
            heldout,
            ScoreStore(args.score_store),
            on_progress,
        )
    run.write("why", args.why, found)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), explain_units, argv)
