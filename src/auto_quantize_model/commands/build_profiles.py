"""Name profiles from the measured frontier: smallest, balanced and safest."""

import argparse
from collections.abc import Sequence
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.records import body_of


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "frontier", "plan", "config_digest", "log", writes=["profiles"])
    made.add_argument("--target", type=cli.json_value, required=True, help="the config's profiles block as JSON")
    return made


def build_profiles(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.config import Target
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.decide import profiles
    from auto_quantize_model.report import coverage, sentences

    found = profiles.build_profiles(run.frontier, run.plan, read_block(Target, args.target, "profiles"))
    run.write("profiles", args.profiles, found)
    known: dict[str, Any] = {"profiles": body_of(found), "frontier": body_of(run.frontier)}
    known |= {"coverage": run.plan.coverage, "measurement": {"output": body_of(run.plan.output)}}
    cli.say(f"profiles: {coverage.headline(len(run.plan.ops), run.plan.coverage)}")
    for warning in coverage.warnings(run.plan.coverage):
        cli.say(f"warning: {warning}")
    cli.say(" ".join(filter(None, sentences.decision(known))))
    for line in sentences.of_profiles(known):
        cli.say(line)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), build_profiles, argv)
