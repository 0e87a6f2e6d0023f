"""Name profiles from the measured keep-lists: minimal to max, and the smallest list that reaches the target."""

import argparse
from collections.abc import Sequence
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.records import body_of

SHOWN = 12  # names on the terminal; the file and the report list all


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "tradeoff", "plan", "config_digest", "log", writes=["profiles"], optional=["plan"])
    made.add_argument("--target", type=cli.json_value, required=True, help="the config's profiles block as JSON")
    return made


def build_profiles(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.config import Target
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.decide import profiles
    from auto_quantize_model.report import coverage, sentences

    found = profiles.build_profiles(run.tradeoff, read_block(Target, args.target, "profiles"))
    run.write("profiles", args.profiles, found)
    known: dict[str, Any] = {"profiles": body_of(found), "tradeoff": body_of(run.tradeoff)}
    if "plan" in run.has:  # without the plan the share of the weights is unknown
        known["coverage"] = run.plan.coverage
        cli.say(f"profiles: {coverage.headline(len(run.plan.ops), run.plan.coverage)}")
        for warning in coverage.warnings(run.plan.coverage):
            cli.say(f"warning: {warning}")
    cli.say(f"recommended: {' '.join(filter(None, sentences.decision(known)))}")
    best = found.profiles.get("recommended", found.knee)
    if best and best.kept:
        where = "recommended" if "recommended" in found.profiles else "the knee"
        cli.say(f"{where} keeps: {', '.join([*best.kept[:SHOWN], *['...'] * (len(best.kept) > SHOWN)])}")
    for remark in sentences.remarks(known):
        cli.say(f"remark: {remark}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), build_profiles, argv)
