"""How much of a model the planned ops cover, and what the plan leaves out.

In: the model, and the names of the modules that are planned or that the config keeps in FP32. Out: the plan's
`coverage`.
"""

import re
from collections.abc import Collection
from typing import Any

import torch

from auto_quantize_model.records import Coverage

NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def cover(model: torch.nn.Module, planned: Collection[str], kept: Collection[str]) -> Coverage:
    """The share of the weights that the planned ops hold.

    Args:
        model: in FP32.
        planned: names of the modules that are planned in INT8.
        kept: names of the modules that the config keeps in FP32; the user chose them, so they are not left out.

    Returns:
        {weights_total, weights_planned, weights_kept, share, left_out: [{pattern, class, count, weights, bytes}]}.
        Every parameter counts once, a tied one too. It is planned if it is the weight of a planned module. The bias of
        a planned module stays in FP32 and counts only in the total. `left_out` groups the parameters of all modules
        that are neither planned nor kept, the largest first: by name, with `*` for numbers, and by the module's class.
        `count`: modules (or parameters with other names than weight and bias). `weights`: values. `bytes`: as loaded.
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
