"""Measure on held-out samples what keeping ops in FP32 buys. A killed run goes on where it ended."""

import argparse
from pathlib import Path
from typing import Any

import torch

from auto_quantize_model import cli
from auto_quantize_model.data.batches import load_batches, load_heldout
from auto_quantize_model.decide.ranking import most_sensitive_first
from auto_quantize_model.documents import read_documents, require_listed, write_document
from auto_quantize_model.files import digest_of
from auto_quantize_model.machine import choose_device, explained_out_of_memory, require_memory
from auto_quantize_model.measure.capture import arithmetic, fingerprint
from auto_quantize_model.measure.heldout import Greedy, measure_tradeoff
from auto_quantize_model.measure.journal import Journal
from auto_quantize_model.models.snapshot import count_parameters, load_model, load_processor, verify_manifest
from auto_quantize_model.replay.model import refusals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--calibration-set", type=Path, required=True, help="the calibration samples (Parquet)")
    parser.add_argument("--heldout-set", type=Path, required=True, help="the held-out samples (Parquet)")
    parser.add_argument("--plan", type=Path, required=True, help="the plan")
    parser.add_argument("--capture", type=Path, required=True, help="the capture, for its ranking")
    parser.add_argument("--batches", type=int, required=True, help="held-out batches to measure on; 0: none at all")
    parser.add_argument("--greedy-candidates", type=int, default=0, help="ops that each greedy step tries; 0: no steps")
    parser.add_argument("--greedy-ops", type=int, default=0, help="ops that are chosen greedily")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to replay")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 products to TF32")
    parser.add_argument("--nondeterministic", action="store_true", help="let torch choose faster algorithms")
    parser.add_argument("--tradeoff", type=Path, required=True, help="the result (JSON); a journal lies beside")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: tradeoff(args), args.log)


def tradeoff(args: argparse.Namespace) -> None:
    cli.require_outputs(args, tradeoff=".json")
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest}
    made_from = read_documents(paths | {"plan": args.plan, "capture": args.capture})
    manifest, calibration, plan, capture = made_from
    for stored in (args.calibration_set, args.heldout_set):
        require_listed(calibration, stored)

    def write(found: dict[str, Any]) -> None:
        write_document(args.tradeoff, "tradeoff", found, made_from, args.config_digest)

    if not args.batches:
        write({"status": "not_measured", "reason": "tradeoff.heldout_batches is 0"})
        return
    directory = verify_manifest(manifest)
    device = choose_device(args.device, tf32=args.tf32, deterministic=not args.nondeterministic)
    require_memory(count_parameters(directory), device)
    processor = load_processor(directory, calibration["image_backend"])
    batches = load_batches(args.calibration_set, calibration, processor)
    heldout, answers = load_heldout(args.heldout_set, calibration, processor, args.batches)
    model: torch.nn.Module = load_model(directory)
    if refused := refusals(model, plan["ops"]):
        reason = f"{len(refused)} ops, such as {min(refused)}, cannot be replayed"
        write({"status": "not_measured", "reason": reason})
        return
    ranking = most_sensitive_first(plan, capture)
    greedy = Greedy(args.greedy_candidates, args.greedy_ops)
    of = fingerprint(plan, device) | {document.kind: document.digest for document in made_from}
    of |= {"ranking": digest_of(ranking), "batches": args.batches, "greedy": vars(greedy)}
    with Journal(args.tradeoff.with_name(f"{args.tradeoff.name}.journal"), of) as journal:
        if news := journal.news():
            cli.say(f"trade-off: {news}")
        with explained_out_of_memory(device), cli.progress_bar("trade-off") as on_progress:
            found = measure_tradeoff(
                model.to(device), plan, ranking, batches, heldout, answers, journal, greedy, on_progress
            )
        measured_by = {"status": "measured", "device": device.type, **arithmetic()}
        write(measured_by | found)
        journal.remove()


if __name__ == "__main__":
    raise SystemExit(main())
