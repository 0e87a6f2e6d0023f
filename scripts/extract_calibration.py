"""Draw the calibration and held-out samples, check each against the model's processor, and store them."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.data.batches import CalibrationSpec, extract_into, remarks, sample_writer
from auto_quantize_model.documents import read_document, write_document
from auto_quantize_model.files import from_block
from auto_quantize_model.models.snapshot import load_processor, verify_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--spec", type=cli.json_value, required=True, help="the config's calibration block as JSON")
    parser.add_argument("--calibration-set", type=Path, required=True, help="calibration samples to write (Parquet)")
    parser.add_argument("--heldout-set", type=Path, required=True, help="held-out samples to write (Parquet)")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="their manifest to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: extract_calibration(args), args.log)


def extract_calibration(args: argparse.Namespace) -> None:
    cli.require_outputs(args, calibration_set=".parquet", heldout_set=".parquet", calibration_manifest=".json")
    model_manifest = read_document(args.manifest, "model_manifest")
    processor = load_processor(verify_manifest(model_manifest))
    spec = from_block(CalibrationSpec, args.spec, "calibration")
    with sample_writer(args.calibration_set) as calibration, sample_writer(args.heldout_set) as heldout:
        stores = {"calibration": calibration, "heldout": heldout}
        manifest = extract_into(
            stores, spec, processor, model_manifest, lambda samples: cli.progress(samples, "samples from the hub")
        )
    sets = [args.calibration_set, args.heldout_set]
    kind = "calibration_manifest"
    write_document(args.calibration_manifest, kind, manifest, [model_manifest], args.config_digest, sets)
    drawn = {split: len(samples) for split, samples in manifest["samples"].items()}
    cli.say(f"calibration: {drawn['calibration']} samples, {drawn['heldout']} held out, from {manifest['source']}")
    for remark in remarks(manifest):
        cli.say(f"calibration: {remark}")


if __name__ == "__main__":
    raise SystemExit(main())
