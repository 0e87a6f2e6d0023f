"""Score every planned op, batch for batch, by the engine that the plan names. A killed run goes on where it ended."""

import argparse
from pathlib import Path

import torch

from auto_quantize_model import cli
from auto_quantize_model.data.batches import load_batches
from auto_quantize_model.documents import read_documents, require_listed, write_document
from auto_quantize_model.files import write_json
from auto_quantize_model.machine import choose_device, explained_out_of_memory, require_memory
from auto_quantize_model.measure.capture import Engine, capture_sensitivity, describe_batches, fingerprint
from auto_quantize_model.measure.journal import Journal
from auto_quantize_model.models.snapshot import count_parameters, load_model, load_processor, verify_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--plan", type=Path, required=True, help="the plan to follow")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to replay")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 products to TF32")
    parser.add_argument("--nondeterministic", action="store_true", help="let torch choose faster algorithms")
    parser.add_argument(
        "--capture", type=Path, required=True, help="the capture to write (JSON); a journal lies beside"
    )
    parser.add_argument("--run-record", type=Path, required=True, help="times and host of this run, to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: capture(args), args.log)


def capture(args: argparse.Namespace) -> None:
    cli.require_outputs(args, capture=".json", run_record=".json")
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest, "plan": args.plan}
    made_from = read_documents(paths)
    manifest, calibration, plan = made_from
    require_listed(calibration, args.calibration_set)
    directory = verify_manifest(manifest)
    device = choose_device(args.device, tf32=args.tf32, deterministic=not args.nondeterministic)
    require_memory(count_parameters(directory), device)
    processor = load_processor(directory, calibration["image_backend"])
    batches = load_batches(args.calibration_set, calibration, processor)
    of = fingerprint(plan, device) | {document.kind: document.digest for document in made_from}
    with Journal(args.capture.with_name(f"{args.capture.name}.journal"), of) as journal:
        if news := journal.news():
            cli.say(f"capture: {news}")
        with explained_out_of_memory(device), cli.progress_bar("capture") as on_progress:
            model: torch.nn.Module = load_model(directory)
            by_inc = inc_engine() if plan["engine"] != "replay" else None
            captured, record = capture_sensitivity(model.to(device), batches, plan, journal, on_progress, by_inc)
        write_json(args.run_record, record)
        captured = describe_batches(captured, calibration)
        write_document(args.capture, "capture", captured, made_from, args.config_digest)
        journal.remove()


def inc_engine() -> Engine:
    """INC, imported where a plan asks for it: machines that only replay need none."""
    from auto_quantize_model.inc.engine import measure_by_inc

    return measure_by_inc


if __name__ == "__main__":
    raise SystemExit(main())
