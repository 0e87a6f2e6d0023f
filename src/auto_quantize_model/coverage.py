"""How much of a model the planned ops hold, and what is left out of the plan.

In: the model, and the names of its modules that are planned or that the config keeps in FP32. Out: the plan's
`coverage`, and what the report, the terminal and the exports say of it.
"""

import re
from collections.abc import Collection
from typing import Any

import torch

# Below this share of the weights, the planned ops are not the model.
ENOUGH = 0.9
NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def cover(model: torch.nn.Module, planned: Collection[str], kept: Collection[str]) -> dict[str, Any]:
    """The share of the weights that the planned ops hold.

    Args:
        model: in FP32.
        planned: names of the modules that are planned in INT8.
        kept: names of the modules that the config keeps in FP32; they are the user's choice, not left out.

    Returns:
        {weights_total, weights_planned, weights_kept, share, left_out: [{pattern, class, count, weights, bytes}]}.
        Every parameter counts once, a tied one too, and is planned where it is the weight of a planned module; a bias
        of one stays in FP32 and counts in the total alone. `left_out` groups the parameters of all modules that are
        neither planned nor kept by name, with `*` for numbers, and by the class of the module, the largest first:
        `count` modules (or parameters of other names than weight and bias), `weights` values, `bytes` as loaded.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    total = in_plan = in_fp32 = 0
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for parameter in model.parameters():
        names = owners[id(parameter)]
        modules = {name.rpartition(".")[0] for name in names}
        total += parameter.numel()
        if any(name.removesuffix(".weight") in planned for name in names):
            in_plan += parameter.numel()
        elif any(name.removesuffix(".weight") in kept for name in names):
            in_fp32 += parameter.numel()
        elif not modules & {*planned, *kept}:
            module, _, own = names[0].rpartition(".")
            thing = module if own in ("weight", "bias") else names[0]
            key = NUMBERED.sub("*", thing), type(model.get_submodule(module)).__name__
            group = groups.setdefault(key, {"things": set(), "weights": 0, "bytes": 0})
            group["things"].add(thing)
            group["weights"] += parameter.numel()
            group["bytes"] += parameter.numel() * parameter.element_size()
    return {
        "weights_total": total,
        "weights_planned": in_plan,
        "weights_kept": in_fp32,
        "share": in_plan / total if total else 0.0,
        "left_out": [
            {
                "pattern": pattern,
                "class": kind,
                "count": len(group["things"]),
                "weights": group["weights"],
                "bytes": group["bytes"],
            }
            for (pattern, kind), group in sorted(groups.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        ],
    }


def is_partial(coverage: dict[str, Any]) -> bool:
    """Whether too much of the model is left out of the plan to speak of the model as quantized."""
    return coverage["weights_planned"] + coverage["weights_kept"] < ENOUGH * coverage["weights_total"]


def headline(ops: int, coverage: dict[str, Any]) -> str:
    """The share of the weights, in a sentence without a full stop."""
    kept = coverage["weights_kept"]
    chosen = f"; the config keeps {share_of(kept, coverage)} of them in FP32" if kept else ""
    return f"{ops} ops hold {share_of(coverage['weights_planned'], coverage)} of the weights{chosen}"


def share_of(weights: int, coverage: dict[str, Any]) -> str:
    """A share of all weights as a percentage with one digit, rounded down: less than all is never said to be all."""
    thousandths = 1000 * weights // max(coverage["weights_total"], 1)
    return f"{thousandths / 10:.1f} %"


def left_out(coverage: dict[str, Any], most: int = 6) -> str:
    """What is left out of the plan with its bytes, the largest first."""
    groups = coverage["left_out"]
    named = [
        f"{group['pattern']} ({group['class']}, {group['count']} x, {in_bytes(group['bytes'])})"
        for group in groups[:most]
    ]
    more = len(groups) - most
    smaller = "1 smaller group" if more == 1 else f"{more} smaller groups"
    return ", ".join(named) + (f" and {smaller}" if more > 0 else "")


def in_bytes(value: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= pair[1]), ("bytes", 1))
    return f"{value / size:.3g} {unit}"


def warnings(coverage: dict[str, Any]) -> list[str]:
    """What a reader has to know first where the plan leaves out much of the model."""
    if not is_partial(coverage):
        return []
    return [
        f"The planned ops hold only {share_of(coverage['weights_planned'], coverage)} of the model's weights, and every"
        f" number here is of these ops alone. Never quantized and never measured: {left_out(coverage)}."
    ]


def remark(coverage: dict[str, Any]) -> list[str]:
    """What a user of an export has to know of the modules that the plan leaves out; all of them are named."""
    groups = coverage["left_out"]
    if not groups:
        return []
    weights = sum(group["weights"] for group in groups)
    return [
        "Left alone, because the plan has no INT8 for these modules and nothing was measured of them"
        f" ({share_of(weights, coverage)} of the weights): {left_out(coverage, len(groups))}."
    ]
