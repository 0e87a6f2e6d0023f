"""Export every profile to the tools that apply it, checked against the model's module names."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.documents import read_documents
from auto_quantize_model.export.exports import export
from auto_quantize_model.models.snapshot import module_types, tensor_names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--plan", type=Path, required=True, help="the plan")
    parser.add_argument("--capture", type=Path, required=True, help="the capture, which says what ran")
    parser.add_argument("--profiles", type=Path, required=True, help="the profiles")
    parser.add_argument("--directory", type=Path, required=True, help="the folder to write")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: export_profiles(args), args.log)


def export_profiles(args: argparse.Namespace) -> None:
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest}
    made_from = read_documents(paths | {"plan": args.plan, "capture": args.capture, "profiles": args.profiles})
    manifest, calibration, plan, capture, profiles = made_from
    # Names and classes alone are read, so the weights need not be hashed again.
    snapshot = Path(manifest["path"])
    modules, published = module_types(snapshot), tensor_names(snapshot)
    samples, size = len(calibration["samples"]["calibration"]), calibration["batch_size"]
    in_whole_batches = samples - samples % size
    index = export(args.directory, profiles, plan, capture, modules, published, in_whole_batches, made_from)
    if index["missed"]:
        cli.say(f"no recommended profile: {index['missed']}")
    for tool in index["profiles"].get("recommended", {}).values():
        cli.say(f"recommended, for {tool['title']}: {', '.join(tool['files'])}")
        for note in tool["notes"]:
            cli.say(f"  {note}")


if __name__ == "__main__":
    raise SystemExit(main())
