"""Which states of the model a map measures, in the order that runs the least of the model."""

from collections.abc import Collection, Iterator, Sequence


def states(
    order: Sequence[str], plan_order: Sequence[str], maps: Collection[str]
) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Each state to measure as (map, op, ops in INT8), in the order that runs the least of the model.

    `isolated` and `fallback` go from the last op that runs to the first, so that each run shares all blocks before its
    op with the run before. `requantize` has to go in the plan's order, and ends with every op in INT8, which is where
    `all_int8` (its op is empty) and `fallback` start.
    """
    everything = frozenset(order)
    if "isolated" in maps:
        for name in reversed(order):
            yield "isolated", name, frozenset([name])
    if "requantize" in maps:
        so_far: set[str] = set()
        for name in plan_order:
            if name in everything:
                so_far.add(name)
                yield "requantize", name, frozenset(so_far)
    if "all_int8" in maps:
        yield "all_int8", "", everything
    if "fallback" in maps:
        for name in reversed(order):
            yield "fallback", name, everything - {name}
