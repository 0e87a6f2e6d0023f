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
Values = dict[str, dict[str, float]]  # of one probe: {scheme: {op_name: nats}}


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
    schemes: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Values]:
    """One value for each probe, scheme and op, by one backward pass for each probe.

    Args:
        replay: with a batch begun and scales set.
        schemes: {op_name: schemes to estimate}; an op that does not run on the batch has no values.
        seeds: of the probes.
        on_block: called after each block with the number done and the total.

    Returns:
        For each probe {scheme: {op_name: nats per position}}. The mean over probes estimates the divergence.

    Raises:
        InputError: the measured op runs inside of a block.
    """
    ready = {
        name: [scheme for scheme in schemes.get(name, ()) if replay.sites[name].ready(scheme)] for name in replay.order
    }
    backward = Backward(replay, ready, len(seeds))
    products = backward.run(lambda logits, index: fisher_direction(logits, seeds[index]), on_block)
    positions = replay.measured.shape[:-1].numel()
    found: list[Values] = [{} for _ in seeds]
    for name, able in ready.items():
        # An op that has no part in the output has no gradient, and a divergence of 0.
        halves = products[name].double().pow(2).sum(-1) / (2 * positions) if name in products else None
        for row, scheme in enumerate(able):
            for index, values in enumerate(found):
                values.setdefault(scheme, {})[name] = 0.0 if halves is None else float(halves[row, index])
    return found


def estimates(of_batches: Sequence[Sequence[Values]]) -> list[Estimate]:
    """The values of all batches as one estimate for each scheme and op.

    Args:
        of_batches: for each batch what `probe` returned, with the same number of probes, two or more.

    Returns:
        The mean over batches, then over probes. An op counts on the batches on which it ran.
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
