"""Train the embedded digit reader again, and compare it with the shipped snapshot.

Weights differ between kinds of CPU, so differing tensors are listed and are not a failure. The exit code is 0 if two
things hold: the held-out accuracy is at least --min-accuracy, and all files but the weights are equal. Training takes
minutes.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.files import InputError
from auto_quantize_model.folders import atomic_folder

SHIPPED = Path("resources/models/digits_vlm")
THREADS = 1  # as for the shipped snapshot: the bits of a sum depend on the number of threads
SHOWN = 12  # differing tensors that are listed


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__)
    made.add_argument("--shipped", type=cli.user_path, default=SHIPPED, help=f"the snapshot (default: {SHIPPED})")
    made.add_argument("--split-seed", type=int, default=0, help="seed of the split of the digits (default: 0)")
    made.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order (default: 0)")
    made.add_argument("--epochs", type=int, default=5, help="passes over the training digits (default: 5)")
    made.add_argument(
        "--min-accuracy", type=float, default=0.95, help="held-out accuracy, 0 to 1, that is needed (default: 0.95)"
    )
    made.add_argument("--write", action="store_true", help="replace the shipped snapshot by the new one")
    return made


def train_digits(args: argparse.Namespace) -> None:
    import torch

    from auto_quantize_model.data.digits import shipped_training
    from auto_quantize_model.made import digits

    for name, least in (("split_seed", 0), ("seed", 0), ("epochs", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: write a number of at least {least}")
    if not 0 <= args.min_accuracy <= 1:
        raise InputError(f"--min-accuracy {args.min_accuracy}: write a share from 0 to 1")
    shipped = shipped_training(args.shipped)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        trained = Path(temporary) / args.shipped.name
        record = digits.train_snapshot(
            trained,
            split_seed=args.split_seed,
            seed=args.seed,
            epochs=args.epochs,
            progress=lambda epochs: cli.progress(epochs, "training epochs"),
        )
        say_records(record, shipped)
        again = digits.heldout_accuracy(args.shipped, shipped["split_seed"])
        cli.say(f"held-out accuracy on this machine: trained {record['heldout_accuracy']:.1%}, shipped {again:.1%}")
        say_tensors(digits.differing_tensors(trained, args.shipped))
        if record["heldout_accuracy"] < args.min_accuracy:
            raise InputError(
                f"held-out accuracy {record['heldout_accuracy']:.3f} is below --min-accuracy {args.min_accuracy}; raise"
                " --epochs, or change --seed"
            )
        files = digits.differing_files(trained, args.shipped)
        if args.write:
            with atomic_folder(args.shipped) as folder:
                shutil.copytree(trained, folder, dirs_exist_ok=True)
            cli.say(f"{args.shipped}: replaced by the new snapshot")
        elif files:
            raise InputError(
                f"{args.shipped}: {', '.join(files)} differ from the files of the new snapshot; install the locked"
                " packages (make setup), or replace the shipped snapshot (--write)"
            )


def say_records(trained: dict[str, Any], shipped: dict[str, Any]) -> None:
    """Print how both snapshots were trained, and where the shipped one was trained differently."""
    cli.say(f"trained: {described(trained)}")
    cli.say(f"shipped: {described(shipped)}")


def described(record: dict[str, Any]) -> str:
    """A training record on one line."""
    numbers = {name: record.get(name) for name in ("split_seed", "seed", "epochs", "instruction_set", "threads")}
    return ", ".join(f"{name} {value}" for name, value in (numbers | record.get("versions", {})).items())


def say_tensors(differing: dict[str, float]) -> None:
    """Print which tensors differ, and by how much."""
    if not differing:
        cli.say("weights: the same bits")
        return
    cli.say(f"weights: {len(differing)} tensors differ; the largest absolute difference of each:")
    for name, largest in list(differing.items())[:SHOWN]:
        cli.say(f"  {name}: {largest:.3g}")
    if len(differing) > SHOWN:
        cli.say(f"  and {len(differing) - SHOWN} more")


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), train_digits, argv)
