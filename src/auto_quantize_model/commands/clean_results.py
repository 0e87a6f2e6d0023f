"""Remove the score store, and the results that Snakemake has records of; name what stays below results/.

Results of an unpacked archive have no records here, so they stay. With --scores, only the score store is removed: the
next run measures every score again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import clean, cli, options
from auto_quantize_model.folders import SCORES, files_in
from auto_quantize_model.measure.store import ScoreStore

SHOWN = 12


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("."), help="the checkout")
    made.add_argument("--scores", action="store_true", help=f"remove the score store ({SCORES}) alone")
    return made


def clean_results(args: argparse.Namespace) -> None:
    files, size = ScoreStore(args.root / SCORES).empty()
    if files or args.scores:
        cli.say(f"removed {files} score files ({size / 1e6:.1f} MB) from {SCORES}")
    if not args.scores:
        say_what_stays(clean.clean_results(args.root), "results/ keeps what Snakemake has no records of")
    elif (args.root / SCORES).is_dir():
        left = list(files_in(args.root / SCORES))
        say_what_stays(left, f"{SCORES} keeps files in use and files that the score store did not write")


def say_what_stays(left: list[Path], reason: str) -> None:
    if left:
        shown = [str(path) for path in left[:SHOWN]] + [f"and {len(left) - SHOWN} more"] * (len(left) > SHOWN)
        cli.say(f"{reason}: {', '.join(shown)}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), clean_results, argv)
