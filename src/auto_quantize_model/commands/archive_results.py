"""Pack results into a tar file that has the same bytes for the same files, and write their sha256 as a document."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import archive, cli, options
from auto_quantize_model.documents import RULES, files_of, read_documents, require_listed


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "log", writes=["archive", "checksums"])
    made.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files to pack")
    made.add_argument(
        "--documents",
        type=kind_and_path,
        nargs="*",
        default=[],
        metavar="KIND=FILE",
        help="those of the files that must be of one run, such as plan=results/.../plan.json",
    )
    return made


def kind_and_path(text: str) -> tuple[str, Path]:
    """An entry of --documents."""
    kind, _, path = text.partition("=")
    if kind not in RULES or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=FILE; the kinds are {', '.join(RULES)}")
    return kind, Path(path)


def archive_results(args: argparse.Namespace) -> None:
    for document in read_documents(dict(args.documents)):
        for path in files_of(document):
            require_listed(document, path)
    packed = archive.archive_results(args.archive, args.checksums, args.files)
    cli.say(f"{args.archive}: {len(packed['files'])} files, sha256 {packed['sha256']}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), archive_results, argv)
