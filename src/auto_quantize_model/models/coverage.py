"""How much of a model the planned ops cover, and what the plan leaves out.

In: the model, and the names of the modules that are planned or that the config keeps in FP32. Out: the plan's
`coverage`.
"""

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from auto_quantize_model.models.units import tower_of, towers_with
from auto_quantize_model.records import Coverage, TowerShare

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unknown to torch's counter
NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def cover(
    model: torch.nn.Module,
    planned: Collection[str],
    kept: Collection[str],
    reasons: Mapping[str, str] = MappingProxyType({}),
    batch: Mapping[str, torch.Tensor] | None = None,
) -> Coverage:
    """The share of the weights and of the multiply-adds that the planned ops hold.

    Args:
        model: in FP32.
        planned: names of the modules that are planned in INT8.
        kept: names of the modules that the config keeps in FP32; the user chose them, so they are not left out.
        reasons: {name of a module: why it is not planned}.
        batch: one forward of it counts the multiply-adds; None counts none.

    Returns:
        {weights_total, weights_planned, weights_kept, share, towers: {tower: {weights_total, weights_planned,
        multiply_adds_total, multiply_adds_planned}}, left_out: [{pattern, class, count, weights, bytes, reason}]}.
        Every parameter counts once, a tied one too. It is planned if it is the weight of a planned module. The bias of
        a planned module stays in FP32 and counts only in the total. `left_out` groups the parameters of all modules
        that are neither planned nor kept, the largest first: by name, with `*` for numbers, and by the module's class.
        `count`: modules (or parameters with other names than weight and bias). `weights`: values. `bytes`: as loaded.
        `multiply_adds` are those of one forward, with the products of the attention, which hold no weights.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    total = in_plan = in_fp32 = 0
    tower_at = tower_of if batch is None else towers_with(batch)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    towers: dict[str, TowerShare] = {} if batch is None else multiply_adds(model, planned, batch)
    for parameter in model.parameters():
        names = owners[id(parameter)]
        modules = {name.rpartition(".")[0] for name in names}
        total += parameter.numel()
        tower = towers.setdefault(tower_at(names[0]), nothing())
        tower["weights_total"] += parameter.numel()
        if any(name.removesuffix(".weight") in planned for name in names):
            in_plan += parameter.numel()
            tower["weights_planned"] += parameter.numel()
        elif any(name.removesuffix(".weight") in kept for name in names):
            in_fp32 += parameter.numel()
        elif not modules & {*planned, *kept}:
            module, _, own = names[0].rpartition(".")
            thing = module if own in ("weight", "bias") else names[0]
            key = NUMBERED.sub("*", thing), type(model.get_submodule(module)).__name__
            # A module that holds a plain one shares its weight, and the reason stands at one of the two.
            reason = next((reasons[owner] for owner in sorted(modules) if owner in reasons), "")
            group = groups.setdefault(key, {"things": set(), "weights": 0, "bytes": 0, "reason": reason})
            group["things"].add(thing)
            group["weights"] += parameter.numel()
            group["bytes"] += parameter.numel() * parameter.element_size()
    return {
        "weights_total": total,
        "weights_planned": in_plan,
        "weights_kept": in_fp32,
        "share": in_plan / total if total else 0.0,
        "towers": towers,
        "left_out": [
            {
                "pattern": pattern,
                "class": kind,
                "count": len(group["things"]),
                "weights": group["weights"],
                "bytes": group["bytes"],
                "reason": group["reason"],
            }
            for (pattern, kind), group in sorted(groups.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        ],
    }


def of_attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    """The operations of an attention by the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))


def nothing() -> TowerShare:
    """A tower without weights."""
    return {"weights_total": 0, "weights_planned": 0, "multiply_adds_total": 0, "multiply_adds_planned": 0}


def multiply_adds(
    model: torch.nn.Module, planned: Collection[str], batch: Mapping[str, torch.Tensor]
) -> dict[str, TowerShare]:
    """The multiply-adds of one forward for each tower, in all and in planned ops, by torch's `FlopCounterMode`."""
    counter = FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: of_attention})
    with torch.no_grad(), counter:
        model(**batch)
    root = type(model).__name__
    of_module = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    found: dict[str, TowerShare] = {}
    tower_at = towers_with(batch)
    whole = of_module["Global"]
    for name, _ in model.named_modules():
        tower, above = tower_at(name), tower_at(name.rpartition(".")[0])
        of_tower = found.setdefault(tower, nothing())
        count = of_module.get(f"{root}.{name}", 0)
        if name in planned:
            of_tower["multiply_adds_planned"] += count
        if tower != above:  # a tower's outermost modules hold all of its multiply-adds
            of_tower["multiply_adds_total"] += count
            whole -= count
    found.setdefault(tower_at(""), nothing())["multiply_adds_total"] += whole
    return found
