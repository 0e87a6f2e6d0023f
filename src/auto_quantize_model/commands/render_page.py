"""Render a report as one HTML page with interactive pictures and tables; the page needs no network."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run
from auto_quantize_model.documents import Document, files_of, require_listed
from auto_quantize_model.files import write_text

EMBEDDED = 200_000  # bytes; a larger file of an export is linked and not shown


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
        "texts": texts_of(exports) if exports else {},
    }
    write_text(args.html, page.render_page(run.report, links))
    cli.say(f"The page: {args.html}")


def texts_of(exports: Document) -> dict[str, str]:
    """{path: text} of the exported files that are small enough for the page, by the paths of the index."""
    folder = exports.path.absolute().parent
    small = [name for name in exports.files if (folder / name).stat().st_size <= EMBEDDED]
    return {f"{folder.name}/{name}": (folder / name).read_text(encoding="utf-8") for name in small}


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), render_page, argv)
