"""Pack results into a tar file that is the same bytes for the same files, with their sha256 beside it."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.archive import archive_results
from auto_quantize_model.documents import RULES, files_of, read_documents, require_listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files to pack")
    parser.add_argument(
        "--documents",
        type=kind_and_path,
        nargs="*",
        default=[],
        metavar="KIND=FILE",
        help="those of the files that have to be of one run, such as plan=results/.../plan.json",
    )
    parser.add_argument("--archive", type=Path, required=True, help="the archive to write (.tar)")
    parser.add_argument("--checksums", type=Path, required=True, help="the list of sha256 to write (JSON)")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: archive(args), args.log)


def kind_and_path(text: str) -> tuple[str, Path]:
    """An entry of --documents."""
    kind, _, path = text.partition("=")
    if kind not in RULES or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is no KIND=FILE; the kinds are {', '.join(RULES)}")
    return kind, Path(path)


def archive(args: argparse.Namespace) -> None:
    cli.require_outputs(args, archive=".tar", checksums=".json")
    for document in read_documents(dict(args.documents)):
        for path in files_of(document):
            require_listed(document, path)
    packed = archive_results(args.archive, args.checksums, args.files)
    cli.say(f"{args.archive}: {len(packed['files'])} files, sha256 {packed['sha256']}")


if __name__ == "__main__":
    raise SystemExit(main())
