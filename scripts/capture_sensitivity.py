"""Score every planned op with INC's unmodified mse_v2 helpers, batch for batch."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.calibration import load_batches
from auto_quantize_model.capture import capture_sensitivity
from auto_quantize_model.files import InputError, digest_of, read_json, write_json
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
    bar = cli.progress(range(scores), "capture")
    captured, record = capture_sensitivity(load_model(directory), batches, plan, lambda *_: bar.update())
    bar.close()
    samples = calibration["samples"]["calibration"]
    for entry, start in zip(captured["batches"], range(0, len(samples), calibration["batch_size"]), strict=False):
        members = samples[start : start + calibration["batch_size"]]
        entry["sample_ids"] = [sample["id"] for sample in members]
        entry["tokens"] = sum(sample["tokens"] for sample in members)
        entry["image_tokens"] = sum(sample["image_tokens"] for sample in members)
    write_json(args.run_record, record)
    identity = {"model": plan["model"], "calibration": plan["calibration"], "plan_digest": digest_of(plan)}
    write_json(args.capture, captured | identity)


if __name__ == "__main__":
    raise SystemExit(main())
