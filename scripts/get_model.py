"""Get a model as a local snapshot and write the manifest that stands for it."""

import argparse
import json
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.files import InputError, write_json
from auto_quantize_model.snapshot import build_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the model's name in result paths")
    parser.add_argument("--source", required=True, choices=["digits", "local"], help="train the reader, or take --path")
    parser.add_argument("--path", type=Path, required=True, help="snapshot directory: read (local) or written (digits)")
    parser.add_argument("--training-json", default="{}", help="digits: the config's model.training as JSON")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest to write (JSON)")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: get_model(args), args.log)


def get_model(args: argparse.Namespace) -> None:
    details = {}
    if args.source == "digits":
        from auto_quantize_model.digits import train_snapshot

        training = json.loads(args.training_json)
        details = train_snapshot(args.path, **training, progress=lambda epochs: cli.progress(epochs, "training epochs"))
        cli.say(f"{args.name}: held-out accuracy {details['training']['heldout_accuracy']:.1%}")
    elif not args.path.is_dir():
        raise InputError(f"model.path: {args.path} is no directory; give a Hugging Face snapshot directory")
    write_json(args.manifest, build_manifest(args.path, args.name, args.source, details))


if __name__ == "__main__":
    raise SystemExit(main())
