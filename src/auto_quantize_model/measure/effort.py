"""Which scores of the isolated map are measured, and which are estimated; and how long that takes.

In: what the config asks for, the plan, and the time of a first forward. Out: the effort, the time in words, and after
the estimates the ops whose scores are measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from auto_quantize_model.needs import IN_TEN_MINUTES
from auto_quantize_model.records import Effort, Estimate

PROBES = 16
TOP = 40
# Up to this many multiply-adds, exact scores are cheap: about ten minutes of two CPU cores, or of a GPU. Counting them
# in place of seconds makes the same config measure the same scores on every machine.
CHEAP = IN_TEN_MINUTES
MOST_PROBES = (64, 32, 16, 8)  # what a time budget may buy; a smaller one buys 4
SHARE_OF_PROBES = 1 / 3  # of a time budget
SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(time_budget: str) -> int:
    """A time such as `20m`, in seconds."""
    return int(time_budget[:-1]) * SECONDS[time_budget[-1]]


@dataclass(frozen=True)
class Costs:
    """What the measurement of a plan costs, by a timed first forward.

    Attributes:
        batches: how many are scored.
        forward: seconds of one FP32 forward.
        comparison: seconds to compare an output with the reference.
        isolated: how many states the isolated map has in all schemes on all batches.
        isolated_forwards: the same as a number of whole forwards, because each runs the blocks from its op on.
        others: states of the other maps, and `other_forwards` as forwards.
        schemes: how many.
    """

    batches: int
    forward: float
    comparison: float
    isolated: int
    isolated_forwards: float
    others: int
    other_forwards: float
    schemes: int

    def exact(self, share: float = 1.0) -> float:
        """Seconds for a share of the isolated map."""
        return share * (self.isolated_forwards * self.forward + self.isolated * self.comparison)

    @property
    def other_maps(self) -> float:
        """Seconds for all other states. With every op quantized a forward takes about twice the time."""
        return 2 * self.other_forwards * self.forward + self.others * self.comparison

    def probes(self, count: int) -> float:
        """Seconds for estimates."""
        return self.batches * self.forward * self.forwards_of_probes(count)

    def forwards_of_probes(self, count: int) -> float:
        """What probes cost on a batch, in forwards: two forwards, one in each scheme, and a backward for each probe."""
        return 2 + 2 * self.schemes + 1.5 * count


def chosen(exact: str, time_budget: str | None, costs: Costs, ops: int, multiply_adds: float, device: str) -> Effort:
    """The effort that a config asks for.

    Args:
        exact: `sensitivity.exact`.
        time_budget: `sensitivity.time_budget`; with a budget, `auto` depends on the machine's speed.
        ops: how many the plan has.
        multiply_adds: of the whole isolated map on all batches.
        device: `cpu` or `cuda`.
    """
    budget = seconds_of(time_budget) if time_budget else None
    if exact != "auto":
        return Effort(exact, 0 if exact == "all" else probes_within(budget, costs), "sensitivity.exact")
    if budget is None:
        if multiply_adds <= CHEAP[device]:
            return Effort("all", 0, "all scores are cheap for this model")
        return Effort(f"top:{TOP}", PROBES, "all exact scores would be expensive for this model")
    if costs.exact() + costs.other_maps <= budget:
        return Effort("all", 0, f"all scores fit in {time_budget}")
    probes = probes_within(budget, costs)
    share = max(0.0, budget - costs.probes(probes) - costs.other_maps) / costs.exact() if costs.exact() else 0.0
    fits = math.floor(min(1.0, share) * ops / 2)  # as many again may be near the border
    return Effort(f"top:{fits}" if fits else "none", probes, f"that is what fits in {time_budget}")


def probes_within(budget: float | None, costs: Costs) -> int:
    """How many probes take their share of a time budget; the default without a budget."""
    if budget is None:
        return PROBES
    return next((count for count in MOST_PROBES if costs.probes(count) <= budget * SHARE_OF_PROBES), 4)


def top_of(effort: Effort, ops: int) -> int:
    """How many ops of each scheme an effort measures at first, of this many."""
    return ops if effort.exact == "all" else min(ops, int(effort.exact.partition(":")[2] or 0))


def selected(effort: Effort, estimates: Sequence[Estimate]) -> dict[str, set[str]]:
    """The ops whose isolated scores are measured, for each scheme, where not all are; or the units.

    These are the N ops with the largest estimates, and at most N others that may belong to them. The estimate of such
    an op is less than two standard errors below the last of the N.
    """
    by_scheme: dict[str, list[Estimate]] = {}
    for made in estimates:
        by_scheme.setdefault(made.scheme, []).append(made)
    found = {}
    for scheme, ops in by_scheme.items():
        ops = sorted(ops, key=lambda made: -made.divergence)
        top = top_of(effort, len(ops))
        border = ops[top - 1].divergence if top else math.inf
        near = [made for made in ops[top:] if made.divergence + 2 * made.standard_error >= border]
        found[scheme] = {made.op_name for made in (*ops[:top], *near[:top])}
    return found


def described_effort(effort: Effort, costs: Costs, ops: int) -> str:
    """What will be measured and how long that takes, in a line."""
    counted_batches = f"{costs.batches} batch{'es' * (costs.batches != 1)}"
    what = f"{ops} ops in {costs.schemes} scheme{'s' * (costs.schemes != 1)} on {counted_batches}"
    if effort.exact == "all":
        return f"{what}: all scores exactly, in about {in_words(costs.other_maps + costs.exact())} ({effort.reason})"
    top, time = top_of(effort, ops), costs.other_maps + costs.probes(effort.probes)
    low, high = (in_words(time + costs.exact(min(1.0, count / ops))) for count in (top, 2 * top))
    then = f", then exact scores of the top {top} in each scheme and of at most as many near them" if top else ""
    span = low if low == high else f"{low} to {high}"
    return f"{what}: estimates by {effort.probes} probes{then}, in about {span} ({effort.reason})"


def in_words(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
