"""Name the keep-lists that were measured: minimal to max, and the smallest that reaches the config's target."""

import argparse
from pathlib import Path

from auto_quantize_model import cli
from auto_quantize_model.decide.profiles import Target, build_profiles
from auto_quantize_model.documents import read_documents, write_document
from auto_quantize_model.files import from_block
from auto_quantize_model.report import coverage, sentences

SHOWN = 12  # names on the terminal; the file and the report have them all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tradeoff", type=Path, required=True, help="the measured trade-off")
    parser.add_argument("--plan", type=Path, help="its plan, for the share of the weights; without it none is said")
    parser.add_argument("--target", type=cli.json_value, required=True, help="the config's profiles block as JSON")
    parser.add_argument("--profiles", type=Path, required=True, help="the profiles to write (JSON)")
    parser.add_argument("--config-digest", help="digest of the config that asks for it, to be recorded")
    parser.add_argument("--log", type=Path, help="file for everything but results and errors")
    args = parser.parse_args()
    return cli.run(lambda: profiles(args), args.log)


def profiles(args: argparse.Namespace) -> None:
    cli.require_outputs(args, profiles=".json")
    made_from = read_documents({"tradeoff": args.tradeoff} | ({"plan": args.plan} if args.plan else {}))
    tradeoff, *plans = made_from
    found = build_profiles(tradeoff, from_block(Target, args.target, "profiles"))
    write_document(args.profiles, "profiles", found, made_from, args.config_digest)
    known = {"profiles": found, "tradeoff": tradeoff}
    for plan in plans:
        known["coverage"] = plan["coverage"]
        cli.say(f"profiles: {coverage.headline(len(plan['ops']), plan['coverage'])}")
        for warning in coverage.warnings(plan["coverage"]):
            cli.say(f"warning: {warning}")
    cli.say(f"recommended: {' '.join(filter(None, sentences.decision(known)))}")
    kept = found["profiles"].get("recommended", found["knee"] or {}).get("kept", [])
    if kept:
        where = "recommended" if "recommended" in found["profiles"] else "the knee"
        cli.say(f"{where} keeps: {', '.join(kept[:SHOWN] + ['...'] * (len(kept) > SHOWN))}")
    for remark in sentences.remarks(known):
        cli.say(f"remark: {remark}")


if __name__ == "__main__":
    raise SystemExit(main())
