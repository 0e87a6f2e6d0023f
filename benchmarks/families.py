"""Build a tiny model of each architecture from its real class, plan, measure and audit it, and write docs/families.md.

    python benchmarks/families.py                  # all architectures, about two hours on one core
    python benchmarks/families.py mixtral gemma3   # these alone; the others keep their last result
    python benchmarks/families.py --table          # only the table again

A result is kept in tmp/bench/families/NAME.json. Each architecture runs in a process of its own, so an error of one
stops no other.
"""

import argparse
import json
import logging
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auto_quantize_model.files import InputError, canonical_json

KEPT = Path("tmp/bench/families")
TABLE = Path("docs/families.md")
SCHEMES = ("inc_int8", "W8A8", "FP8_DYNAMIC", "NVFP4", "MXFP4")
MAPS = ("isolated", "fallback", "requantize")
AUDITED = 3  # ops
SECONDS = 900  # for one architecture
ENOUGH = 0.95  # of the weights
OF_TEXT = ".text"  # after a name that a shape has too
TEXTS = (
    "The ship lay quiet in the harbour, and nobody on board spoke of the storm.",
    "Two numbers are prime to each other if no larger number divides both of them.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures (all)")
    parser.add_argument("--table", action="store_true", help="write the table from the kept results alone")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    groups = all_names()
    known = {name for names in groups.values() for name in names}
    if unknown := set(args.names) - known:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such architecture; names are {', '.join(sorted(known))}")
    for name in [] if args.table else args.names or sorted(known):
        result = in_own_process(name)
        (KEPT / f"{name}.json").write_text(canonical_json(result))
        print(f"{name}: {summary(result)}", flush=True)
    TABLE.write_text("\n".join(table(groups)) + "\n")


def all_names() -> dict[str, list[str]]:
    """{group: names}, each name once."""
    from auto_quantize_model.made.tiny_shapes import SHAPES
    from auto_quantize_model.made.tiny_text import text_types

    # Some model types have a causal class besides the class of a shape.
    texts = [f"{name}{OF_TEXT}" if name in SHAPES else name for name in text_types()]
    return {"Models of images and text, encoders and classifiers": list(SHAPES), "Causal language models": texts}


def in_own_process(name: str) -> dict[str, Any]:
    """The result of one architecture, or its error in words."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_tried, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            found: dict[str, Any] = ours.recv()
            return found
        return {"error": f"took more than {SECONDS} seconds"}
    except EOFError:
        return {"error": "its process ended"}
    finally:
        process.kill()
        process.join()


def _tried(name: str, connection: Any) -> None:
    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        found = measured(name)
    except Exception as error:  # whatever a class of transformers raises is this row's result
        where = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        found = {"error": f"{where}{' '.join(str(error).split())[:300]}"}
    connection.send(found)


def measured(name: str) -> dict[str, Any]:
    """Plan, scores and audits of one tiny model, as JSON."""
    import torch

    from auto_quantize_model.config import PlanSpec
    from auto_quantize_model.inc.audit import audit_capture
    from auto_quantize_model.inc.plan import build_plan
    from auto_quantize_model.measure.capture import capture_sensitivity
    from auto_quantize_model.measure.served_audit import audit_served
    from auto_quantize_model.measure.store import ScoreStore
    from auto_quantize_model.models.snapshot import build_manifest, load_model, load_processor
    from auto_quantize_model.replay.calibrate import calibrate
    from auto_quantize_model.replay.scales import ALL_BATCHES, name_of_batch

    started = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = write(name, Path(folder) / "snapshot")
        manifest = build_manifest(snapshot, name, "local", {})
        model: Any = load_model(snapshot)
        processor = load_processor(snapshot)
        batches, count = samples(processor), 1 + processor.family.takes_images
        plan = build_plan(model, batches, PlanSpec(confidence_batches=count, schemes=SCHEMES, maps=MAPS))
        scales = calibrate(model, plan, batches, True)
        of_batch, of_all = [scales[name_of_batch(index)] for index in range(count)], scales[ALL_BATCHES]
        store = ScoreStore(Path(folder) / "scores")
        capture, _ = capture_sensitivity(model, batches, plan, store, of_batch, of_all=of_all)
        audit = audit_capture(model, batches, plan, capture, AUDITED, of_batch)
        served = audit_served(model, batches, 0, plan, capture, AUDITED, of_all)
    return {
        "architecture": manifest.architecture,
        "ops": len(plan.ops),
        "not_run": sum(not op.ran for op in plan.ops),
        "coverage": plan.coverage,
        "inc_check": plan.inc_check,
        "tower": of_images(plan, capture) if count > 1 else None,
        "head_only": plan.head_only,
        "by": audit.by if audit.compared else "",
        "compared": audit.compared,
        "served": served,
        "seconds": round(time.monotonic() - started, 1),
    }


def of_images(plan: Any, capture: Any) -> tuple[int, int]:
    """How many ops of the image's tower have other scores with another image, and how many ran."""
    scores = capture.of_map("isolated", plan.main_scheme)
    ran = [scores[op.op_name] for op in plan.ops if op.tower == "vision" and op.ran and op.op_name in scores]
    return sum(one.mse_value != other.mse_value for one, other in ran if one and other), len(ran)


def write(name: str, directory: Path) -> Path:
    """The tiny snapshot of an architecture.

    Raises:
        InputError: transformers cannot build the model alone, and such a model is refused by name.
    """
    from auto_quantize_model.made.tiny import write_tiny
    from auto_quantize_model.made.tiny_shapes import SHAPES
    from auto_quantize_model.made.tiny_text import class_of, write_tiny_text
    from auto_quantize_model.models.architecture import check_architecture

    if name in SHAPES:
        return write_tiny(name, directory)
    model_type = name.removesuffix(OF_TEXT)
    try:
        return write_tiny_text(model_type, directory)
    except Exception:
        check_architecture({"architectures": [class_of(model_type)], "model_type": model_type}, Path("config.json"))
        raise


def samples(processor: Any) -> list[Any]:
    """Two batches of one sample each, with an image where the model takes images."""
    import numpy as np
    from PIL import Image

    from auto_quantize_model.models.encode import encode
    from auto_quantize_model.models.sample import Limits, Sample

    limits = Limits(min_pixels=28 * 28, max_pixels=112 * 112, max_tokens=2000)
    generator = np.random.default_rng(0)
    found = []
    for number, text in enumerate(TEXTS):
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        images = (Image.fromarray(pixels),) if processor.family.takes_images else ()
        found.append(encode(Sample(str(number), TEXTS[0] if images else text, images), processor, limits))
    return found


def table(groups: dict[str, list[str]]) -> Iterator[str]:
    """The lines of docs/families.md."""
    import torch
    import transformers

    yield "# Families"
    yield ""
    yield (
        "Each row is a tiny model with random weights. Its class and configuration are those of transformers"
        f" {transformers.__version__}, and it is loaded as a user's snapshot is. Two columns show the share of the"
        " weights and of the multiply-adds that the planned ops hold. The audit measured values again, in INC's scheme"
        f" and in {len(SCHEMES) - 1} schemes of compressed-tensors. A row exists only if every value had the same bits."
        " Other models are listed with their error. With images, two samples differ in their image alone, and the"
        " remark says how many ops of the image's tower have other scores."
    )
    yield ""
    yield (
        f"`python benchmarks/families.py` writes this file (torch {torch.__version__}, one thread). At tiny size small"
        " parts weigh more than they do in a published model."
    )
    for group, names in groups.items():
        results = {name: json.loads(path.read_text()) for name in names if (path := KEPT / f"{name}.json").exists()}
        good = {name: result for name, result in results.items() if "error" not in result}
        yield from ("", f"## {group}", "", f"{len(good)} of {len(results)} were measured and audited.", "")
        heads = "model type", "ops", "weights", "multiply-adds", "INC's scheme", "other schemes", "seconds", "remarks"
        yield f"| {' | '.join(heads)} |"
        yield "|---|---:|---:|---:|---|---|---:|---|"
        for name, result in sorted(good.items()):
            yield row(name, result)
        if others := {name: result["error"] for name, result in results.items() if "error" in result}:
            yield from ("", "Not measured:", "")
            # The folder of the snapshot is another one in each run.
            yield from (f"- `{name}`: {code(re.sub(r'/[^ ]*/', '', error))}" for name, error in sorted(others.items()))


def row(name: str, result: dict[str, Any]) -> str:
    """One architecture as a row of the table."""
    coverage = result["coverage"]
    by = {"inc": "INC", "torch": "torch's modules", "": "–"}[result["by"]]
    audited = f"{result['compared']} by {by}, 0 differ" if result["compared"] else "not measured"
    served = f"{sum(result['served'].values())}, 0 differ"
    share = f"{100 * coverage['share']:.1f} %"
    cells = f"`{name}`", result["ops"], share, products(coverage), audited, served, f"{result['seconds']:.0f}"
    return f"| {' | '.join(map(str, cells))} | {remarks(result)} |"


def products(coverage: dict[str, Any]) -> str:
    """The share of the multiply-adds that the planned ops hold."""
    sums = [sum(tower[f"multiply_adds_{key}"] for tower in coverage["towers"].values()) for key in ("planned", "total")]
    return f"{100 * sums[0] / sums[1]:.1f} %"


def remarks(result: dict[str, Any]) -> str:
    """What a reader must know of a row, in sentences. Names and texts of others stand as code."""
    coverage, found = result["coverage"], []
    if coverage["share"] < ENOUGH:
        found += [f"Left out: {code(part['pattern'])}, {code(part['reason'])}." for part in coverage["left_out"][:2]]
    if result["head_only"]:
        found.append("Measured before the model scales or caps its logits.")
    if result.get("tower") and result["tower"][1]:
        found.append("{} of {} tower ops have other scores with another image.".format(*result["tower"]))
    if result["not_run"]:
        found.append(f"{result['not_run']} of the ops never ran on these samples.")
    if "reason" in result["inc_check"]:
        found.append(f"INC cannot measure it: {code(result['inc_check']['reason'].split(' on batch')[0])}.")
    return " ".join(found).replace("|", "\\|")


def code(text: str) -> str:
    """A text as code in Markdown."""
    return f"`{text.replace('`', chr(39))}`"


def summary(result: dict[str, Any]) -> str:
    """A result in one line for the terminal."""
    if "error" in result:
        return f"error: {result['error']}"
    values, share = result["compared"] + sum(result["served"].values()), 100 * result["coverage"]["share"]
    return f"{share:.1f} %, {values} values, 0 differ, {result['seconds']} s; {remarks(result)}"


if __name__ == "__main__":
    main()
