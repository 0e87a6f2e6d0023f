"""Remove what the workflow wrote below results/, and name what stays: files that it did not write."""

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
        cli.say(f"results/ keeps what this checkout's workflow did not write: {', '.join(shown)}")


if __name__ == "__main__":
    raise SystemExit(main())
