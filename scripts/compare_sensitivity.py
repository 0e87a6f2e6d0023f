"""Compare two JSON reports: what changed, which ops moved, and whether the rankings still agree (exit code 1 if not).

    python scripts/compare_sensitivity.py A.json B.json [--markdown OUT.md] [--json OUT.json]

Rankings differ where Kendall's tau is below --tau and below what batches of one run agree by. Exit code 2: bad input.
"""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.compare import compare, to_markdown
from auto_quantize_model.files import InputError, read_json, write_json, write_text
from auto_quantize_model.report import SCHEMA_VERSION


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="a JSON report")
    parser.add_argument("second", type=Path, help="the JSON report to compare it with")
    parser.add_argument("--top", type=int, default=10, help="size of the sets of most sensitive ops (10)")
    parser.add_argument("--tau", type=float, default=0.8, help="Kendall's tau below which rankings differ (0.8)")
    parser.add_argument("--markdown", type=Path, help="write the comparison for people here as well")
    parser.add_argument("--json", type=Path, help="write the comparison for programs here")
    args = parser.parse_args()
    verdicts: list[bool] = []
    return cli.run(lambda: verdicts.append(comparison(args)), None) or int(verdicts[0])


def comparison(args: argparse.Namespace) -> bool:
    """Print and write the comparison; whether the rankings differ."""
    found = compare(read_report(args.first), read_report(args.second), args.top, args.tau)
    markdown = to_markdown(found)
    cli.say(markdown)
    if args.markdown:
        write_text(args.markdown, markdown)
    if args.json:
        write_json(args.json, found)
    return bool(found["differs"])


def read_report(path: Path) -> dict:
    report = read_json(path)
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: no sensitivity report of schema version {SCHEMA_VERSION} (found {version}); render it anew"
        )
    return report


if __name__ == "__main__":
    raise SystemExit(main())
