"""Compare two JSON reports: what changed, which ops moved, and whether the reports still agree.

    python scripts/compare_sensitivity.py A.json B.json [--markdown OUT.md] [--html OUT.html] [--json OUT.json]

The reports differ if one of three things holds. Kendall's tau of the rankings is below --tau. More than --top-changes
ops joined or left the --top most sensitive. All-INT8 lost more than --sqnr-drop.

Within one standard deviation of its mse_value, an op could have other ranks. A move is beyond the noise if the two
reports share no such rank. With one batch, the noise is unknown.

Exit code: 0 the reports agree, 1 they differ, 2 bad input, 3 an unexpected error.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.documents import HEAD, read_document
from auto_quantize_model.files import InputError, read_json, write_json, write_text

UNEXPECTED = 3
WRITES = ("markdown", "html", "json")


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, writes=WRITES, optional=WRITES)
    made.add_argument("first", type=cli.user_path, help="a JSON report")
    made.add_argument("second", type=cli.user_path, help="the JSON report to compare it with")
    made.add_argument("--top", type=int, default=10, help="size of the sets of most sensitive ops, from 1 (10)")
    made.add_argument(
        "--tau",
        type=float,
        help="minimum Kendall's tau between the rankings: 1 is the same order, -1 the reversed one. Default: the"
        " agreement between the batches of one report, and 0.8 at most",
    )
    made.add_argument(
        "--top-changes",
        type=int,
        default=2,
        help="how many ops may join the --top most sensitive, as new ops or by a move beyond the noise. As many of"
        " them may be missing from the second report (2)",
    )
    made.add_argument("--sqnr-drop", type=float, default=3.0, help="how many dB of SQNR all-INT8 may lose (3)")
    return made


def comparison(args: argparse.Namespace) -> bool:
    """Write and print the comparison; whether the reports differ."""
    from auto_quantize_model.report.compare import Limits, compare
    from auto_quantize_model.report.compare_text import to_markdown

    limits = Limits(args.top, args.tau, args.top_changes, args.sqnr_drop)
    reports = read_report(args.first), read_report(args.second)
    found = compare(*reports, limits)
    markdown = to_markdown(found)
    if args.markdown:
        write_text(args.markdown, markdown)
    if args.html:
        from auto_quantize_model.report.compare_page import render_comparison

        write_text(args.html, render_comparison(found, *reports))
    if args.json:
        write_json(args.json, found)
    cli.say(markdown)
    return bool(found["differs"])


def read_report(path: Path) -> dict[str, Any]:
    from auto_quantize_model.report.document import SCHEMA_VERSION, mismatch

    report: Any = read_json(path)
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: no sensitivity report of schema version {SCHEMA_VERSION} (found {version}); render it again"
        )
    if HEAD in report:  # a report that was made by hand, or by another version, has no head
        report = read_document(path, "report")
    if error := mismatch(report):
        raise InputError(f"{path}: no whole report, {error.json_path}: {error.message[:200]}; render it")
    whole: dict[str, Any] = report
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    verdicts: list[bool] = []
    ended = options.start(parser(), lambda args: verdicts.append(comparison(args)), argv)
    # cli.run returns 1 for any error, and a CI job must tell an error from reports that differ.
    return {0: int(any(verdicts)), 1: UNEXPECTED}.get(ended, ended)
