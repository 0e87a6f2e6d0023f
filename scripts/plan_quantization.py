"""Have INC plan the quantization and write its plan: every op, its observers, what is left out and why."""

import argparse
from pathlib import Path

import torch

from auto_quantize_model import cli
from auto_quantize_model.data.batches import load_batches
from auto_quantize_model.documents import read_documents, require_listed, write_document
from auto_quantize_model.files import digest_of, from_block
from auto_quantize_model.inc.plan import SensitivitySpec, build_plan, identify
from auto_quantize_model.machine import require_memory
from auto_quantize_model.models.snapshot import count_parameters, load_model, load_processor, verify_manifest
from auto_quantize_model.report import coverage, sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--spec", type=cli.json_value, required=True, help="the config's sensitivity block as JSON")
    parser.add_argument("--plan", type=Path, required=True, help="the plan to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: plan_quantization(args), args.log)


def plan_quantization(args: argparse.Namespace) -> None:
    cli.require_outputs(args, plan=".json")
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest}
    made_from = read_documents(paths)
    manifest, calibration = made_from
    require_listed(calibration, args.calibration_set)
    spec = from_block(SensitivitySpec, args.spec, "sensitivity")
    directory = verify_manifest(manifest)
    # INC's conversion with every op in INT8 takes what a replay on the CPU takes.
    require_memory(count_parameters(directory), torch.device("cpu"))
    processor = load_processor(directory, calibration["image_backend"])
    batches = load_batches(args.calibration_set, calibration, processor)
    plan = identify(build_plan(load_model(directory), batches, spec), manifest, calibration, digest_of(args.spec))
    write_document(args.plan, "plan", plan, made_from, args.config_digest)
    cli.say(f"plan: {len(plan['ops'])} ops to measure at {plan['measured_op']}, {len(plan['excluded'])} excluded")
    cli.say(f"plan: {sentences.activations(plan)}")
    if plan["inc_check"]["status"] == "cannot":
        cli.say(f"plan: {sentences.without_inc(plan['inc_check'])}")
    cli.say(f"plan: {coverage.headline(len(plan['ops']), plan['coverage'])}")
    for warning in coverage.warnings(plan["coverage"]):
        cli.say(f"warning: {warning}")


if __name__ == "__main__":
    raise SystemExit(main())
