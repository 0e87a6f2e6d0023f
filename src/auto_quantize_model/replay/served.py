"""An op in a scheme of compressed-tensors, computed as the served model computes it.

In: a Linear, a scheme, and the range of the op's inputs where the scheme needs one. Out: the Linear's output with
weight and inputs fake-quantized. Quantized weights are made once and kept while their bytes fit.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.records import OpScales
from auto_quantize_model.schemes.compressed import (
    QuantizationParameters,
    global_scale,
    input_parameters,
    quantized_input,
    quantized_weight,
    weight_parameters,
)

WEIGHT_BYTES = 2 << 30  # for quantized weights; a weight that does not fit is made again


class Kept:
    """Tensors that are made when they are asked for. The ones that were asked for least recently are dropped first.

    Args:
        limit: the most bytes that are kept.
    """

    def __init__(self, limit: int = WEIGHT_BYTES) -> None:
        self.limit = limit
        self.tensors: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self.bytes = 0

    def get(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor under `key`."""
        if key in self.tensors:
            self.tensors.move_to_end(key)
            return self.tensors[key]
        made = make()
        self.tensors[key] = made
        self.bytes += made.nbytes
        while self.bytes > self.limit:
            self.bytes -= self.tensors.popitem(last=False)[1].nbytes
        return made


class Served:
    """One op in one scheme.

    Args:
        module: the op's Linear, which stays as it is.
        scheme: as `schemes.compressed.scheme_of` returns it.
        unit: the weights that a serving engine holds as one matrix with this op's; they share a global scale.
        kept: keeps the quantized weight.
    """

    def __init__(
        self, module: torch.nn.Linear, scheme: QuantizationScheme, unit: Sequence[torch.Tensor], kept: Kept
    ) -> None:
        self.module, self.scheme, self.unit, self.kept = module, scheme, unit, kept
        self.given: QuantizationParameters | None = None

    @property
    def needs_range(self) -> bool:
        """Whether the scheme quantizes inputs by the range that a calibration saw."""
        inputs = self.scheme.input_activations
        return inputs is not None and inputs.dynamic is not True

    def set_range(self, scales: OpScales | None) -> None:
        """Use the range of the op's inputs that a calibration saw; None where the op did not run."""
        if self.needs_range:
            self.given = None
            if scales and scales.input:
                ends, dtype = (scales.input.minimum, scales.input.maximum), self.module.weight.dtype
                self.given = input_parameters(*ends, self.scheme.input_activations, dtype)

    @property
    def ready(self) -> bool:
        """Whether all that the scheme needs of a calibration is there."""
        return self.given is not None or not self.needs_range

    def weight(self) -> torch.Tensor:
        """The weight as the served model sees it, (rows, columns)."""
        args, weight = self.scheme.weights, self.module.weight
        shared = global_scale(self.unit) if args.strategy == "tensor_group" else None
        return quantized_weight(weight, args, weight_parameters(weight, args, shared))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The op's output for inputs (..., columns), of their dtype."""
        if self.scheme.input_activations:
            x = quantized_input(x, self.scheme.input_activations, self.given)
        return torch.nn.functional.linear(x, self.kept.get(self, self.weight), self.module.bias)
