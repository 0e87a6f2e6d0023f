"""A choice of schemes made better where all its units have their schemes.

In: a choice, the options of the units, and calibration batches. Out: a choice with no more divergence on these batches.

The sum of the units' losses forgets how the errors of a mixed model meet. `measure/slopes.py` says how the divergence
changes when one unit changes its scheme. Around a choice this gives other losses, and the same allocation finds a
better choice. That is repeated while the measured divergence falls.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from auto_quantize_model.decide.allocate import Choice, allocate, state_of
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.slopes import Slopes, kept_slopes
from auto_quantize_model.records import Options
from auto_quantize_model.replay.model import Batch

ROUNDS = 4  # choices that are measured for one budget
BATCHES = 4  # calibration batches that a choice is refined on


class Refinement:
    """Refines choices on a few calibration batches.

    Args:
        units: with their options, whose losses are those of units alone.
        heldout: whose replay and store are used; no held-out batch is.
        batches: of the calibration.
    """

    def __init__(self, units: Sequence[Options], heldout: HeldOut, batches: Sequence[Batch]) -> None:
        self.units, self.heldout, self.batches = units, heldout, batches[:BATCHES]

    def best(self, budget: int, seconds: float | None = None) -> Choice:
        """The best choice within bytes and time: by the sum of losses first, then refined.

        Raises:
            InputError: no choice fits.
        """
        choice = allocate(self.units, budget, seconds)
        if not self.batches:
            return choice
        best, least = choice, math.inf
        for done in count(1):
            divergence, found = self.at(choice)
            if divergence >= least:
                return best
            best, least = choice, divergence
            if done == ROUNDS or (choice := allocate(self.around(best, found), budget, seconds)) == best:
                return best
        raise AssertionError  # count does not end

    def at(self, choice: Choice) -> tuple[float, Slopes]:
        """The mean divergence of a choice over the batches, and the mean slopes."""
        state = state_of(choice, self.units)
        wanted = {
            unit.name: (list(unit.ops), [scheme for scheme in unit.bytes if scheme != now])
            for unit, now in zip(self.units, choice, strict=True)
        }
        found = [kept_slopes(self.heldout, *pair, state, wanted) for pair in zip(self.batches, count())]
        means = {
            unit: {scheme: math.fsum(slopes[unit][scheme] for _, slopes in found) / len(found) for scheme in schemes}
            for unit, (_, schemes) in wanted.items()
        }
        return math.fsum(divergence for divergence, _ in found) / len(found), means

    def around(self, choice: Choice, slopes: Slopes) -> list[Options]:
        """The units with losses that hold around a choice, the least of each unit 0.

        A unit that changes from one scheme to another changes the divergence by the slope, and by the loss of the
        change itself. The errors of two schemes are taken as independent, so that is the sum of their losses.
        """
        found = []
        for unit, now in zip(self.units, choice, strict=True):
            changes = {
                scheme: 0.0 if scheme == now else slopes[unit.name][scheme] + unit.loss[now] + unit.loss[scheme]
                for scheme in unit.bytes
            }
            least = min(changes.values())
            found.append(replace(unit, loss={scheme: change - least for scheme, change in changes.items()}, error={}))
        return found
