"""Draw the four pictures of a report, as SVG and PNG."""

import argparse
from collections.abc import Sequence

from auto_quantize_model import cli, options
from auto_quantize_model.commands.run import open_run


def parser() -> argparse.ArgumentParser:
    return options.parser(__doc__, "report", "directory", "log")


def draw_figures(args: argparse.Namespace) -> None:
    from auto_quantize_model.report.figures import figures, save

    drawn = figures(open_run(args).report)
    files = {
        args.directory / f"{name}{suffix}": figure for name, figure in drawn.items() for suffix in (".svg", ".png")
    }
    for path in files:
        cli.require_place(path, [args.report])
    for path, figure in files.items():
        save(figure, path)
    cli.say(f"The pictures: {args.directory}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), draw_figures, argv)
