"""Render the report of a capture as Markdown, JSON and CSV tables, and print the ten most sensitive ops."""

import argparse
import json
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import write_text

TABLES = ("ranking", "frontier", "profiles")


def parser() -> argparse.ArgumentParser:
    reads = ("manifest", "calibration_manifest", "plan", "capture", "audit", "frontier", "profiles", "why")
    writes = ("markdown", "json", *(f"{name}_table" for name in TABLES))
    return options.parser(__doc__, *reads, "log", writes=writes)


def render_report(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.report import coverage, sentences
    from auto_quantize_model.report.document import build_report, render, tables, top_table

    made_from = run.manifest, run.calibration, run.plan, run.capture, run.audit, run.frontier, run.profiles, run.why
    report = build_report(*made_from)
    markdown, document = render(report)
    texts = {args.markdown: markdown}
    texts |= {getattr(args, f"{name}_table"): table.to_csv(index=False) for name, table in tables(report).items()}
    for path, text in texts.items():
        write_text(path, text)
    write_document(args.json, "report", json.loads(document), run.documents, files=texts)
    cli.say(coverage.headline(len(report["ops"]), report["coverage"]))
    for warning in (*report["warnings"], *sentences.breaks(report)):
        cli.say(f"warning: {warning}")
    cli.say(f"The most sensitive ops of {report['model']['model']}:\n{top_table(report)}")
    cli.say(f"The report: {args.markdown} and {args.json}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), render_report, argv)
