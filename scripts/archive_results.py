"""Pack results into a tar file that is the same bytes for the same files, with their sha256 beside it."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.archive import archive_results
from auto_quantize_model.documents import files_of, read_document, require_file, require_one_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files to pack")
    parser.add_argument(
        "--documents", type=Path, nargs="*", default=[], metavar="FILE", help="those of them that have to be of one run"
    )
    parser.add_argument("--archive", type=Path, required=True, help="the archive to write (.tar)")
    parser.add_argument("--checksums", type=Path, required=True, help="the list of sha256 to write (JSON)")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: archive(args), args.log)


def archive(args: argparse.Namespace) -> None:
    documents = [read_document(path) for path in args.documents]
    require_one_run(documents)
    for document in documents:
        for path in files_of(document):
            require_file(document, path)
    packed = archive_results(args.archive, args.checksums, args.files)
    cli.say(f"{args.archive}: {len(packed['files'])} files, sha256 {packed['sha256']}")


if __name__ == "__main__":
    raise SystemExit(main())
