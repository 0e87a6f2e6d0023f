"""Measure a snapshot's INT8 sensitivity by INC's mse_v2, without Snakemake: plan, capture, audit and report.

INC plans. INC's unmodified helpers measure a sample of ops again, or all ops with --engine inc. A killed run resumes.

The script reads any supported snapshot directory and any local calibration set (JSONL, Parquet or image folder). The
report goes to --output. With --publish, a copy goes to context/summaries/inc-kb/ as well.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.config import CalibrationSpec, PlanSpec, Target
from auto_quantize_model.config_text import read_block
from auto_quantize_model.documents import Document, write_document
from auto_quantize_model.files import digest_of, write_json, write_text
from auto_quantize_model.records import NotMeasured, body_of
from auto_quantize_model.report import sentences

PUBLISHED = Path("context/summaries/inc-kb")
REPORT = "op_sensitivity_mse_v2"
MAPS = list(sentences.DIRECTIONS)
REDUCE_RANGE = {"auto": None, "true": True, "false": False}


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "device")
    made.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    made.add_argument("--model", type=cli.user_path, required=True, help="snapshot directory")
    made.add_argument("--name", default="qwen2_5_vl_3b", help="the model's name in the report and in published files")
    made.add_argument(
        "--calibration",
        required=True,
        help="JSONL or JSON of {image?, prompt, answer?} or {messages}, Parquet or image folder",
    )
    made.add_argument("--num-samples", type=int, default=4, help="calibration samples to draw")
    made.add_argument("--seed", type=int, default=0, help="seed of the draw")
    made.add_argument("--batch-size", type=int, default=1, help="samples in a batch")
    made.add_argument("--confidence-batches", type=int, default=1, help="batches to score")
    made.add_argument("--min-pixels", type=int, default=3136, help="smallest image area after resizing")
    made.add_argument("--max-pixels", type=int, default=200704, help="largest image area (200704: 256 visual tokens)")
    made.add_argument("--max-tokens", type=int, default=1024, help="tokens above which a sample is refused")
    made.add_argument("--maps", nargs="+", choices=MAPS, default=MAPS, help="maps to measure")
    made.add_argument("--engine", choices=["replay", "inc", "auto"], default="replay", help="who measures")
    made.add_argument("--audit-ops", type=int, default=6, help="ops that INC measures again")
    made.add_argument("--keep-type", nargs="*", default=[], metavar="TYPE", help="op types kept in FP32")
    made.add_argument("--keep-name", nargs="*", default=[], metavar="REGEX", help="ops kept in FP32, by whole name")
    made.add_argument(
        "--reduce-range",
        choices=list(REDUCE_RANGE),
        default="auto",
        help="quantize activations to 7 bits of 8; auto: INC's own choice for this CPU",
    )
    made.add_argument("--output", type=cli.user_path, default=Path("tmp/qwen2_5_vl_3b_inc"), help="folder of the run")
    made.add_argument("--publish", action="store_true", help=f"copy the report to {PUBLISHED} as well")
    return made


def calibration_spec(args: argparse.Namespace) -> CalibrationSpec:
    """The options about the samples, as a block of the config."""
    numbers = ("num_samples", "seed", "batch_size", "min_pixels", "max_pixels", "max_tokens")
    asked = {"name": "local", "source": "local", "path": args.calibration, "num_heldout": 0}
    spec = read_block(CalibrationSpec, asked | {key: getattr(args, key) for key in numbers}, "calibration")
    # The name of a file need not be a valid name of the config: no path is made of it here.
    return spec.model_copy(update={"name": Path(args.calibration).stem})


def plan_spec(args: argparse.Namespace) -> PlanSpec:
    """The options about the plan, as keys of the config's block."""
    asked = {key: getattr(args, key) for key in ("engine", "confidence_batches", "maps")}
    asked |= {"reduce_range": REDUCE_RANGE[args.reduce_range]}
    asked |= {"op_type_dict": dict.fromkeys(args.keep_type, "fp32")}
    asked |= {"op_name_dict": dict.fromkeys(args.keep_name, "fp32")}
    return read_block(PlanSpec, asked, "sensitivity")


def measure(args: argparse.Namespace) -> None:
    from auto_quantize_model.data.batches import batches_of, extract, remarks
    from auto_quantize_model.decide.profiles import build_profiles
    from auto_quantize_model.inc.audit import announce, audit_capture
    from auto_quantize_model.inc.engine import measure_by_inc
    from auto_quantize_model.inc.plan import build_plan, identify
    from auto_quantize_model.machine import choose_device, explained_out_of_memory, require_memory
    from auto_quantize_model.measure.capture import capture_sensitivity, described, news
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.models.snapshot import build_manifest, count_parameters, load_model, load_processor
    from auto_quantize_model.report.document import build_report, render, top_table

    draw, spec = calibration_spec(args), plan_spec(args)
    device = choose_device(args.device if args.engine == "replay" else "cpu")
    name = f"{REPORT}_{device.type}"
    targets = [args.output / name] + [PUBLISHED / f"{args.name}_mse_sensitivity"] * args.publish
    documents = {kind: args.output / f"{kind}.json" for kind in ("model_manifest", "calibration_manifest", "plan")}
    documents |= {kind: args.output / f"{kind}_{device.type}.json" for kind in ("capture", "audit")}
    texts = [target.with_name(f"{target.name}{suffix}") for target in targets for suffix in (".md", ".json")]
    run_record = args.output / f"{name}.run.json"
    for path in (*documents.values(), *texts, run_record):
        cli.require_place(path, [cli.user_path(args.calibration)])
    manifest = build_manifest(args.model, args.name, "local", {})
    require_memory(count_parameters(args.model), device)
    processor = load_processor(args.model)
    samples, _, calibration = extract(draw, processor, manifest)
    for remark in remarks(calibration):
        cli.say(f"calibration: {remark}")
    batches = batches_of(samples, calibration.batch_size, processor)
    model: Any = load_model(args.model)
    plan = identify(build_plan(model, batches, spec), manifest, calibration, digest_of(spec.model_dump()))
    store = ScoreStore(args.output / "scores")
    with explained_out_of_memory(device), cli.progress_bar("capture") as on_progress:
        captured, run_of_capture = capture_sensitivity(
            model.to(device), batches, plan, store, on_progress=on_progress, by_inc=measure_by_inc
        )
    cli.say(f"capture: {news(run_of_capture)}")
    captured = described(captured, calibration)
    cli.say(announce(plan, captured, args.audit_ops))
    with cli.progress_bar("audit") as on_progress:
        audit = audit_capture(model.to("cpu"), batches, plan, captured, args.audit_ops, on_op=on_progress)
    unmeasured = NotMeasured("not_measured", "this script draws no held-out samples")
    profiles = build_profiles(unmeasured, plan, Target())
    report = build_report(manifest, calibration, plan, captured, audit, unmeasured, profiles)
    markdown, document = render(report)
    write_json(run_record, run_of_capture)
    made_from: list[Document] = []
    for (kind, path), record in zip(documents.items(), (manifest, calibration, plan, captured, audit), strict=True):
        made_from.append(write_document(path, kind, body_of(record), made_from))
    for target in targets:
        write_text(target.with_name(f"{target.name}.md"), markdown)
    listed = [args.output / f"{name}.md"]
    written = write_document(args.output / f"{name}.json", "report", json.loads(document), made_from, files=listed)
    for target in targets[1:]:
        write_text(target.with_name(f"{target.name}.json"), written.text())
    for sentence in (*report["warnings"], *sentences.breaks(report)):
        cli.say(f"warning: {sentence}")
    cli.say(f"The most sensitive ops of {args.name}:\n{top_table(report)}")
    cli.say("The report: " + ", ".join(f"{target}.md and .json" for target in targets))


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: measure(args), args.output / "run.log")
