"""Render a report as one HTML page with interactive pictures and tables, which needs no network."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.documents import files_of, read_documents, require_listed
from auto_quantize_model.files import write_text
from auto_quantize_model.report import sentences
from auto_quantize_model.report.page import relative, render_page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="the report (JSON)")
    parser.add_argument("--markdown", type=Path, help="the same report as Markdown, to link to")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="the report's tables (CSV), to link to")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="drawn pictures to link to")
    parser.add_argument("--exports", type=Path, help="index of the exported profiles (JSON), to link to")
    parser.add_argument("--html", type=Path, required=True, help="the page to write")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: page(args), args.log)


def page(args: argparse.Namespace) -> None:
    cli.require_outputs(args, html=".html")
    report, *exports = read_documents({"report": args.report} | ({"exports": args.exports} if args.exports else {}))
    for path in (args.markdown, *args.tables):
        if path:
            require_listed(report, path)
    for index in exports:
        for path in files_of(index):
            require_listed(index, path)
    files = {"report (JSON)": args.report, "report (Markdown)": args.markdown}
    pictures = [path for path in args.files if path.stem != "modalities" or sentences.has_images(report)]
    files |= {path.name: path for path in (*args.tables, *pictures)}
    links = {
        "files": {label: relative(path, args.html) for label, path in files.items() if path},
        "exports": exports[0]["profiles"] if exports else {},
    }
    write_text(args.html, render_page(report, links))
    cli.say(f"The page: {args.html}")


if __name__ == "__main__":
    raise SystemExit(main())
