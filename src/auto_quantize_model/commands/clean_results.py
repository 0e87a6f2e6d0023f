"""Remove the results that Snakemake has records of, and name what stays below results/.

Results of an unpacked archive have no records here, so they stay.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import clean, cli, options

SHOWN = 12


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("."), help="the checkout")
    return made


def clean_results(args: argparse.Namespace) -> None:
    left = clean.clean_results(args.root)
    if left:
        shown = [str(path) for path in left[:SHOWN]] + [f"and {len(left) - SHOWN} more"] * (len(left) > SHOWN)
        cli.say(f"results/ keeps what Snakemake has no records of: {', '.join(shown)}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), clean_results, argv)
