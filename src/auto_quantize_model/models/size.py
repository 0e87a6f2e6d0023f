"""The size of a run, by the headers of the snapshot and by the documents that exist, without torch and without a check.

In: the config, and paths of a snapshot and of documents. Each may be missing, incomplete or damaged. Out: numbers for a
scheduler. Snakemake asks twice: when it plans, and again before it starts a job, when the job's inputs exist. A step
checks the same files itself before it loads a weight.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from auto_quantize_model.needs import IN_TEN_MINUTES, Size, bytes_of_logits, in_bytes

TOP = 40  # of `measure.effort`, for `sensitivity.exact: auto`
OPS_OF_WEIGHTS = 5e6  # weights of an op, where no plan counts the ops; small models have smaller ones
MOST_OPS = 2000
PER_UNIT = {"s": 1 / 60, "m": 1, "h": 60}
LONGEST = 100_000_000  # bytes of a header, which safetensors' own readers take as the limit


def weights_of(directory: Path) -> int | None:
    """Number of weights in the safetensors of a snapshot; None where a file is missing or cannot be read."""
    try:
        index = directory / "model.safetensors.index.json"
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        return sum(_weights_in(directory / name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _weights_in(path: Path) -> int:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST:
            raise ValueError(f"{path}: a header of {length} bytes")
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def vocabulary_of(directory: Path) -> int:
    """Number of tokens that a snapshot's model knows, the largest of all its parts; 0 where config.json tells none."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return 0
    return max(_values(config, "vocab_size"), default=0)


def _values(config: Any, key: str) -> list[int]:
    """The whole numbers under a key of a JSON object, and of the objects in it."""
    if not isinstance(config, dict):
        return []
    found = [config[key]] if isinstance(config.get(key), int) else []
    return found + [number for value in config.values() for number in _values(value, key)]


def size_of_run(config: Mapping[str, Any], documents: Mapping[str, Path], device: str) -> Size:
    """The size of a run as far as it is known.

    Args:
        config: checked and complete.
        documents: of the kinds `manifest`, `calibration_manifest` and `plan`; a document that is missing is left out
            of the estimate. Without a snapshot and without a manifest, the model counts as 0 weights. The manifest
            alone, of a snapshot on another machine, counts as 16 bits a weight. Without samples, each sample has
            `max_tokens`. Without a plan, the ops are guessed by the number of weights.
        device: `cpu` or `cuda`.
    """
    manifest, samples, plan = (_read(documents.get(kind)) for kind in ("manifest", "calibration_manifest", "plan"))
    of_samples, sensitivity, decide = config["calibration"], config["sensitivity"], config["decide"]
    directory = Path(manifest.get("path") or config["model"]["path"])
    weights = weights_of(directory)
    if weights is None:
        stored = [file["bytes"] for file in manifest.get("files", ()) if file["name"].endswith(".safetensors")]
        weights = sum(stored) // 2
    rows = of_samples["batch_size"]
    heldout_rows = of_samples["heldout_batch_size"] or rows
    lengths = [sample["tokens"] for split in samples.get("samples", {}).values() for sample in split]
    tokens = max(lengths, default=of_samples["max_tokens"])
    towers = plan.get("coverage", {}).get("towers", {}).values()
    counted = sum(tower["multiply_adds_total"] for tower in towers)
    ops = len(plan.get("ops", ())) or math.ceil(min(MOST_OPS, weights / OPS_OF_WEIGHTS + 50))
    schemes, batches = len(sensitivity["schemes"]), sensitivity["confidence_batches"]
    multiply_adds = counted or weights * rows * tokens
    budget, memory = sensitivity["time_budget"], config["machine"]["memory"]
    return Size(
        weights=weights,
        logits=bytes_of_logits(max(rows, heldout_rows), tokens, vocabulary_of(directory)),
        multiply_adds=multiply_adds,
        ops=ops,
        schemes=schemes,
        maps=len(sensitivity["maps"]),
        batches=batches,
        all_batches=of_samples["num_samples"] / rows,
        heldout=decide["heldout_batches"] * heldout_rows / rows,
        audit_ops=sensitivity["audit_ops"],
        points=decide["points"],
        refine_batches=decide["refine_batches"],
        top=_top(sensitivity["exact"], ops * schemes * batches * multiply_adds <= IN_TEN_MINUTES[device]),
        budget=float(budget[:-1]) * PER_UNIT[budget[-1]] if budget else None,
        memory=in_bytes(memory) if memory else None,
    )


def _top(exact: str, cheap: bool) -> int | None:
    """How many ops of a scheme are measured after the estimates; None for all without estimates."""
    if exact == "all" or exact == "auto" and cheap:
        return None
    return TOP if exact == "auto" else int(exact.partition(":")[2] or 0)


def _read(path: Path | None) -> dict[str, Any]:
    """The document at a path; empty where it is missing or damaged, which the step itself reports."""
    try:
        return {} if path is None else _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=64)
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a JSON object")
    return document
