"""The share of the weights that the planned ops hold, in sentences for the report, the terminal and the exports."""

from typing import Literal

from auto_quantize_model.records import Coverage

# Below this share of the weights, the planned ops are not the model.
ENOUGH = 0.9
MULTIPLY_ADDS: tuple[Literal["multiply_adds_total"], Literal["multiply_adds_planned"]] = (
    "multiply_adds_total",
    "multiply_adds_planned",
)


def is_partial(coverage: Coverage) -> bool:
    """Whether too much of the model is left out of the plan to speak of the model as quantized."""
    return coverage["weights_planned"] + coverage["weights_kept"] < ENOUGH * coverage["weights_total"]


def headline(ops: int, coverage: Coverage) -> str:
    """The share of the weights, in a sentence without a full stop."""
    kept = coverage["weights_kept"]
    chosen = f"; the config keeps {share_of(kept, coverage)} of them in FP32" if kept else ""
    found = f"{ops} ops hold {share_of(coverage['weights_planned'], coverage)} of the weights"
    total, planned = (sum(tower[key] for tower in coverage["towers"].values()) for key in MULTIPLY_ADDS)
    if total:
        found += f" and {in_percent(planned, total)} of the multiply-adds"
    if total and len(coverage["towers"]) > 1:
        parts = [
            f"{name} {in_percent(tower['weights_planned'], tower['weights_total'])} and"
            f" {in_percent(*(tower[key] for key in reversed(MULTIPLY_ADDS)))}"
            for name, tower in coverage["towers"].items()
        ]
        found += f" ({'; '.join(parts)})"
    return found + chosen


def share_of(weights: int, coverage: Coverage) -> str:
    """A share of all weights as a percentage with one digit, rounded down: 100 % means all weights."""
    return in_percent(weights, coverage["weights_total"])


def in_percent(part: int, whole: int) -> str:
    """A share as a percentage with one digit, rounded down: 100 % means all."""
    return f"{1000 * part // max(whole, 1) / 10:.1f} %"


def left_out(coverage: Coverage, most: int = 6) -> str:
    """The modules left out of the plan with their bytes, the largest group first."""
    groups = coverage["left_out"]
    named = [
        f"{group['pattern']} ({group['class']}, {group['count']} x, {in_bytes(group['bytes'])})"
        for group in groups[:most]
    ]
    more = len(groups) - most
    smaller = "1 smaller group" if more == 1 else f"{more} smaller groups"
    return ", ".join(named) + (f" and {smaller}" if more > 0 else "")


def in_bytes(value: int, digits: int = 3) -> str:
    """Bytes in the largest unit that leaves a digit before the point after rounding to significant digits."""
    rounded = float(f"{value:.{digits}g}")
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if rounded >= pair[1]), ("bytes", 1))
    return f"{value / size:.{digits}g} {unit}"


def warnings(coverage: Coverage) -> list[str]:
    """A warning where the plan leaves out much of the model."""
    if not is_partial(coverage):
        return []
    return [
        f"The planned ops hold only {share_of(coverage['weights_planned'], coverage)} of the model's weights, and every"
        f" number here is about these ops alone. Never quantized and never measured: {left_out(coverage)}."
    ]


def remark(coverage: Coverage) -> list[str]:
    """A remark for users of an export: all modules that the plan leaves out."""
    groups = coverage["left_out"]
    if not groups:
        return []
    weights = sum(group["weights"] for group in groups)
    return [
        "Left alone, because the plan has no op for these modules and nothing was measured of them"
        f" ({share_of(weights, coverage)} of the weights): {left_out(coverage, len(groups))}."
    ]
