"""The best choice of a scheme for each unit within a budget of bytes, and choices that ignore the scores as controls.

In: the options of each unit. Out: choices. A choice is a list with the scheme of each unit, in the order of the units.
"""

import random
import re
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from auto_quantize_model.files import InputError
from auto_quantize_model.records import Options
from auto_quantize_model.schemes.scheme import UNQUANTIZED

Choice = tuple[str, ...]
TOLERANCE = 2e-6  # more than HiGHS lets a constraint be exceeded by
IN_STACK = re.compile(r"(.*?)\.(\d+)\.")


def bytes_of(choice: Choice, units: Sequence[Options]) -> int:
    """The bytes that the weights of the units take."""
    return sum(unit.bytes[scheme] for unit, scheme in zip(units, choice, strict=True))


def state_of(choice: Choice, units: Sequence[Options]) -> dict[str, str]:
    """A choice as a state of the model: {op_name: scheme}, without the unquantized ops."""
    chosen = [(unit, scheme) for unit, scheme in zip(units, choice, strict=True) if scheme != UNQUANTIZED]
    return {name: scheme for unit, scheme in chosen for name in unit.ops}


def loss_of(choice: Choice, units: Sequence[Options]) -> tuple[float, float]:
    """The sum of the losses, and its standard error."""
    chosen = [(unit.loss[scheme], unit.error.get(scheme, 0.0)) for unit, scheme in zip(units, choice, strict=True)]
    return sum(loss for loss, _ in chosen), sum(error**2 for _, error in chosen) ** 0.5


def smallest(units: Sequence[Options]) -> Choice:
    """The choice with the fewest bytes, and of these the one with the least loss."""
    return tuple(min(unit.bytes, key=lambda scheme: (unit.bytes[scheme], unit.loss[scheme])) for unit in units)


def seconds_of(choice: Choice, units: Sequence[Options]) -> float | None:
    """The time of all units by the config's table; None without a table."""
    times = [unit.seconds.get(scheme) for unit, scheme in zip(units, choice, strict=True)]
    return None if None in times else sum(time for time in times if time)


def allocate(units: Sequence[Options], budget: int, seconds: float | None = None) -> Choice:
    """The choice with the least sum of losses that takes at most `budget` bytes, and at most `seconds` if given.

    This is a multiple-choice knapsack, solved by HiGHS through `scipy.optimize.milp`. HiGHS stops within 1e-6 of the
    optimum, in units of the objective. So the losses are divided by the best sum that is known, and the problem is
    solved again until the sum falls no more. An option that alone loses more than that sum is left out.

    Raises:
        InputError: no choice fits; the message has the fewest bytes or the least time that is possible.
    """
    choice = smallest(units)
    fewest = bytes_of(choice, units)
    if budget < fewest:
        raise InputError(f"no choice of schemes fits in {budget} bytes; the smallest takes {fewest} bytes")
    if seconds is not None and not (seconds_of(choice, units) or 0.0) <= seconds:
        choice = solved(units, budget, seconds, sum(max(unit.loss.values()) for unit in units) or 1.0)
    known, _ = loss_of(choice, units)
    while known > 0:
        better = solved(units, budget, seconds, known)
        found, _ = loss_of(better, units)
        if found < known:
            choice = better
        if found > known / 2:
            break
        known = found
    return choice


def solved(units: Sequence[Options], budget: int, seconds: float | None, known: float) -> Choice:
    """The solver's choice, among the options that lose no more than a sum that a choice within the budget has."""
    columns = [
        (index, scheme) for index, unit in enumerate(units) for scheme in unit.bytes if unit.loss[scheme] <= known
    ]
    losses = np.array([units[index].loss[scheme] for index, scheme in columns])
    sizes = np.array([float(units[index].bytes[scheme]) for index, scheme in columns])
    rows = [index for index, _ in columns]
    one_each = csr_array((np.ones(len(columns)), (rows, np.arange(len(columns)))))
    # In units of the budget, because HiGHS has absolute tolerances.
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / budget, -np.inf, 1)]
    if seconds is not None:
        times = np.array([units[index].seconds[scheme] for index, scheme in columns])
        limits.append(LinearConstraint(times[None] / seconds, -np.inf, 1 - TOLERANCE))
    while True:
        found = milp(
            losses / known,
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            problem = f"no choice of schemes fits in {budget} bytes{within_time(units, seconds)}"
            raise InputError(f"{problem}: {found.message}")
        taken = found.x > 0.5
        choice = tuple(scheme for (_, scheme), one in zip(columns, taken, strict=True) if one)
        if (fitting := within(choice, units, budget)) is not None:
            return fitting
        # No step back keeps within the time. The solver takes any other choice from here on.
        limits.append(LinearConstraint(taken[None].astype(float), -np.inf, len(units) - 1))


def within_time(units: Sequence[Options], seconds: float | None) -> str:
    """The limit of the time and the least that is possible, as the end of a message; empty without a limit."""
    if seconds is None:
        return ""
    least = sum(min(unit.seconds[scheme] for scheme in unit.bytes) for unit in units)
    return f" and {seconds:g} s; the fastest choice takes {least:g} s"


def within(choice: Choice, units: Sequence[Options], budget: int) -> Choice | None:
    """A choice that a solver's tolerance let exceed the budget by a few bytes, with the cheapest step back.

    A step back never takes more time. None where there is no such step.
    """
    while (over := bytes_of(choice, units) - budget) > 0:
        steps = [
            ((unit.loss[other] - unit.loss[scheme]) / min(over, unit.bytes[scheme] - unit.bytes[other]), index, other)
            for index, (unit, scheme) in enumerate(zip(units, choice, strict=True))
            for other in unit.bytes
            if unit.bytes[other] < unit.bytes[scheme] and unit.seconds.get(other, 0) <= unit.seconds.get(scheme, 0)
        ]
        if not steps:
            return None
        _, index, other = min(steps)
        choice = (*choice[:index], other, *choice[index + 1 :])
    return choice


def budgets(units: Sequence[Options], points: int) -> list[int]:
    """So many budgets in bytes, from the smallest choice to the largest, at equal ratios."""
    low = bytes_of(smallest(units), units)
    high = sum(max(unit.bytes.values()) for unit in units)
    return [round(low * (high / low) ** (index / (points - 1))) for index in range(points)]


def uniform(units: Sequence[Options], scheme: str) -> Choice:
    """Each unit in one scheme; a unit that cannot have the scheme takes its option with the least loss."""
    return tuple(scheme if scheme in unit.bytes else min(unit.loss, key=unit.loss.__getitem__) for unit in units)


def at_random(units: Sequence[Options], budget: int, seed: int) -> Choice:
    """A random choice that fills the budget: units in random order get random larger options until none fits."""
    draw = random.Random(seed)  # noqa: S311
    order = list(range(len(units)))

    def larger(index: int, choice: Choice, left: int) -> str | None:
        sizes, now = units[index].bytes, units[index].bytes[choice[index]]
        able = [scheme for scheme, size in sizes.items() if now < size <= now + left]
        return draw.choice(able) if able else None

    draw.shuffle(order)
    return _filled(units, budget, order, larger)


def edges_first(units: Sequence[Options], budget: int) -> Choice:
    """The first and the last layers get the most bytes, as a common rule has it, until the budget is full.

    A unit outside of the repeated layers counts as an edge. Units take their largest quantized option. Where all have
    that, they become unquantized in the same order.
    """
    depths = [_depth(unit.ops[0]) for unit in units]
    lengths: dict[str, int] = {}
    for stack, layer in depths:
        lengths[stack] = max(layer, lengths.get(stack, 0))
    distance = [min(layer, lengths[stack] - layer) if stack else -1 for stack, layer in depths]
    order = sorted(range(len(units)), key=lambda index: distance[index])

    def largest(index: int, choice: Choice, left: int) -> str | None:
        sizes, now = units[index].bytes, units[index].bytes[choice[index]]
        able = [scheme for scheme, size in sizes.items() if now < size <= now + left]
        return max([scheme for scheme in able if scheme != UNQUANTIZED] or able, key=sizes.__getitem__, default=None)

    return _filled(units, budget, order, largest)


def _depth(op_name: str) -> tuple[str, int]:
    """The stack of layers and the layer of an op; an empty stack for an op outside of any."""
    found = IN_STACK.match(op_name)
    return (found[1], int(found[2])) if found else ("", 0)


def _filled(
    units: Sequence[Options], budget: int, order: Sequence[int], larger: Callable[[int, Choice, int], str | None]
) -> Choice:
    """The smallest choice with larger options for units in an order, until no larger option fits."""
    choice = smallest(units)
    left, changed = budget - bytes_of(choice, units), True
    while changed:
        changed = False
        for index in order:
            if scheme := larger(index, choice, left):
                left -= units[index].bytes[scheme] - units[index].bytes[choice[index]]
                choice = (*choice[:index], scheme, *choice[index + 1 :])
                changed = True
    return choice
