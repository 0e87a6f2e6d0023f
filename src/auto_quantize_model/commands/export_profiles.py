"""Export every profile for the tools that apply it, with names that are checked against the model's modules."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.folders import require_own_folder


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "plan", "profiles", "why")
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
    index = export(args.directory, run.profiles, run.plan, modules, published, in_whole_batches, run.documents, run.why)
    for name, reason in index["missed"].items():
        cli.say(f"no profile {name}: {reason}")
    for name, tools in index["profiles"].items():
        for tool in tools.values():
            cannot = f"no file, because the tool cannot hold {', '.join(tool['refused'])}"
            cli.say(f"{name}, for {tool['title']}: {', '.join(tool['files']) or cannot}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), export_profiles, argv)
