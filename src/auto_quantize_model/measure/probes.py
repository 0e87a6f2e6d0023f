"""Estimates of every op's KL divergence in every scheme at once, by random directions with the Fisher covariance.

In: a replay with a batch. Out: for each scheme and op, one value for each probe; their mean estimates the divergence.

For a small error e of the logits the divergence is e' F e / 2. F = diag(p) - p p' is the Fisher matrix of the softmax
p. With r standard normal, v = sqrt(p) r - p <sqrt(p), r> has the covariance F. So <v, e> squared has the mean e' F e.
The backward pass of v gives the gradient g at each op's output, and <g, q(output) - output> is <v, e> to first order.
One set of gradients serves every op and scheme. Large errors are underestimated, because the first order misses them.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from auto_quantize_model.records import Estimate
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import Replay

ROWS_AT_ONCE = 64  # positions whose distributions are in memory at a time
Values = dict[str, dict[str, float]]  # of one probe: {scheme: {name: nats}}
Wanted = tuple[Sequence[str], Sequence[str]]  # ops that are quantized together, and their schemes


def fisher_direction(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """A random direction with the Fisher covariance of the softmax at each position.

    Args:
        logits: (..., vocabulary), float32.
        seed: the same on every device gives the same direction, apart from rounding.

    Returns:
        float32 of the shape of `logits`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty_like(logits)
    for p, out in zip(*(of.flatten(0, -2).split(ROWS_AT_ONCE) for of in (logits, found)), strict=True):
        p = p.softmax(-1)
        root = p.sqrt()
        r = torch.randn(p.shape, generator=generator).to(p.device)
        torch.sub(root * r, p * (root * r).sum(-1, keepdim=True), out=out)
    return found


def probe(
    replay: Replay,
    wanted: Mapping[str, Wanted],
    seeds: Sequence[int],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Values]:
    """One value for each probe, scheme and op or unit, by one backward pass for each probe.

    Args:
        replay: with a batch begun and scales set.
        wanted: {name: its ops, and the schemes to estimate}; ops that do not run on the batch have no values.
        seeds: of the probes.
        on_block: called after each block with the number done and the total.

    Returns:
        For each probe {scheme: {name: nats per position}}. The mean over probes estimates the divergence.

    Raises:
        InputError: the measured op runs inside of a block.
    """
    ready: dict[str, list[str]] = {name: [] for name in replay.order}
    for ops, schemes in wanted.values():
        for op in ops:
            if op in ready:
                ready[op] += [each for each in schemes if each not in ready[op] and replay.sites[op].ready(each)]
    backward = Backward(replay, ready, len(seeds))
    products = backward.run(lambda logits, index: fisher_direction(logits, seeds[index]), on_block)
    positions = replay.measured.shape[:-1].numel()
    found: list[Values] = [{} for _ in seeds]
    for name, (ops, schemes) in wanted.items():
        for scheme in schemes:
            able = [op for op in ops if scheme in ready.get(op, ())]
            if not able:
                continue
            # An op that has no part in the output has no gradient, and a divergence of 0.
            parts = [products[op][ready[op].index(scheme)] for op in able if op in products]
            halves = together(parts).double().pow(2).sum(-1) / (2 * positions) if parts else torch.zeros(len(seeds))
            for index, values in enumerate(found):
                values.setdefault(scheme, {})[name] = float(halves[index])
    return found


def together(products: Sequence[torch.Tensor]) -> torch.Tensor:
    """The products of ops that are quantized together, (directions, samples): to first order their errors add up.

    Where one op does not keep samples apart, the last dimension is 1 and holds the sum over the samples.
    """
    if len({product.shape[-1] for product in products}) > 1:
        products = [product.sum(-1, keepdim=True) for product in products]
    return sum(products[1:], products[0])


def estimates(of_batches: Sequence[Sequence[Values]]) -> list[Estimate]:
    """The values of all batches as one estimate for each scheme and op.

    Args:
        of_batches: for each batch what `probe` returned, with the same number of probes, two or more.

    Returns:
        The mean over batches, then over probes. An op or unit counts on the batches on which it ran.
    """
    by_probe: dict[tuple[str, str], list[list[float]]] = {}
    for batch in of_batches:
        for index, values in enumerate(batch):
            for scheme, ops in values.items():
                for name, value in ops.items():
                    rows = by_probe.setdefault((scheme, name), [[] for _ in batch])
                    rows[index].append(value)
    found = []
    for (scheme, name), rows in by_probe.items():
        means = [statistics.fmean(row) for row in rows]
        error = statistics.stdev(means) / len(means) ** 0.5
        halves = [statistics.fmean(means[start::2]) for start in (0, 1)]
        found.append(Estimate(scheme, name, statistics.fmean(means), error, abs(halves[0] - halves[1])))
    return found
