"""Cures of a scheme that cost no bytes: smoothing, and ranges of a weight that leave out its largest values.

In: a weight, and the ranges of its inputs. Out: the tensors with which `schemes.compressed` then quantizes. Both cures
compute as llm-compressor 0.14 does, so that its recipe gives what was measured.
"""

from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import maybe_pad_tensor_for_block_quant

from auto_quantize_model.schemes.compressed import IN_GROUPS, quantized_weight, weight_parameters

# The search of llm-compressor's observer `memoryless_mse`, with these values as its `observer_kwargs`. Its own values
# narrow a range by a fifth at most and stop early, so that one value far out keeps its whole range.
SEARCH: dict[str, float] = {"maxshrink": 0.8, "grid": 25, "patience": 20, "norm": 2.0}
LEAST_SCALE = 1e-5  # llm-compressor's MINIMUM_SMOOTHING_SCALE


def smoothing_scale(
    low: torch.Tensor, high: torch.Tensor, weights: Sequence[torch.Tensor], strength: float
) -> torch.Tensor:
    """The scale s of SmoothQuant: inputs are divided by s, and the columns of the weights are multiplied by s.

    Xiao et al., "SmoothQuant", 2023, equation 4. As in llm-compressor's `SmoothQuantModifier`, the range of a channel
    stands for its inputs, and twice the largest weight of a column for its weights.

    Args:
        low, high: minimum and maximum of each input channel, (columns,).
        weights: of all ops that have this input, (rows, columns) each.
        strength: 0 to 1; a higher one moves more of the inputs' range into the weights.
    """
    inputs = high - low
    columns = 2.0 * torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0)
    scale = torch.where(columns > 0, inputs.pow(strength) / columns.pow(1 - strength), inputs)
    return scale.clamp(min=LEAST_SCALE)


def narrowed(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The weight times a factor for each range that shares a scale. Quantize the weight itself by the ranges of this.

    The factor is the one of 1, 0.96, ... 0.24 with the least sum of squared errors. It narrows the range, so that the
    largest values are clipped and all others have a finer step.

    Args:
        weight: (rows, columns).
    """
    weight = weight.detach()
    if args.strategy == "tensor_group":  # the scales are rounded and shared later, as in llm-compressor's search
        args = args.model_copy(update={"strategy": "group", "scale_dtype": None})
    best = torch.full_like(weight, torch.inf)
    found = weight.clone()
    for step in range(int(SEARCH["maxshrink"] * SEARCH["grid"])):
        shrunk = weight * (1 - step / SEARCH["grid"])
        served = quantized_weight(weight, args, weight_parameters(shrunk, args))
        error = summed((served - weight).abs().pow(SEARCH["norm"]), args)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, shrunk, found)
    return found


def summed(values: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """At each value of a weight (rows, columns), the sum over all values that share its scale."""
    if args.strategy == "tensor":
        return values.sum().expand_as(values)
    if args.strategy == "channel":
        return values.sum(-1, keepdim=True).expand_as(values)
    if args.strategy in IN_GROUPS:
        groups = values.unflatten(-1, (-1, args.group_size))
        of_groups: torch.Tensor = groups.sum(-1, keepdim=True).expand_as(groups).flatten(-2)
        return of_groups
    height, width = args.block_structure
    blocks = maybe_pad_tensor_for_block_quant(values, args.block_structure)
    blocks = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    whole: torch.Tensor = blocks.sum((1, 3), keepdim=True).expand_as(blocks).flatten(2).flatten(0, 1)
    return whole[: values.shape[0], : values.shape[1]]
