"""Put the decisions of several runs on one HTML page, with the uniform schemes that each run measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.documents import read_document
from auto_quantize_model.files import InputError, write_text


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "log", writes=["html"])
    made.add_argument("--reports", type=Path, nargs="+", required=True, help="the JSON report of each run")
    made.add_argument("--pages", type=Path, nargs="*", default=[], help="the page of each run, in the same order")
    return made


def compare_models(args: argparse.Namespace) -> None:
    if args.pages and len(args.pages) != len(args.reports):
        raise InputError(f"--pages: {len(args.pages)} for {len(args.reports)} reports; name the page of each report")
    reports = [read_document(path, "report") for path in args.reports]
    from auto_quantize_model.report import models_page, page

    links = [page.relative(path, args.html) for path in args.pages] or [""] * len(reports)
    write_text(args.html, models_page.render_models(reports, links))
    cli.say(f"The page: {args.html}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), compare_models, argv)
