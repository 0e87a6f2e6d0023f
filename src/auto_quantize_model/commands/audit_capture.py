"""Measure a sample of ops again with INC's unmodified helpers and compare: a difference on the CPU is an error.

Where the plan says that INC cannot measure the model, torch's own quantized modules measure instead. The schemes of
compressed-tensors are measured again by the library's own modules.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "plan", "scales", "capture")
    made = options.parser(__doc__, *reads, "memory", "config_digest", "log", writes=["audit"])
    made.add_argument("--number", type=int, default=1, help="of the part, where several jobs share the audit (1)")
    made.add_argument("--parts", type=int, default=1, help="how many parts share the audit (1)")
    made.add_argument("--ops", type=int, default=6, help="ops to compare, the most and least sensitive among them")
    return made


def audit_capture(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.inc import audit
    from auto_quantize_model.measure.parts import Place
    from auto_quantize_model.measure.served_audit import audit_served
    from auto_quantize_model.replay.scales import ALL_BATCHES

    loaded, place = Loaded(run), Place(args.number, args.parts)
    batches = loaded.batches(run.plan.confidence_batches)
    cli.say(audit.announce(run.plan, run.capture, args.ops))
    model, scales = loaded.model(mapped=loaded.mapped), loaded.scales_of_batches()
    with cli.progress_bar("audit") as on_progress:
        result = audit.audit_capture(model, batches, run.plan, run.capture, args.ops, scales, on_progress, place)
    cli.say(f"audit: {result.status}, {result.compared} values compared")
    batch = audit.audited_batch(run.capture)
    ranges = loaded.scales.get(ALL_BATCHES, scales[batch])
    with cli.progress_bar("audit of schemes") as on_progress:
        served = audit_served(model, batches, batch, run.plan, run.capture, args.ops, ranges, on_progress, place)
    for scheme, values in served.items():
        cli.say(f"audit: {scheme}, bit_identical, {values} values compared with compressed-tensors")
    run.write("audit" if args.parts == 1 else "audit_part", args.audit, replace(result, served=served))


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), audit_capture, argv)
