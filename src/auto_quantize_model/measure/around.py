"""How the divergence changes near a state of the model, for all units and schemes at once.

In: a state, a batch, and the schemes that each unit can change to. Out: the divergence of the state, and its change to
second order for every set of changes.

In a mixed model the errors of the units meet: some add up, others cancel. A sum over units that were quantized alone
knows nothing of this. The gradient of the divergence, taken where all units have their schemes, does. Its product with
the change of an op's output is the change of the divergence to first order. Random directions with the Fisher
covariance give the second order, as in `measure.probes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.probes import Wanted, ready_schemes, together
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.scheme import Assignment

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Around:
    """The divergence near a state. A change is one unit in another scheme.

    Attributes:
        divergence: of the state, the mean over positions, in nats for logits.
        slopes: (changes,), first order, in the same unit.
        apart: (changes, changes), second order, from products of the same row. Half of the diagonal is the second order
            of one change. Another entry is what two changes add together.
        whole: (changes,), the diagonal of the second order from the sums over all rows of a sample.
    """

    divergence: float
    slopes: Array
    apart: Array
    whole: Array

    @property
    def curvature(self) -> Array:
        """The second order, (changes, changes). Errors of different rows meet as well: one factor for all changes."""
        rows = self.apart.diagonal().sum()
        return self.apart * (self.whole.sum() / rows if rows else 1.0)


def around(
    replay: Replay, batch: Batch, state: Assignment, wanted: Mapping[str, Wanted], seeds: Sequence[int]
) -> Around:
    """The divergence near a state on one batch.

    Args:
        replay: with scales set.
        state: of the whole model, in schemes of compressed-tensors.
        wanted: {unit: its ops, and the schemes to change to}, where `unquantized` may be one. The changes are in this
            order. An op that does not run on the batch changes nothing.
        seeds: of the random directions.

    Raises:
        InputError: the measured op runs inside of a block.
    """
    reference = Reference.of(replay.begin(batch).clone(), batch, replay.measured_op)
    positions = reference.output.shape[:-1].numel()
    divergence = 0.0

    def direction(output: torch.Tensor, index: int) -> torch.Tensor:
        nonlocal divergence
        if index:
            return reference.divergence.direction(output, seeds[index - 1])
        divergence = reference.compare(output)["divergence"]
        return reference.divergence.gradient(reference.output, output) / positions

    ran = {name: scheme for name, scheme in state.items() if name in replay.order}
    state = {name: scheme for name, scheme in ran.items() if replay.sites[name].ready(scheme)}
    asked = ready_schemes(replay, wanted)
    products = Backward(replay, asked, 1 + len(seeds), state).run(direction, lambda done, total: None)
    found: list[torch.Tensor | None] = []
    for ops, schemes in wanted.values():
        for scheme in schemes:
            parts = [products[op][asked[op].index(scheme)] for op in ops if op in products and scheme in asked[op]]
            found.append(together(parts).double().cpu() if parts else None)
    return second_order(divergence, found, len(seeds), positions)


def second_order(divergence: float, products: Sequence[torch.Tensor | None], probes: int, positions: int) -> Around:
    """The model of all changes.

    Args:
        products: of each change with the gradient and then with each random direction, (1 + probes, samples, rows).
            None where nothing changes.
    """
    count = len(products)
    slopes, whole, apart = np.zeros(count), np.zeros(count), np.zeros((count, count))
    of_shape: dict[torch.Size, list[int]] = {}  # the ops of a vision tower have other rows than those of the text
    for index, product in enumerate(products):
        if product is not None:
            slopes[index] = float(product[0].sum())
            whole[index] = float(product[1:].sum(-1).pow(2).sum())
            of_shape.setdefault(product.shape, []).append(index)
    for indices in of_shape.values():
        rows = torch.stack([product[1:].flatten() for index in indices if (product := products[index]) is not None])
        apart[np.ix_(indices, indices)] = (rows @ rows.T).numpy()
    scale = 1 / (max(1, probes) * positions)
    return Around(divergence, slopes, apart * scale, whole * scale)


def mean(found: Sequence[Around]) -> Around:
    """The mean over batches."""
    columns = [np.mean([getattr(one, name) for one in found], 0) for name in ("slopes", "apart", "whole")]
    return Around(float(np.mean([one.divergence for one in found])), *columns)
