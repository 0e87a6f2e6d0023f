"""Copy a finished report to its published place."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.documents import read_document, require_listed
from auto_quantize_model.files import write_text


def parser() -> argparse.ArgumentParser:
    return options.parser(__doc__, "markdown", "json", "log", writes=["into_markdown", "into_json"])


def publish_summary(args: argparse.Namespace) -> None:
    require_listed(read_document(args.json, "report"), args.markdown)
    for source, target in ((args.markdown, args.into_markdown), (args.json, args.into_json)):
        write_text(target, source.read_text(encoding="utf-8"))
    cli.say(f"Published: {args.into_markdown} and {args.into_json}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), publish_summary, argv)
