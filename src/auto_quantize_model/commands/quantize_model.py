"""Quantize the model by a profile, load the result back, and compare its error with the profile's error.

A profile with schemes of compressed-tensors becomes a checkpoint. INC itself makes the model of a profile in inc_int8.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import Run, open_run
from auto_quantize_model.documents import require_listed
from auto_quantize_model.files import InputError, read_json
from auto_quantize_model.folders import atomic_folder, require_own_folder
from auto_quantize_model.records import Frontier, Profile, Profiles
from auto_quantize_model.schemes.scheme import INC_INT8


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "scales", "frontier")
    settings = ("directory", "config_digest", "log")
    made = options.parser(__doc__, *reads, "profiles", "exports", *settings, writes=["record"])
    made.add_argument("--profile", required=True, help="the profile's name")
    return made


def quantize_model(args: argparse.Namespace) -> None:
    beside = [args.record.name] if args.record.absolute().parent == args.directory.absolute() else []
    require_own_folder(args.directory, beside=beside)
    run = open_run(args)
    profile = profile_by_name(run.profiles, args.profile)
    frontier = run.frontier
    assert isinstance(frontier, Frontier)  # noqa: S101  without a frontier there is no profile
    work = by_inc if INC_INT8 in profile.assignment.values() else as_checkpoint
    record, files = work(run, profile, frontier, beside)
    run.write("quantized", args.record, record, files)
    from auto_quantize_model.report import sentences

    cli.say(sentences.quantized(record, str(args.directory)))


def as_checkpoint(
    run: Run, profile: Profile, frontier: Frontier, beside: Sequence[str]
) -> tuple[dict[str, Any], list[Path]]:
    """Write the profile as a checkpoint of compressed-tensors, after transformers has loaded it back.

    Returns:
        The record of the comparison, and the files with the weights.
    """
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.export import proof
    from auto_quantize_model.export.checkpoint import Source
    from auto_quantize_model.machine import require_free
    from auto_quantize_model.needs import bytes_of_checkpoint
    from auto_quantize_model.replay.scales import ALL_BATCHES

    directory, loaded = run.options.directory, Loaded(run)
    require_free(bytes_of_checkpoint(loaded.parameters), "loading the checkpoint back, to prove its error,")
    source = Source(loaded.directory, run.plan, profile.assignment, loaded.scales[ALL_BATCHES])
    measured = run.options.profile, profile, frontier, *loaded.heldout(frontier.batches)
    with cli.progress_bar("checkpoint") as on_progress:
        record = proof.quantize(source, directory, run.manifest, *measured, beside, on_progress)
    return record, sorted(directory.glob("*.safetensors"))


def by_inc(run: Run, profile: Profile, frontier: Frontier, beside: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """Have INC quantize the model by the profile's export, and load the result back.

    Returns:
        The record of the comparison, and the file with the weights.
    """
    name, directory = run.options.profile, run.options.directory
    kept = run.exports.path.parent / name / "inc_op_name_dict.json"
    require_listed(run.exports, kept)
    op_name_dict = read_json(kept)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.inc.audit import incs_surroundings
    from auto_quantize_model.inc.engine import require_inc
    from auto_quantize_model.inc.quantize import WEIGHTS, load_quantized, logits, measure_error, quantize, release
    from auto_quantize_model.machine import require_free
    from auto_quantize_model.measure.heldout import compared
    from auto_quantize_model.measure.metrics import Reference
    from auto_quantize_model.needs import WORKING_BYTES

    loaded = Loaded(run)
    require_inc(run.plan)
    # The FP32 weights stay in their files. INC's are there three times when it loads its file: those of the file, the
    # codes of zeros that they replace, and the new codes.
    needed = 3 * profile.point.weight_bytes + WORKING_BYTES
    require_free(needed, "quantizing this model, and loading the result back,")
    batches = loaded.batches()
    heldout, answers = loaded.heldout(frontier.batches)
    with incs_surroundings(frontier.threads, run.plan.reduce_range):
        model = loaded.model(mapped=True)
        references = [Reference.of(logits(model, batch), batch, run.plan.measured_op) for batch in heldout]
        with atomic_folder(directory, beside=beside) as folder:
            quantize(model, batches, op_name_dict, folder)
        del model  # before INC's is loaded
        release()
        quantized = load_quantized(directory, loaded.directory)
        with cli.progress_bar("INC's INT8 model") as on_batch:
            found = measure_error(references, quantized, heldout, answers, on_batch)
    return {"kind": INC_INT8, **compared(name, profile, found, frontier)}, [directory / WEIGHTS]


def profile_by_name(profiles: Profiles, name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is no such profile; the message names those that exist.
    """
    if name not in profiles.profiles:
        there = ", ".join(profiles.profiles) or "none"
        why = f" ({profiles.missed[name]})" if name in profiles.missed else ""
        raise InputError(
            f"quantize.profile: there is no profile {name}{why}; there are: {there}. Name another one (make"
            " quantize PROFILE=...), or change the target in the config's profiles block"
        )
    return profiles.profiles[name]


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), quantize_model, argv)
