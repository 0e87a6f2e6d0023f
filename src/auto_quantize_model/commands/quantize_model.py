"""Have INC quantize the model by a profile, save it, load it back, and compare its error with the profile's error."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.documents import require_listed
from auto_quantize_model.files import InputError, read_json
from auto_quantize_model.folders import atomic_folder, require_own_folder
from auto_quantize_model.records import Profile, Profiles, Tradeoff


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "calibration_set", "heldout_set", "plan", "tradeoff", "profiles")
    made = options.parser(__doc__, *reads, "exports", "directory", "config_digest", "log", writes=["record"])
    made.add_argument("--profile", required=True, help="the profile's name")
    return made


def quantize_model(args: argparse.Namespace) -> None:
    beside = [args.record.name] if args.record.absolute().parent == args.directory.absolute() else []
    require_own_folder(args.directory, beside=beside)
    run = open_run(args)
    profile = profile_by_name(run.profiles, args.profile)
    kept = run.exports.path.parent / args.profile / "inc_op_name_dict.json"
    require_listed(run.exports, kept)
    op_name_dict = read_json(kept)
    from auto_quantize_model.commands.loaded import Loaded
    from auto_quantize_model.inc.audit import incs_surroundings
    from auto_quantize_model.inc.engine import require_inc
    from auto_quantize_model.inc.quantize import compared, load_quantized, logits, measure_error, quantize, release
    from auto_quantize_model.machine import WORKING_BYTES, require_free
    from auto_quantize_model.measure.metrics import Reference
    from auto_quantize_model.report import sentences

    loaded = Loaded(run)
    require_inc(run.plan)
    # Reloading needs memory for INC's model, for the FP32 model that receives it, and for the file.
    needed = 4 * loaded.parameters + 2 * profile.weight_bytes + WORKING_BYTES
    require_free(needed, "quantizing this model, and loading the result back,")
    batches = loaded.batches()
    tradeoff = run.tradeoff
    assert isinstance(tradeoff, Tradeoff)  # noqa: S101  without a trade-off there is no profile
    heldout, answers = loaded.heldout(tradeoff.batches)
    with incs_surroundings(tradeoff.threads, run.plan.reduce_range):
        model = loaded.model()
        references = [Reference(logits(model, batch), batch.get("mm_token_type_ids")) for batch in heldout]
        with atomic_folder(args.directory, beside=beside) as folder:
            quantize(model, batches, op_name_dict, folder)
        del model  # before the next one is loaded
        release()
        quantized = load_quantized(args.directory, loaded.model())
        with cli.progress_bar("INC's INT8 model") as on_batch:
            found = measure_error(references, quantized, heldout, answers, on_batch)
    record = compared(args.profile, profile, found, tradeoff)
    run.write("quantized", args.record, record)
    kept_ops = f"{sentences.counted(profile.keep, 'op')} in FP32"
    cli.say(f"{args.directory}: profile {args.profile}, {kept_ops}, {record['status']}: {found}")


def profile_by_name(profiles: Profiles, name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is no such profile; the message names those that exist.
    """
    if name not in profiles.profiles:
        there = ", ".join(profiles.profiles) or "none"
        why = f" ({profiles.missed})" if name == "recommended" else ""
        raise InputError(
            f"quantize.profile: there is no profile {name}{why}; there are: {there}. Name another one (make"
            " quantize PROFILE=...), or change the target in the config's profiles block"
        )
    return profiles.profiles[name]


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), quantize_model, argv)
