"""Remove the results that Snakemake has records of, and name what stays below results/.

Results of an unpacked archive have no records here, so they stay.
"""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.clean import clean_results

SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("."), help="the checkout")
    args = parser.parse_args()
    return cli.run(lambda: clean(args), None)


def clean(args: argparse.Namespace) -> None:
    left = clean_results(args.root)
    if left:
        shown = [str(path) for path in left[:SHOWN]] + [f"and {len(left) - SHOWN} more"] * (len(left) > SHOWN)
        cli.say(f"results/ keeps what Snakemake has no records of: {', '.join(shown)}")


if __name__ == "__main__":
    raise SystemExit(main())
