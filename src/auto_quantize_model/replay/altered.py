"""An op in a scheme with one thing altered: a side left out, a smoothed input, or other ranges.

In: the Linears of a unit, and the alteration. Out: the output of each Linear, with the arithmetic of
`schemes.compressed`. A replay takes an altered op as one more scheme of the op.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from auto_quantize_model.models.mapped import in_fp32
from auto_quantize_model.records import OpScales
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.replay.served import Kept, LastInput
from auto_quantize_model.schemes.compressed import (
    global_scale,
    input_parameters,
    quantized_input,
    quantized_weight,
    weight_parameters,
)
from auto_quantize_model.schemes.cures import narrowed


@dataclass(frozen=True)
class Alteration:
    """How the ops of a unit are quantized.

    Attributes:
        weights, inputs: of the scheme; None leaves this side unquantized.
        scale: (columns,), by which the inputs are divided and the weight's columns are multiplied; None for no
            smoothing.
        narrow: whether the weight's ranges are those of `schemes.cures.narrowed`.
        ends: the range of the inputs before any smoothing scale, for inputs that are not wholly dynamic.
        channels: the minimum and the maximum of each input channel, (columns,) each; with a scale, they give the range
            of the smoothed inputs.
    """

    weights: QuantizationArgs | None
    inputs: QuantizationArgs | None
    scale: torch.Tensor | None = None
    narrow: bool = False
    ends: tuple[float, float] | None = None
    channels: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def key(self) -> dict[str, Any]:
        """Everything that the values depend on, apart from the unit and its inputs, as JSON."""
        sides = [side and side.model_dump(mode="json") for side in (self.weights, self.inputs)]
        scale = None if self.scale is None else self.scale.tolist()
        return {"sides": sides, "scale": scale, "narrow": self.narrow, "ends": self.range}

    @property
    def range(self) -> tuple[float, float] | None:
        """The range of the inputs that are quantized; None where each input has its own."""
        if self.inputs is None or self.inputs.dynamic is True:
            return None
        if self.scale is None or self.channels is None:
            return self.ends
        low, high = self.channels
        return float((low / self.scale).min()), float((high / self.scale).max())


class Altered:
    """One op of an altered unit.

    Args:
        module: the op's Linear, which stays as it is.
        alteration: of its unit.
        unit: the weights of all ops of the unit; they share a global scale.
        kept: keeps the quantized weight.
        last: keeps the quantized input, for all ops of the unit.
    """

    ready = True

    def __init__(
        self,
        module: torch.nn.Linear,
        alteration: Alteration,
        unit: Sequence[torch.Tensor],
        kept: Kept,
        last: LastInput,
    ) -> None:
        self.module, self.alteration, self.unit, self.kept, self.last = module, alteration, unit, kept, last
        ends, args, weight = alteration.range, alteration.inputs, module.weight
        self.given = input_parameters(*ends, args, weight.dtype).to(weight.device) if ends and args else None

    def set_range(self, scales: OpScales | None) -> None:
        """Do nothing: the alteration has its own range."""

    def weight(self) -> torch.Tensor:
        """The weight as the altered op sees it, (rows, columns)."""
        args, weight = self.alteration.weights, smoothed(self.module.weight, self.alteration)
        if args is None:
            return weight
        ranges = narrowed(weight, args) if self.alteration.narrow else weight
        shared = None
        if args.strategy == "tensor_group":
            unit = [smoothed(other, self.alteration) for other in self.unit]
            shared = global_scale([narrowed(other, args) for other in unit] if self.alteration.narrow else unit)
        return quantized_weight(weight, args, weight_parameters(ranges, args, shared))

    def served_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as the altered op sees it, of the same shape and dtype."""
        args, scale = self.alteration.inputs, self.alteration.scale
        x = x if scale is None else x / scale
        return quantized_input(x, args, self.given) if args else x

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The op's output for inputs (..., columns), of their dtype."""
        served = self.last.get(x, None, lambda: self.served_input(x))
        return torch.nn.functional.linear(served, self.kept.get(self, self.weight), self.module.bias)


def smoothed(weight: torch.Tensor, alteration: Alteration) -> torch.Tensor:
    """A weight with its columns multiplied by the smoothing scale."""
    weight = in_fp32(weight.detach())
    return weight if alteration.scale is None else weight * alteration.scale


def add_altered(replay: Replay, ops: Sequence[str], alterations: Mapping[str, Alteration], kept: Kept) -> None:
    """Give the ops of a unit altered schemes, by names that no scheme of the replay has.

    Args:
        ops: of one unit.
        kept: keeps the quantized weights.
    """
    modules = [replay.sites[name].module for name in ops]
    for scheme, alteration in alterations.items():
        last, unit = LastInput(), [module.weight for module in modules]
        for name, module in zip(ops, modules, strict=True):
            altered: Any = Altered(module, alteration, unit, kept, last)  # as `Served`, to the site
            replay.sites[name].served[scheme] = altered
