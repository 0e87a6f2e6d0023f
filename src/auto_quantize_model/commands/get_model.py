"""Get a model as a local snapshot, and write the manifest that represents it in later steps."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from auto_quantize_model import cli, options
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError
from auto_quantize_model.records import body_of


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "config_digest", "log", writes=["manifest"])
    made.add_argument("--name", required=True, help="the model's name in result paths")
    made.add_argument(
        "--source",
        required=True,
        choices=["digits", "smollm2", "local", "hub"],
        help="take the shipped snapshot at --path, make SmolLM2's there, take another one at --path, or download one",
    )
    made.add_argument("--path", type=cli.user_path, required=True, help="snapshot directory, or the link to it (hub)")
    made.add_argument("--repo-id", help="hub: the repository, as owner/name")
    made.add_argument("--revision", help="hub: its commit, 40 hexadecimal digits")
    return made


def get_model(args: argparse.Namespace) -> None:
    from auto_quantize_model.models.snapshot import build_manifest

    details: dict[str, Any] = {}
    if args.source == "digits":
        from auto_quantize_model.data.digits import shipped_training

        details = {"training": shipped_training(args.path)}
    elif args.source == "smollm2":
        from auto_quantize_model.made import smollm2

        smollm2.make_snapshot(args.path, smollm2.SMOLLM2)
        details = {"package": asdict(smollm2.SMOLLM2)}
    elif args.source == "hub":
        if args.repo_id is None or args.revision is None:
            raise InputError("--source hub: the repository and the commit are missing; add --repo-id and --revision")
        from auto_quantize_model.models import hub

        hub.require_link(args.path)
        snapshot = hub.fetch_snapshot(args.repo_id, args.revision, cli.TerminalBar)
        hub.link_snapshot(snapshot, args.path)
        details = {"hub": {"repo_id": args.repo_id, "commit": args.revision}}
    elif not args.path.is_dir():
        raise InputError(f"model.path: {args.path} is not a directory; give a Hugging Face snapshot directory")
    manifest = build_manifest(args.path, args.name, args.source, details)
    if args.source == "hub":
        hub.check_against_hub(args.path, {file.name: file.sha256 for file in manifest.files})
    write_document(args.manifest, "model_manifest", body_of(manifest), config=args.config_digest)


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), get_model, argv)
