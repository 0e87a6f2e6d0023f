"""Measure a sample of ops again with INC's unmodified helpers and compare: a difference on the CPU is an error.

Where the plan says that INC cannot measure the model, torch's own quantized modules measure instead.
"""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.data.batches import load_batches
from auto_quantize_model.documents import read_documents, require_listed, write_document
from auto_quantize_model.inc.audit import announce, audit_capture
from auto_quantize_model.models.snapshot import load_model, load_processor, verify_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the capture")
    parser.add_argument("--capture", type=Path, required=True, help="the capture to audit")
    parser.add_argument("--ops", type=int, default=6, help="ops to compare, the extremes among them; at most all")
    parser.add_argument("--audit", type=Path, required=True, help="the audit to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: audit(args), args.log)


def audit(args: argparse.Namespace) -> None:
    cli.require_outputs(args, audit=".json")
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest}
    made_from = read_documents(paths | {"plan": args.plan, "capture": args.capture})
    manifest, calibration, plan, capture = made_from
    require_listed(calibration, args.calibration_set)
    directory = verify_manifest(manifest)
    processor = load_processor(directory, calibration["image_backend"])
    batches = load_batches(args.calibration_set, calibration, processor)
    cli.say(announce(plan, capture, args.ops))
    with cli.progress_bar("audit") as on_progress:
        result = audit_capture(load_model(directory), batches, plan, capture, args.ops, on_progress)
    write_document(args.audit, "audit", result, made_from, args.config_digest)
    cli.say(f"audit: {result['status']}, {result['compared']} values compared")


if __name__ == "__main__":
    raise SystemExit(main())
