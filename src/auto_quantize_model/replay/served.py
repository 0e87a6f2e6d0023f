"""An op in a scheme of compressed-tensors, computed as the served model computes it.

In: a Linear, and a scheme with the range of the op's inputs where the scheme needs one, or a checkpoint. Out: the
Linear's output with weight and inputs fake-quantized. Quantized weights are made once and kept while their bytes fit.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch.utils._pytree import tree_map_only

from auto_quantize_model.machine import LIMITS
from auto_quantize_model.models.checkpoint import Checkpoint
from auto_quantize_model.models.experts import StackedLinear
from auto_quantize_model.models.mapped import in_fp32
from auto_quantize_model.records import OpScales
from auto_quantize_model.schemes.compressed import (
    QuantizationParameters,
    global_scale,
    input_parameters,
    quantized_input,
    quantized_weight,
    weight_parameters,
)


class Rounded(torch.autograd.Function):
    """A quantized input, with the gradient of the unquantized one.

    This is the straight-through estimator of Bengio, Léonard and Courville, "Estimating or Propagating Gradients
    Through Stochastic Neurons for Conditional Computation", 2013.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, served: torch.Tensor) -> torch.Tensor:
        return served.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Kept:
    """Tensors that are made when they are asked for. The ones that were asked for least recently are dropped first.

    Args:
        limit: the most bytes that are kept; None takes the limit of this process.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = LIMITS.weights if limit is None else limit
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


class LastInput:
    """The last input that a scheme quantized. Ops such as q, k and v have the same input one after another."""

    def __init__(self) -> None:
        self.x: Callable[[], torch.Tensor | None] = lambda: None
        self.of: Any = None
        self.served = torch.empty(0)

    def get(self, x: torch.Tensor, ends: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The quantized input, made only if `x`, its values or `ends` are others than the last time.

        Args:
            ends: of the input's range in the calibration; None for a dynamic scheme.
        """
        if x.is_inference():  # such a tensor does not count the changes of its values
            return make()
        of = (x._version, ends)
        if self.x() is not x or self.of != of:
            # No reference to the tensor itself, which would hold the graph of a whole block in a backward pass.
            self.x, self.of, self.served = weakref.ref(x), of, make()
        return self.served


class Served:
    """One op in one scheme.

    Args:
        module: the op's Linear, which stays as it is.
        scheme: as `schemes.compressed.scheme_of` returns it.
        unit: the weights that a serving engine holds as one matrix with this op's; they share a global scale.
        kept: keeps the quantized weight.
        last: keeps the quantized input, for all ops in the scheme.
    """

    def __init__(
        self,
        module: torch.nn.Linear,
        scheme: QuantizationScheme,
        unit: Sequence[torch.Tensor],
        kept: Kept,
        last: LastInput,
    ) -> None:
        self.module, self.scheme, self.unit, self.kept, self.last = module, scheme, unit, kept, last
        self.given: QuantizationParameters | None = None
        self.ends: tuple[float, float] | None = None

    @property
    def needs_range(self) -> bool:
        """Whether the scheme quantizes inputs by the range that a calibration saw."""
        inputs = self.scheme.input_activations
        return inputs is not None and inputs.dynamic is not True

    def set_range(self, scales: OpScales | None) -> None:
        """Use the range of the op's inputs that a calibration saw; None where the op did not run."""
        if self.needs_range:
            self.given = self.ends = None
            if scales and scales.input:
                self.ends = scales.input.minimum, scales.input.maximum
                args, weight = self.scheme.input_activations, self.module.weight
                self.given = input_parameters(*self.ends, args, weight.dtype).to(weight.device)

    @property
    def ready(self) -> bool:
        """Whether all that the scheme needs of a calibration is there."""
        return self.given is not None or not self.needs_range

    def weight(self) -> torch.Tensor:
        """The weight as the served model sees it, (rows, columns)."""
        args, weight = self.scheme.weights, in_fp32(self.module.weight)
        shared = global_scale(self.unit) if args.strategy == "tensor_group" else None
        return quantized_weight(weight, args, weight_parameters(weight, args, shared))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The op's output for inputs (..., columns), of their dtype."""
        return torch.nn.functional.linear(self.served_input(x), self.kept.get(self, self.weight), self.module.bias)

    def served_input(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs as the served model sees them, of the same shape and dtype."""
        args = self.scheme.input_activations
        return self.last.get(x, self.ends, lambda: quantized_input(x, args, self.given)) if args else x

    def differentiable(self, x: torch.Tensor) -> torch.Tensor:
        """The bits of a call, with a gradient: through the quantized weight, and past the rounding of the inputs."""
        with torch.no_grad():
            served, weight = self.served_input(x), self.kept.get(self, self.weight)
        inputs: torch.Tensor = Rounded.apply(x, served)  # type: ignore[no-untyped-call]
        return torch.nn.functional.linear(inputs, weight, self.module.bias)


class ServedExperts:
    """The same matrix of all experts of a block in one scheme; each expert has scales of its own for its weight.

    Args:
        module: the op's module.
        scheme, kept, last: as `Served` takes them.
    """

    def __init__(self, module: StackedLinear, scheme: QuantizationScheme, kept: Kept, last: LastInput) -> None:
        self.parts = [Served(part, scheme, [part.weight], kept, last) for part in module.linears()]

    @property
    def ready(self) -> bool:
        """Whether all that the scheme needs of a calibration is there."""
        return self.parts[0].ready

    def set_range(self, scales: OpScales | None) -> None:
        """Use the range of the inputs of all experts that a calibration saw."""
        for part in self.parts:
            part.set_range(scales)

    def __call__(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """The output of one expert's matrix for its rows."""
        return self.parts[expert](x)

    def differentiable(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """As `Served.differentiable`, for one expert's matrix."""
        return self.parts[expert].differentiable(x)


class Norm:
    """A norm of the model with the parameters of a checkpoint, on the input that the model's norm had last.

    Args:
        module: the norm, which stays as it is.
        parameters: of the checkpoint, by their names in the module.
    """

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
        device = next(module.parameters()).device
        self.module, self.parameters = module, {name: value.to(device) for name, value in parameters.items()}
        self.inputs: tuple[Any, ...] = ()
        self.hook = module.register_forward_pre_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        # Without history, which would hold the graph of a whole block in a backward pass.
        self.inputs = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)

    def output(self) -> torch.Tensor:
        """The output that the checkpoint's norm would have, of the input's shape."""
        found: torch.Tensor = torch.func.functional_call(self.module, dict(self.parameters), self.inputs)
        return found


class Stored:
    """One op as a checkpoint stores the op.

    Args:
        module: the op's Linear, which stays as it is.
        checkpoint: holds the op.
        name: of the op.
        kept: keeps the decompressed weight.
        norm: gives the op's input where the checkpoint changes the norm before the op.
    """

    ready = True  # the checkpoint holds all that the scheme needs

    def __init__(
        self, module: torch.nn.Linear, checkpoint: Checkpoint, name: str, kept: Kept, norm: Norm | None
    ) -> None:
        self.checkpoint, self.name, self.kept, self.norm = checkpoint, name, kept, norm
        self.device = module.weight.device
        self.args = checkpoint.schemes[name].input_activations
        bias, inputs = checkpoint.bias(name), checkpoint.inputs(name)
        self.bias = None if bias is None else bias.to(self.device)
        self.given = inputs and inputs.to(self.device)

    def differentiable(self, x: torch.Tensor) -> torch.Tensor:
        """Refused: no choice with the schemes of a checkpoint is refined."""
        raise NotImplementedError

    def set_range(self, scales: OpScales | None) -> None:
        """Do nothing: the checkpoint has the range of its own calibration."""

    def weight(self) -> torch.Tensor:
        """The weight as the served model sees it, (rows, columns), float32."""
        return self.checkpoint.weight(self.name).to(self.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The op's output for inputs (..., columns), of their dtype."""
        if self.norm:
            x = self.norm.output()
        if self.args:
            x = quantized_input(x, self.args, self.given)
        return torch.nn.functional.linear(x, self.kept.get(self, self.weight), self.bias)
