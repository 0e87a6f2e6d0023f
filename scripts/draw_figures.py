"""Draw the four pictures of a report as SVG and PNG."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.documents import read_document
from auto_quantize_model.report.figures import figures, save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="the report (JSON)")
    parser.add_argument("--directory", type=Path, required=True, help="the folder to draw into")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: draw_figures(args), args.log)


def draw_figures(args: argparse.Namespace) -> None:
    drawn = figures(read_document(args.report, "report"))
    files = {
        args.directory / f"{name}{suffix}": figure for name, figure in drawn.items() for suffix in (".svg", ".png")
    }
    for path in files:
        cli.require_place(path, [args.report])
    for path, figure in files.items():
        save(figure, path)
    cli.say(f"The pictures: {args.directory}")


if __name__ == "__main__":
    raise SystemExit(main())
