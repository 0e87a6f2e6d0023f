"""Render the report of a capture as Markdown, JSON and CSV tables, and print the ten most sensitive ops."""

import argparse
import json
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.documents import read_documents, write_document
from auto_quantize_model.files import write_text
from auto_quantize_model.report import coverage, sentences
from auto_quantize_model.report.document import build_report, render, tables, top_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the model's manifest")
    parser.add_argument("--calibration-manifest", type=Path, required=True, help="the calibration set's manifest")
    parser.add_argument("--plan", type=Path, required=True, help="the plan")
    parser.add_argument("--capture", type=Path, required=True, help="the capture")
    parser.add_argument("--audit", type=Path, required=True, help="the audit of the capture")
    parser.add_argument("--tradeoff", type=Path, required=True, help="what keeping ops in FP32 buys")
    parser.add_argument("--profiles", type=Path, required=True, help="the profiles")
    parser.add_argument("--markdown", type=Path, required=True, help="the report to write (Markdown)")
    parser.add_argument("--json", type=Path, required=True, help="the report to write (JSON)")
    for table in ("ranking", "tradeoff", "profiles"):
        parser.add_argument(f"--{table}-table", type=Path, required=True, help=f"the {table} to write (CSV)")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: render_report(args), args.log)


def render_report(args: argparse.Namespace) -> None:
    listed = {f"{name}_table": ".csv" for name in ("ranking", "tradeoff", "profiles")}
    cli.require_outputs(args, markdown=".md", json=".json", **listed)
    parts = ("plan", "capture", "audit", "tradeoff", "profiles")
    paths = {"model_manifest": args.manifest, "calibration_manifest": args.calibration_manifest}
    made_from = read_documents(paths | {part: getattr(args, part) for part in parts})
    report = build_report(*made_from)
    markdown, document = render(report)
    texts = {args.markdown: markdown}
    texts |= {getattr(args, f"{name}_table"): table.to_csv(index=False) for name, table in tables(report).items()}
    for path, text in texts.items():
        write_text(path, text)
    write_document(args.json, "report", json.loads(document), made_from, files=texts)
    cli.say(coverage.headline(len(report["ops"]), report["coverage"]))
    for warning in report["warnings"]:
        cli.say(f"warning: {warning}")
    for sentence in sentences.breaks(report):
        cli.say(f"warning: {sentence}")
    cli.say(f"The most sensitive ops of {report['model']['model']}:\n{top_table(report)}")
    cli.say(f"The report: {args.markdown} and {args.json}")


if __name__ == "__main__":
    raise SystemExit(main())
