"""Get a model as a local snapshot and write the manifest that stands for it."""

import argparse
from pathlib import Path
from typing import Any

from auto_quantize_model import cli
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError, from_block
from auto_quantize_model.models.snapshot import build_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the model's name in result paths")
    parser.add_argument(
        "--source", required=True, choices=["digits", "local", "hub"], help="train, take --path, or download"
    )
    parser.add_argument("--path", type=cli.user_path, required=True, help="snapshot directory, or the link to it (hub)")
    parser.add_argument("--repo-id", help="hub: the repository, as owner/name")
    parser.add_argument("--revision", help="hub: its commit, 40 hexadecimal digits")
    parser.add_argument("--training-json", type=cli.json_value, help="digits: the config's model.training as JSON")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but progress and errors")
    args = parser.parse_args()
    return cli.run(lambda: get_model(args), args.log)


def get_model(args: argparse.Namespace) -> None:
    cli.require_outputs(args, manifest=".json")
    details: dict[str, Any] = {}
    if args.source == "digits":
        from auto_quantize_model.made.digits import TrainingSpec, train_snapshot

        training = vars(from_block(TrainingSpec, args.training_json, "model.training"))
        details = train_snapshot(args.path, **training, progress=lambda epochs: cli.progress(epochs, "training epochs"))
        cli.say(f"{args.name}: held-out accuracy {details['training']['heldout_accuracy']:.1%}")
    elif args.source == "hub":
        if args.repo_id is None or args.revision is None:
            raise InputError("--source hub: which repository and commit is not said; add --repo-id and --revision")
        from auto_quantize_model.models import hub

        hub.require_link(args.path)
        snapshot = hub.fetch_snapshot(args.repo_id, args.revision, cli.TerminalBar)
        hub.link_snapshot(snapshot, args.path)
        details = {"hub": {"repo_id": args.repo_id, "commit": args.revision}}
    elif not args.path.is_dir():
        raise InputError(f"model.path: {args.path} is no directory; give a Hugging Face snapshot directory")
    manifest = build_manifest(args.path, args.name, args.source, details)
    if args.source == "hub":
        hub.check_against_hub(args.path, {file["name"]: file["sha256"] for file in manifest["files"]})
    write_document(args.manifest, "model_manifest", manifest, config=args.config_digest)


if __name__ == "__main__":
    raise SystemExit(main())
