"""Copy a finished report to its stable place."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.documents import read_document, require_listed
from auto_quantize_model.files import write_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, required=True, help="the report (Markdown)")
    parser.add_argument("--json", type=Path, required=True, help="the report (JSON)")
    parser.add_argument("--into-markdown", type=Path, required=True, help="the copy to write (Markdown)")
    parser.add_argument("--into-json", type=Path, required=True, help="the copy to write (JSON)")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: publish(args), args.log)


def publish(args: argparse.Namespace) -> None:
    cli.require_outputs(args, into_markdown=".md", into_json=".json")
    require_listed(read_document(args.json, "report"), args.markdown)
    for source, target in ((args.markdown, args.into_markdown), (args.json, args.into_json)):
        write_text(target, source.read_text(encoding="utf-8"))
    cli.say(f"Published: {args.into_markdown} and {args.into_json}")


if __name__ == "__main__":
    raise SystemExit(main())
