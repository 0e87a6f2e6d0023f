"""The states that a map measures, as assignments, in the order that runs the smallest part of the model."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from auto_quantize_model.records import Plan
from auto_quantize_model.schemes.scheme import INC_INT8, Assignment, assigned

ALL = "all"  # the state with every op quantized, among the maps
UNITS = "units"  # a unit of several ops quantized, and no other op
ALONE = ("isolated", UNITS)  # the maps that a decision reads, whose scores may be estimates


def maps_of(plan: Plan, scheme: str, maps: Iterable[str]) -> list[str]:
    """Which of `maps` are measured in a scheme: `requantize` is INC's alone, and `fallback` is measured where asked."""
    served = (*ALONE, ALL, *(["fallback"] if scheme in plan.fallback_schemes else []))
    return [label for label in maps if scheme == INC_INT8 or label in served]


def states(
    order: Sequence[str],
    plan_order: Sequence[str],
    maps: Collection[str],
    scheme: str = INC_INT8,
    units: Mapping[str, Sequence[str]] = MappingProxyType({}),
    others: Sequence[str] = (),
) -> Iterator[tuple[str, str, Assignment]]:
    """Each state of one scheme to measure as (map, op or unit, assignment).

    `isolated`, `units` and `fallback` go from the last op that runs to the first, so each run shares all blocks before
    its op with the previous run. `requantize` must go in the plan's order. It ends with every op quantized, so the map
    `all` (with an empty op) and `fallback` start from there.

    Args:
        order: the ops that run, in the order of their first execution.
        plan_order: all ops, in the plan's order.
        maps: which maps, `all` among them.
        scheme: of every quantized op.
        units: {unit: its ops} for those of several ops that can have the scheme.
        others: ops that do not run in FP32, and that a router may choose in another state. They have no score, and
            they are quantized in every state that quantizes all ops.
    """
    everything = assigned([*order, *others], scheme)
    if "isolated" in maps:
        for name in reversed(order):
            yield "isolated", name, {name: scheme}
    if UNITS in maps:
        ran = {name: [op for op in order if op in ops] for name, ops in units.items()}
        for name in sorted(filter(ran.get, ran), key=lambda name: -order.index(ran[name][0])):
            yield UNITS, name, assigned(ran[name], scheme)
    if "requantize" in maps:
        so_far: list[str] = []
        for name in plan_order:
            if name in everything:
                so_far.append(name)
            if name in order:
                yield "requantize", name, assigned(so_far, scheme)
    if ALL in maps:
        yield ALL, "", everything
    if "fallback" in maps:
        for name in reversed(order):
            yield "fallback", name, {other: scheme for other in everything if other != name}
