"""Estimates of every op's divergence in every scheme at once, by random directions with the Fisher covariance.

In: a replay with a batch. Out: for each scheme and op, two values for each probe; the estimate comes from their means.

For a small error e of the output the divergence is e' F e / 2. For logits, F = diag(p) - p p' is the Fisher matrix of
the softmax p. A random direction v has the covariance F (`measure.divergence`). So <v, e> squared has the mean e' F e.
The backward pass of v gives the gradient g at each op's output, and <g, q(output) - output> is <v, e> to first order.
One set of gradients serves every op and scheme. Large errors are underestimated, because the first order misses them.

The product is a sum over the rows of the op's output, its tokens or patches. The square of the sum has the right mean,
but a probe gives one draw of it. The sum of the squares has as many draws as rows, and lacks what errors of different
rows do together. `estimates` joins the two.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from auto_quantize_model.measure.divergence import divergence_at
from auto_quantize_model.records import Estimate
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.scheme import UNQUANTIZED

Values = dict[str, dict[str, list[float]]]  # of one probe: {scheme: {name: nats of all rows together, and apart}}
Array = npt.NDArray[np.float64]
Wanted = tuple[Sequence[str], Sequence[str]]  # ops that are quantized together, and their schemes


def probe(
    replay: Replay,
    wanted: Mapping[str, Wanted],
    seeds: Sequence[int],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Values]:
    """Two values for each probe, scheme and op or unit, by one backward pass for each probe.

    Args:
        replay: with a batch begun and scales set.
        wanted: {name: its ops, and the schemes to estimate}; ops that do not run on the batch have no values.
        seeds: of the probes.
        on_block: called after each block with the number done and the total.

    Returns:
        For each probe {scheme: {name: two values in nats per position}}: the squared sum over the rows of each sample,
        whose mean over probes estimates the divergence, and the sum of the squares.

    Raises:
        InputError: the measured op runs inside of a block.
    """
    ready = ready_schemes(replay, wanted)
    backward = Backward(replay, ready, len(seeds))
    divergence = divergence_at(replay.measured_op)
    products = backward.run(lambda output, index: divergence.direction(output, seeds[index]), on_block)
    positions = replay.measured.shape[:-1].numel()
    found: list[Values] = [{} for _ in seeds]
    for name, (ops, schemes) in wanted.items():
        for scheme in schemes:
            able = [op for op in ops if scheme in ready.get(op, ())]
            if not able:
                continue
            # An op that has no part in the output has no gradient, and a divergence of 0.
            parts = [products[op][ready[op].index(scheme)] for op in able if op in products]
            product = (together(parts) if parts else torch.zeros(len(seeds), 1, 1)).double()
            both = product.sum(-1).pow(2).sum(-1), product.pow(2).sum((-2, -1))
            for values, *pair in zip(found, *(side.tolist() for side in both), strict=True):
                values.setdefault(scheme, {})[name] = [value / (2 * positions) for value in pair]
    return found


def ready_schemes(replay: Replay, wanted: Mapping[str, Wanted]) -> dict[str, list[str]]:
    """{op_name: its schemes in `wanted`}, for the ops that run on the batch and the schemes that are ready."""
    found: dict[str, list[str]] = {}
    for ops, schemes in wanted.values():
        for op in (op for op in ops if op in replay.order):
            able = [name for name in schemes if name == UNQUANTIZED or replay.sites[op].ready(name)]
            found[op] = [*dict.fromkeys([*found.get(op, []), *able])]
    return found


def together(products: Sequence[torch.Tensor]) -> torch.Tensor:
    """The products of ops that are quantized together, (directions, samples, rows): to first order errors add up.

    Where the ops do not have the same rows, one row holds the sum over all.
    """
    if len({product.shape for product in products}) > 1:
        products = [product.sum((-2, -1), keepdim=True) for product in products]
    return sum(products[1:], products[0])


def estimates(of_batches: Sequence[Sequence[Values]]) -> list[Estimate]:
    """The values of all batches as one estimate for each scheme and op.

    Args:
        of_batches: for each batch what `probe` returned, with the same number of probes, two or more.

    Returns:
        The mean over batches, then over probes. An op or unit counts on the batches on which it ran.
    """
    by_probe: dict[str, dict[str, list[list[list[float]]]]] = {}
    for batch in of_batches:
        for index, values in enumerate(batch):
            for scheme, ops in values.items():
                for name, pair in ops.items():
                    rows = by_probe.setdefault(scheme, {}).setdefault(name, [[] for _ in batch])
                    rows[index].append(pair)
    found = []
    for scheme, of_scheme in by_probe.items():
        means = np.array([[np.mean(pairs, 0) for pairs in rows] for rows in of_scheme.values()])  # (ops, probes, 2)
        both, unseen = joined(means[..., 0], means[..., 1])
        spread = both.var(1, ddof=1) / both.shape[1]
        halves = [both[:, start::2].mean(1) for start in (0, 1)]
        columns = (both.mean(1), np.sqrt(spread + unseen), abs(halves[0] - halves[1]))
        found += [
            Estimate(scheme, name, *row)
            for name, *row in zip(of_scheme, *(column.tolist() for column in columns), strict=True)
        ]
    return found


def joined(whole: Array, apart: Array) -> tuple[Array, Array]:
    """One value of each op and probe in a scheme, from the squared sums and the sums of squares, each (ops, probes).

    The ratio of the two differs between ops by chance and by their nature. The variance of the squared sums over the
    probes says how much is chance. The more of it is chance, the nearer the logarithm of an op's ratio is brought to
    the mean of all ops. So do James and Stein, "Estimation with Quadratic Loss", 1961.

    Returns:
        The values, (ops, probes), and a variance of each op that the values do not show, (ops,): of the mean ratio, and
        of the part of an op's nature that is lost.
    """
    values, unseen = whole.copy(), np.zeros(len(whole))
    ran = (whole.mean(1) > 0) & (apart.mean(1) > 0)
    if not ran.any():
        return values, unseen
    whole, apart = whole[ran], apart[ran]
    means, sizes = whole.mean(1), apart.mean(1)
    chance = (whole.var(1, ddof=1) / whole.shape[1] / means**2).mean()
    common = np.log((means / sizes).mean())
    nature = max(0.0, ((np.log(means / sizes) - common) ** 2).mean() - chance)
    weight = nature / (nature + chance) if chance else 1.0  # of an op's own ratio
    found = np.exp(weight * np.log(means) + (1 - weight) * (common + np.log(sizes)))
    values[ran] = found[:, None] * (weight * whole / means[:, None] + (1 - weight) * apart / sizes[:, None])
    unseen[ran] = found**2 * (1 - weight) ** 2 * (nature + chance / len(found))
    return values, unseen
