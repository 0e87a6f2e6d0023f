"""Op sites: a site switches the forward of one planned module between FP32 and its schemes.

In: the FP32 module, and its op of the plan. Out: the same module, calibrated once, switched by its scheme. In the
scheme `inc_int8` its bits are those of INC 2.6's model on this machine's CPU. On the CPU a site calls the kernel that
INC's model calls, so the bits are INC's on every instruction set. On CUDA a site computes the formula of the kernel
(`schemes.inc_int8`). The other schemes are those of `replay.served`.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import has_vnni
from auto_quantize_model.models.experts import StackedLinear
from auto_quantize_model.records import ObservedRange, Op, OpScales
from auto_quantize_model.schemes.inc_int8 import (
    EXACT,
    build_observer,
    cpu_kernel,
    dequantized,
    integer_matmul,
    pack_linear,
    per_channel,
    quantize,
    quantize_weight,
    saturation,
    weight_scale,
)
from auto_quantize_model.schemes.scheme import INC_INT8

if TYPE_CHECKING:  # the library that it imports is needed for its own schemes alone
    from auto_quantize_model.replay.served import Served, ServedExperts, Stored


# An observer of the ranges of inputs, for ops that INC does not plan.
RANGES = {
    "name": "HistogramObserver",
    "dtype": "quint8",
    "qscheme": "per_tensor_affine",
    "reduce_range": False,
    "quant_min": None,
    "quant_max": None,
}
LINEAR_RELU = "LinearReLU"  # the pattern of a Linear whose ReLU INC computes in INT8 too


class Site:
    """One op of the plan; called in place of its module's forward.

    `scheme` is the op's current scheme, None for FP32. `served` are the op's schemes of compressed-tensors. Between
    `observe` and `observed`, in FP32, observers see the op's input and output. `watch`, where set, gets the site, its
    input and its FP32 output, and returns the output that the model goes on with. `executions` counts calls. `options`
    are the keyword arguments of the last call, such as the expert whose matrix is asked for. Scales
    and zero_points of input and output belong to the calibration, the weight's codes to the model.
    """

    def __init__(self, module: Any, op: Op) -> None:
        self.name = op.op_name
        self.module = module
        self.forward = module.forward
        # Without INC the ranges of inputs alone are observed.
        self.activation = op.inc_int8.activation.observer if op.inc_int8 else RANGES
        self.weight = op.inc_int8.weight.observer if op.inc_int8 else {}
        self.pattern = op.inc_int8.pattern if op.inc_int8 else op.op_type
        self.scheme: str | None = None
        self.served: dict[str, Served | ServedExperts | Stored] = {}
        self.observers: list[Any] = []
        self.watch: Callable[[Site, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.executions = 0
        self.options: dict[str, Any] = {}
        self.has_scales = False

    def __call__(self, input: torch.Tensor, **options: Any) -> torch.Tensor:  # named as in torch's modules
        self.executions += 1
        self.options = options
        if self.scheme:
            return self.in_scheme(self.scheme, input)
        output: torch.Tensor = self.forward(input, **options)
        if self.watch:
            return self.watch(self, input, output)
        # Where INC fuses a ReLU, its observer sees the output after the ReLU.
        seen = output.relu() if self.pattern == LINEAR_RELU else output
        for observer, tensor in zip(self.observers, (input, seen), strict=False):
            if not tensor.isfinite().all():
                raise InputError(
                    f"{self.name}: its FP32 input or output on a calibration batch is not finite, so it has no scale."
                    " Keep the op in FP32 with sensitivity.op_name_dict, or check the weights"
                )
            # On the CPU for every device: so the histograms of all machines are the same.
            observer(tensor.detach().float().cpu())
        return output

    def in_scheme(self, scheme: str, x: torch.Tensor) -> torch.Tensor:
        """The op's output for `x` in one of its schemes, whatever its current scheme is."""
        return self.quantized(x) if scheme == INC_INT8 else self.served[scheme](x, **self.options)

    def differentiable(self, scheme: str, x: torch.Tensor) -> torch.Tensor:
        """As `in_scheme`, with a gradient; not for INC's scheme."""
        return self.served[scheme].differentiable(x, **self.options)

    def observe(self) -> None:
        """Start a calibration, with new observers for input and output."""
        self.observers = [build_observer(self.activation), build_observer(self.activation)]
        self.executions = 0

    def observed(self) -> OpScales:
        """End the calibration: scale and zero_point of input and output.

        As in INC, an op that did not run has the scale 1 and the zero_point 0. A router can choose it in another state.
        """
        seen, self.observers = self.observers, []
        if not self.executions:
            return OpScales()
        (in_scale, in_zero), (out_scale, out_zero) = (observer.calculate_qparams() for observer in seen)
        ranges = (what_was_seen(observer) for observer in seen)
        return OpScales(float(in_scale), int(in_zero), float(out_scale), int(out_zero), *ranges)

    def set_scales(self, scales: OpScales | None) -> None:
        """Set scale and zero_point of input and output; None leaves the op in FP32."""
        self.has_scales = scales is not None
        if scales is None:
            return
        device = self.module.weight.device
        self.in_scale, self.in_zero = torch.tensor([scales.in_scale], device=device), scales.in_zero_point
        self.out_scale, self.out_zero = torch.tensor([scales.out_scale], device=device), scales.out_zero_point

    def ready(self, scheme: str) -> bool:
        """Whether the op has all that a scheme of the plan needs of a calibration.

        Raises:
            InputError: the op does not have the scheme.
        """
        if scheme == INC_INT8:
            return self.has_scales
        if scheme not in self.served:
            has = ", ".join((INC_INT8, *self.served))
            raise InputError(f"{self.name} has no scheme {scheme}; its schemes are {has}")
        return self.served[scheme].ready

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """The op's output for `x` in `inc_int8`, dequantized to float32."""
        raise NotImplementedError


class MatmulSite(Site):
    """An op whose INT8 output is a product of codes: `quantize -> kernel -> dequantize`.

    The weight's codes are packed for the kernel on the CPU, and stay unpacked on CUDA.
    """

    def __init__(self, module: Any, op: Op) -> None:
        super().__init__(module, op)
        if op.inc_int8:
            self.w_scale = weight_scale(module.weight, self.weight)
            self.packed = self.pack() if module.weight.device.type == "cpu" else None

    @functools.cached_property
    def codes(self) -> torch.Tensor:
        """The weight's int8 codes, (n, k): one row for each output channel, in the order of the kernel's columns."""
        return self.columns(quantize_weight(self.module.weight.detach(), self.w_scale))

    @functools.cached_property
    def row_sums(self) -> torch.Tensor:
        """The sum of each row of the codes, (n,) int32."""
        return self.codes.sum(dim=1, dtype=torch.int32)

    def pack(self) -> Any:
        """The weight and bias in the form that the CPU's kernel takes."""
        raise NotImplementedError

    def columns(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` (n, ...) as rows (n, k)."""
        raise NotImplementedError

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        return self.by_formula(x) if x.is_cuda else self.by_kernel(x)

    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """The output by the kernel that INC's model calls; CPU only."""
        codes = torch.quantize_per_tensor(x, self.in_scale, torch.tensor(self.in_zero), torch.quint8)
        output: torch.Tensor = self.kernel(codes, self.packed, float(self.out_scale), self.out_zero)
        return output.dequantize()

    def kernel(self, codes: torch.Tensor, packed: Any, scale: float, zero_point: int) -> torch.Tensor:
        """torch's quantized kernel of this op."""
        raise NotImplementedError

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        """The same output from torch operations that run on every device."""
        raise NotImplementedError

    def accumulated(self, codes: torch.Tensor) -> torch.Tensor:
        """The sum over k of (x_q - x_zero) w_q for `codes` (m, k) int8, as this CPU's kernel adds it: (m, n) int32."""
        # x_q - x_zero = code + 128 - x_zero: the constant is added back as a multiple of each row's sum.
        product = integer_matmul(codes, self.codes).add_(self.row_sums, alpha=128 - self.in_zero)
        return product.add_(saturation(codes, self.codes)) if cpu_kernel() == "saturating" else product

    def requantized(self, accumulated: torch.Tensor) -> torch.Tensor:
        """fbgemm's ReQuantizeOutput of `accumulated` (m, n): round((acc + b / (x_scale w_scale)) * m) in float32.

        m = (x_scale w_scale) / y_scale. The conversion to int32 wraps values that are too large to its lowest value.
        """
        both = self.in_scale * self.w_scale
        result = accumulated.float()
        if self.module.bias is not None:
            result.add_(self.module.bias / both)
        result = result.mul_(both / self.out_scale).round_()
        return result.masked_fill_(result >= 2.0**31, -(2.0**31))


class LinearSite(MatmulSite):
    """`quantize -> quantized::linear -> dequantize` of fbgemm, per output channel.

    Where INC fuses the ReLU that follows, the kernel is `quantized::linear_relu`. The model's own ReLU changes nothing
    then.
    """

    def pack(self) -> Any:
        return pack_linear(quantize_weight(self.module.weight.detach(), self.w_scale), self.w_scale, self.module.bias)

    def columns(self, codes: torch.Tensor) -> torch.Tensor:
        return codes

    def kernel(self, codes: torch.Tensor, packed: Any, scale: float, zero_point: int) -> torch.Tensor:
        fused = self.pattern == LINEAR_RELU
        kernel = torch.ops.quantized.linear_relu if fused else torch.ops.quantized.linear
        output: torch.Tensor = kernel(codes, packed, scale, zero_point)
        return output

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        codes = quantize(x, self.in_scale, self.in_zero).reshape(-1, x.shape[-1])
        result = self.requantized(self.accumulated(codes))
        if self.pattern == LINEAR_RELU:
            result.clamp_(min=0)
        return dequantized(result, self.out_scale, self.out_zero).view(*x.shape[:-1], -1)


class ConvSite(MatmulSite):
    """A Conv1d, Conv2d or Conv3d whose stride is its kernel, which is a linear over patches.

    torch has two kernels for each: oneDNN's with AVX-512 VNNI, and fbgemm's without. They round differently. On the
    CPU torch chooses. The formula follows the kernel that this CPU takes.
    """

    def pack(self) -> Any:
        weight = per_channel(quantize_weight(self.module.weight.detach(), self.w_scale), self.w_scale)
        module, sides = self.module, len(self.module.kernel_size)
        prepack = getattr(torch.ops.quantized, f"conv{sides}d_prepack")
        return prepack(weight, module.bias, module.stride, [0] * sides, [1] * sides, 1)

    def columns(self, codes: torch.Tensor) -> torch.Tensor:
        # Channels last: fbgemm's order, which decides which two products are added first.
        return codes.movedim(1, -1).flatten(1)

    def kernel(self, codes: torch.Tensor, packed: Any, scale: float, zero_point: int) -> torch.Tensor:
        kernel = getattr(torch.ops.quantized, f"conv{codes.ndim - 2}d")
        output: torch.Tensor = kernel(codes, packed, scale, zero_point)
        return output

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        """For patches (n, channels, [t, [h,]] w), of the kernel's size or whole multiples of the size."""
        if x.ndim < 5:
            return self.by_formula(x.unsqueeze(2)).squeeze(2)
        kernel = (1, 1, *self.module.kernel_size)[-3:]
        patches, spatial = as_patches(quantize(x, self.in_scale, self.in_zero), kernel)
        accumulated = self.accumulated(patches)
        result = self.by_onednn(accumulated) if has_vnni() else self.requantized(accumulated)
        rounded = dequantized(result, self.out_scale, self.out_zero)
        return rounded.view(x.shape[0], *spatial, -1).permute(0, 4, 1, 2, 3)

    def by_onednn(self, accumulated: torch.Tensor) -> torch.Tensor:
        """oneDNN's codes less their zero_point, (m, n) float32.

        oneDNN receives 1 / x_scale and inverts it again. It multiplies by one scale after the other, and adds y_zero
        before it rounds.
        """
        result = accumulated.float().mul_(self.in_scale.reciprocal().reciprocal()).mul_(self.w_scale)
        if self.module.bias is not None:
            result.add_(self.module.bias)
        return result.mul_(self.out_scale.reciprocal()).add_(self.out_zero).round_().sub_(self.out_zero)


class EmbeddingSite(Site):
    """`quantized::embedding_byte`: uint8 rows with a float scale and zero_point each, weight only.

    Only the rows that are looked up are quantized: w_q = round(w / scale + zero_point), y = fma(w_q, scale,
    -zero_point * scale). float64 computes this fma exactly and rounds once.
    """

    def __init__(self, module: torch.nn.Embedding, op: Op) -> None:
        super().__init__(module, op)
        observer = build_observer(self.weight)
        observer(module.weight.detach().cpu())
        scale, zero = observer.calculate_qparams()
        self.scale, self.zero = scale.to(module.weight.device), zero.to(module.weight.device)

    def observe(self) -> None:
        """Nothing to observe, because the output is float and the input is ids."""
        self.executions = 0

    def observed(self) -> OpScales:
        return OpScales()

    def set_scales(self, scales: OpScales | None) -> None:
        self.has_scales = scales is not None

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.scale[x].unsqueeze(-1), self.zero[x].unsqueeze(-1)
        codes = (self.module.weight[x] * scale.reciprocal()).add_(zero).round_().clamp_(0, 255)
        dequantized: torch.Tensor = (codes.double() * scale.double() + (-zero * scale).double()).float()
        return dequantized


def as_patches(x: torch.Tensor, kernel: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """(n, c, t, h, w) cut into patches of `kernel`: rows (n * patches, kernel * c), and the counts along t, h and w."""
    n, channels = x.shape[:2]
    counts = [size // side for size, side in zip(x.shape[2:], kernel, strict=True)]
    x = x[:, :, : counts[0] * kernel[0], : counts[1] * kernel[1], : counts[2] * kernel[2]]
    x = x.reshape(n, channels, counts[0], kernel[0], counts[1], kernel[1], counts[2], kernel[2])
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(n * math.prod(counts), -1), counts


# Percentiles, as shares of the values, for the ranges that a calibration saw.
PERCENTILES = (0.001, 0.01, 0.5, 0.99, 0.999)


def what_was_seen(observer: Any) -> ObservedRange:
    """The range that an observer saw, with percentiles where it kept a histogram.

    A percentile is the upper edge of its bin of the histogram, so its precision is the width of one bin.
    """
    lowest, highest = float(observer.min_val), float(observer.max_val)
    histogram = getattr(observer, "histogram", None)
    if histogram is None or not float(histogram.sum()):
        return ObservedRange(lowest, highest)
    shares = histogram.double().cumsum(0) / histogram.double().sum()
    width = (highest - lowest) / len(histogram)
    bins = torch.searchsorted(shares, torch.tensor(PERCENTILES, dtype=torch.float64)).tolist()
    return ObservedRange(
        lowest,
        highest,
        {str(100 * share): lowest + (index + 1) * width for share, index in zip(PERCENTILES, bins, strict=True)},
    )


SITES: dict[str, tuple[type[torch.nn.Module], type[Site]]] = {
    "Linear": (torch.nn.Linear, LinearSite),
    "Conv1d": (torch.nn.Conv1d, ConvSite),
    "Conv2d": (torch.nn.Conv2d, ConvSite),
    "Conv3d": (torch.nn.Conv3d, ConvSite),
    "Embedding": (torch.nn.Embedding, EmbeddingSite),
    "Experts": (StackedLinear, Site),
}


def refusal(module: torch.nn.Module, op: Op) -> str:
    """Why a site cannot reproduce an op of the plan exactly; empty if it can."""
    if op.inc_int8 is None:
        served = op.op_type in ("Linear", "Experts") and type(module) is SITES[op.op_type][0]
        return "" if served else "INC does not plan it"
    if op.inc_int8.pattern not in (op.op_type, LINEAR_RELU):
        return f"INC fuses it into a {op.inc_int8.pattern}"
    if op.op_type not in SITES:
        return f"no site for op type {op.op_type}"
    if type(module) is not SITES[op.op_type][0]:
        return f"its module is a {type(module).__name__}"
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        plain = not any(module.padding) and set(module.dilation) == {1} and module.groups == 1
        if module.stride != module.kernel_size or isinstance(module.padding, str) or not plain:
            return f"a {op.op_type} whose stride is not its kernel, or that has padding, dilation or groups"
    for side, allowed in EXACT["Embedding" if isinstance(module, torch.nn.Embedding) else "matmul"].items():
        found = getattr(op.inc_int8, side).observer
        if (found["name"], found["dtype"], found["qscheme"]) not in allowed:
            return f"its {side} is planned as {found['name']} {found['dtype']} {found['qscheme']}"
    return ""
