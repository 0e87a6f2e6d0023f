"""Export every profile for the tools that apply it, with names that are checked against the model's modules."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.folders import require_own_folder


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "plan", "profiles")
    return options.parser(__doc__, *reads, "directory", "log")


def export_profiles(args: argparse.Namespace) -> None:
    require_own_folder(args.directory)
    run = open_run(args)
    from auto_quantize_model.export.exports import export
    from auto_quantize_model.models.snapshot import module_types, tensor_names

    # The export reads only names and classes, so the weights are not hashed again.
    snapshot = Path(run.manifest.path)
    modules, published = module_types(snapshot), tensor_names(snapshot)
    samples, size = len(run.calibration.samples["calibration"]), run.calibration.batch_size
    in_whole_batches = samples - samples % size
    index = export(args.directory, run.profiles, run.plan, modules, published, in_whole_batches, run.documents)
    if index["missed"]:
        cli.say(f"no recommended profile: {index['missed']}")
    for tool in index["profiles"].get("recommended", {}).values():
        cli.say(f"recommended, for {tool['title']}: {', '.join(tool['files'])}")
        for note in tool["notes"]:
            cli.say(f"  {note}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), export_profiles, argv)
