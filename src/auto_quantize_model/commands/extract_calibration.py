"""Draw the calibration and held-out samples, check each with the model's processor, and store them."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.documents import write_document
from auto_quantize_model.records import body_of


def parser() -> argparse.ArgumentParser:
    sets = ["calibration_set", "heldout_set", "calibration_manifest"]
    return options.parser(__doc__, "manifest", "spec", "config_digest", "log", writes=sets)


def extract_calibration(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.config import CalibrationSpec
    from auto_quantize_model.config_text import read_block
    from auto_quantize_model.data.batches import extract_into, remarks, sample_writer

    loaded = Loaded(run)
    processor = loaded.processor
    spec = read_block(CalibrationSpec, args.spec, "calibration")
    with sample_writer(args.calibration_set) as calibration, sample_writer(args.heldout_set) as heldout:
        stores = {"calibration": calibration, "heldout": heldout}
        manifest = extract_into(
            stores, spec, processor, run.manifest, lambda samples: cli.progress(samples, "samples from the hub")
        )
    sets = [args.calibration_set, args.heldout_set]
    kind = "calibration_manifest"
    write_document(args.calibration_manifest, kind, body_of(manifest), run.documents, args.config_digest, sets)
    drawn = {split: len(samples) for split, samples in manifest.samples.items()}
    cli.say(f"calibration: {drawn['calibration']} samples, {drawn['heldout']} held out, from {manifest.source}")
    for remark in remarks(manifest):
        cli.say(f"calibration: {remark}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), extract_calibration, argv)
