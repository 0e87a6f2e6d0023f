"""Render a report as one HTML page with interactive pictures and tables; the page needs no network."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.documents import files_of, require_listed
from auto_quantize_model.files import write_text


def parser() -> argparse.ArgumentParser:
    reads = ("report", "markdown", "exports", "log")
    made = options.parser(__doc__, *reads, writes=["html"], optional=["markdown", "exports"])
    made.add_argument("--tables", type=Path, nargs="*", default=[], help="the report's tables (.csv), to link to")
    made.add_argument("--files", type=Path, nargs="*", default=[], help="drawn pictures to link to")
    return made


def render_page(args: argparse.Namespace) -> None:
    run = open_run(args)
    from auto_quantize_model.report import page, sentences

    for path in (args.markdown, *args.tables):
        if path:
            require_listed(run.report, path)
    exports = run.exports if "exports" in run.has else None
    if exports:
        for path in files_of(exports):
            require_listed(exports, path)
    files = {"report (JSON)": args.report, "report (Markdown)": args.markdown}
    pictures = [path for path in args.files if path.stem != "modalities" or sentences.has_images(run.report)]
    files |= {path.name: path for path in (*args.tables, *pictures)}
    links = {
        "files": {label: page.relative(path, args.html) for label, path in files.items() if path},
        "exports": exports["profiles"] if exports else {},
    }
    write_text(args.html, page.render_page(run.report, links))
    cli.say(f"The page: {args.html}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), render_page, argv)
