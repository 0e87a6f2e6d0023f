"""Have INC quantize the model by a profile, save it, load it back, and compare its error with the profile's."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.data.batches import load_batches, load_heldout
from auto_quantize_model.documents import read_documents, require_listed, write_document
from auto_quantize_model.files import InputError, read_json
from auto_quantize_model.folders import atomic_folder, require_own_folder
from auto_quantize_model.inc.audit import incs_surroundings
from auto_quantize_model.inc.engine import require_inc
from auto_quantize_model.inc.quantize import compared, load_quantized, logits, measure_error, quantize, release
from auto_quantize_model.machine import WORKING_BYTES, require_free
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.models.snapshot import count_parameters, load_model, load_processor, verify_manifest
from auto_quantize_model.report import sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--heldout-set", type=Path, required=True, help="the held-out samples (Parquet)")
    parser.add_argument("--plan", type=Path, required=True, help="the plan")
    parser.add_argument("--tradeoff", type=Path, required=True, help="what the profiles were measured by")
    parser.add_argument("--profiles", type=Path, required=True, help="the profiles")
    parser.add_argument("--exports", type=Path, required=True, help="the folder of exports")
    parser.add_argument("--profile", required=True, help="the profile's name")
    parser.add_argument("--directory", type=Path, required=True, help="the folder for INC's INT8 model")
    parser.add_argument("--record", type=Path, required=True, help="the comparison to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: quantize_model(args), args.log)


def quantize_model(args: argparse.Namespace) -> None:
    cli.require_outputs(args, record=".json")
    beside = [args.record.name] if args.record.absolute().parent == args.directory.absolute() else []
    require_own_folder(args.directory, beside=beside)
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest, "plan": args.plan}
    paths |= {"tradeoff": args.tradeoff, "profiles": args.profiles, "exports": args.exports / "index.json"}
    made_from = read_documents(paths)
    manifest, calibration, plan, tradeoff, profiles, exports = made_from
    for stored in (args.calibration_set, args.heldout_set):
        require_listed(calibration, stored)
    require_inc(plan)
    if args.profile not in profiles["profiles"]:
        there = ", ".join(profiles["profiles"]) or "none"
        why = f" ({profiles['missed']})" if args.profile == "recommended" else ""
        raise InputError(
            f"quantize.profile: there is no profile {args.profile}{why}; there are: {there}. Name another one (make"
            " quantize PROFILE=...), or change the target in the config's profiles block"
        )
    profile = profiles["profiles"][args.profile]
    kept = args.exports / args.profile / "inc_op_name_dict.json"
    require_listed(exports, kept)
    op_name_dict = read_json(kept)
    directory = verify_manifest(manifest)
    # Loaded back, INC's model stands beside the FP32 one that it is put into and the file that it comes from.
    needed = 4 * count_parameters(directory) + 2 * profile["weight_bytes"] + WORKING_BYTES
    require_free(needed, "quantizing this model, and loading the result back,")
    processor = load_processor(directory, calibration["image_backend"])
    batches = load_batches(args.calibration_set, calibration, processor)
    heldout, answers = load_heldout(args.heldout_set, calibration, processor, tradeoff["batches"])
    with incs_surroundings(tradeoff["threads"], plan["reduce_range"]):
        model = load_model(directory)
        references = [Reference(logits(model, batch), batch.get("mm_token_type_ids")) for batch in heldout]
        with atomic_folder(args.directory, beside=beside) as folder:
            quantize(model, batches, op_name_dict, folder)
        del model  # before the next one is loaded
        release()
        quantized = load_quantized(args.directory, load_model(directory))
        with cli.progress_bar("INC's INT8 model") as on_batch:
            found = measure_error(references, quantized, heldout, answers, on_batch)
    record = compared(args.profile, profile, found, tradeoff)
    write_document(args.record, "quantized", record, made_from, args.config_digest)
    kept = f"{sentences.counted(profile['keep'], 'op')} in FP32"
    cli.say(f"{args.directory}: profile {args.profile}, {kept}, {record['status']}: {found}")


if __name__ == "__main__":
    raise SystemExit(main())
