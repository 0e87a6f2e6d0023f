"""Have INC plan the quantization, and write the plan: every op with its observers, every excluded module and why."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.files import digest_of


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "spec")
    return options.parser(__doc__, *reads, "memory", "config_digest", "log", writes=["plan"])


def plan_quantization(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.config import PlanSpec
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.inc.plan import build_plan, identify
    from auto_quantize_model.models.checkpoint import folder_of
    from auto_quantize_model.report import coverage, sentences
    from auto_quantize_model.schemes.scheme import INC_INT8

    loaded = Loaded(run)
    spec = read_block(PlanSpec, args.spec, "sensitivity")
    for place in filter(None, (fields.get("checkpoint") for fields in spec.fields_of_schemes.values())):
        folder_of(place, cli.TerminalBar)
    # INC's conversion with every op in INT8 needs as much memory as a replay on the CPU.
    mapped = loaded.stays_mapped(list(spec.fields_of_schemes))
    batches = loaded.batches()
    plan = identify(
        build_plan(loaded.model(spec.experts, mapped), batches, spec),
        run.manifest,
        run.calibration,
        digest_of(args.spec),
    )
    run.write("plan", args.plan, plan)
    cli.say(f"plan: {len(plan.ops)} ops to measure at {plan.measured_op}, {len(plan.excluded)} excluded")
    if INC_INT8 in plan.schemes:
        cli.say(f"plan: {sentences.activations(vars(plan))}")
    for scheme in plan.schemes:
        if refused := {op.op_name: op.refused[scheme] for op in plan.ops if scheme in op.refused}:
            cli.say(f"plan: {sentences.cannot(scheme, refused)}")
    for sentence in (*sentences.of_inc_check(plan.inc_check), *sentences.of_head(vars(plan))):
        cli.say(f"plan: {sentence}")
    cli.say(f"plan: {coverage.headline(len(plan.ops), plan.coverage)}")
    for warning in coverage.warnings(plan.coverage):
        cli.say(f"warning: {warning}")
    for name, fields in plan.schemes.items():
        for warning in fields.get("warnings", ()):
            cli.say(f"warning: scheme {name}: {warning}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), plan_quantization, argv)
