"""Score every planned op with INC's unmodified mse_v2 helpers, batch for batch."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.calibration import load_batches
from auto_quantize_model.capture import capture_sensitivity, describe_batches
from auto_quantize_model.files import InputError, read_json, write_json
from auto_quantize_model.snapshot import load_model, load_processor, verify_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--plan", type=Path, required=True, help="the plan to follow")
    parser.add_argument("--capture", type=Path, required=True, help="the capture to write (JSON)")
    parser.add_argument("--run-record", type=Path, required=True, help="times and host of this run, to write (JSON)")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: capture(args), args.log)


def capture(args: argparse.Namespace) -> None:
    manifest, calibration, plan = (read_json(path) for path in (args.manifest, args.calibration_manifest, args.plan))
    if (plan["model_digest"], plan["calibration_digest"]) != (manifest["digest"], calibration["digest"]):
        raise InputError(f"{args.plan}: made for another model or calibration set; make the plan again")
    directory = verify_manifest(manifest)
    batches = load_batches(args.calibration_set, calibration, load_processor(directory))
    scores = plan["confidence_batches"] * (len(plan["maps"]) * len(plan["ops"]) + 1)
    model = load_model(directory)
    with cli.progress(range(scores), "capture") as bar:
        captured, record = capture_sensitivity(model, batches, plan, lambda *_: bar.update())
    write_json(args.run_record, record)
    write_json(args.capture, describe_batches(captured, calibration))


if __name__ == "__main__":
    raise SystemExit(main())
