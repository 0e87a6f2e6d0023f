"""Op sites: a module of the plan whose forward can be switched between FP32 and the INT8 that INC would make of it.

In: the FP32 module and its entry of the plan. Out: the same module, calibrated once, switched by a flag, bit-identical
to torch's quantized kernels (fbgemm) under INC 2.6. The formulas are torch operations alone, the same lines on CPU and
CUDA; the order of their float32 roundings is that of the kernels, and a change of it changes results.
"""

import math
from typing import Any

import torch
from torch.ao.quantization import observer as observers

from auto_quantize_model.files import InputError

ROWS_AT_ONCE = 16384  # of a weight while it is quantized, so that the FP32 temporaries of an lm_head stay small


def build_observer(entry: dict[str, Any]) -> Any:
    """The observer that a plan describes: {name, dtype, qscheme, reduce_range, quant_min, quant_max}."""
    arguments = {key: value for key, value in entry.items() if key != "name"}
    for key in ("dtype", "qscheme"):
        arguments[key] = getattr(torch, arguments[key])
    return getattr(observers, entry["name"])(**arguments)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int, wide: torch.dtype | None = None) -> torch.Tensor:
    """`x` (any shape, float32) as int8 codes `quint8 - 128`, rounded as `torch.quantize_per_tensor` rounds.

    The kernel rounds once after a fused multiply-add, so that x / scale + zero_point near a tie goes the way of its
    float32 sum. On CPU `addcmul` is that fused operation; on CUDA it may round the product first, so it is done in
    float64 there (`wide`), where the product of two float32 numbers is exact.
    """
    wide = wide or (torch.float64 if x.is_cuda else torch.float32)
    shift = torch.full((), zero_point, dtype=wide, device=x.device)
    codes = torch.addcmul(shift, x.to(wide), scale.reciprocal().to(wide)).float()
    return codes.round_().clamp_(0, 255).sub_(128).to(torch.int8)


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` (n, ...), float32, as int8 codes with a scale (n,) for each output channel and zero_point 0."""
    inverse = scale.reciprocal().view(-1, *[1] * (weight.dim() - 1))
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        codes[rows] = (weight[rows] * inverse[rows]).round_().clamp_(-128, 127)
    return codes


def integer_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` (m, k) int8 times `weight` (n, k) int8 transposed, accumulated exactly: (m, n) int32.

    Zeros fill k and n up to multiples of 8 and m above 16, which CUDA's kernel asks for; on CPU torch 2.13 gives wrong
    products at k = 1 without them.
    """
    (m, k), n = x.shape, weight.shape[0]
    x = with_zeros(x, max(0, 17 - m), -k % 8)
    weight = with_zeros(weight, -n % 8, -k % 8)
    return torch._int_mm(x, weight.t())[:m, :n]


def with_zeros(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`x` with that many rows and columns of zeros added, or `x` itself where there are none to add."""
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def check_integer_matmul(device: torch.device) -> None:
    """Refuse a machine whose int8 product saturates, as instruction sets older than VNNI can.

    Raises:
        InputError: the product of extreme codes is not exact.
    """
    x, weight = torch.full((32, 64), -128, dtype=torch.int8), torch.full((32, 64), -128, dtype=torch.int8)
    weight[1::2] = 127
    if not torch.equal(integer_matmul(x.to(device), weight.to(device)).cpu().long(), x.long() @ weight.long().t()):
        raise InputError(f"torch's int8 product is not exact on this {device.type}; use sensitivity.engine: inc")


class Site:
    """One op of the plan; called in place of its module's forward.

    `int8` is the flag. Between `observe` and `calibrated`, in FP32, observers see the op's input and output.
    `executions` counts calls since `observe`. Scales and zero_points of input and output belong to the calibration, the
    weight's codes to the model.
    """

    def __init__(self, name: str, module: Any, entry: dict[str, Any]) -> None:
        self.name = name
        self.module = module
        self.forward = module.forward
        self.activation = entry["activation"]["observer"]
        self.weight = entry["weight"]["observer"]
        self.int8 = False
        self.observing: list[Any] = []
        self.executions = 0

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # named as in torch's modules
        self.executions += 1
        if self.int8:
            return self.quantized(input)
        output = self.forward(input)
        for observer, tensor in zip(self.observing, (input, output), strict=False):
            if not tensor.isfinite().all():
                raise InputError(
                    f"{self.name}: its FP32 input or output on a calibration batch is not finite, so it has no scale;"
                    " keep it in FP32 with sensitivity.op_name_dict, or check the weights"
                )
            # On the CPU whatever the device: the histogram of one machine is then that of every other.
            observer(tensor.detach().float().cpu())
        return output

    def observe(self) -> None:
        """Start a calibration: fresh observers for input and output."""
        self.observing = [build_observer(self.activation), build_observer(self.activation)]
        self.executions = 0

    def calibrated(self) -> None:
        """End it: scale and zero_point of input and output from what the observers saw, if the op ran at all."""
        seen, self.observing = self.observing, []
        if not self.executions:
            return
        self.set_scales(*(observer.calculate_qparams() for observer in seen))

    def set_scales(self, inputs: tuple[torch.Tensor, Any], outputs: tuple[torch.Tensor, Any]) -> None:
        """Set scale (float32, one value) and zero_point of input and output."""
        device = self.module.weight.device
        self.in_scale, self.in_zero = inputs[0].to(device), int(inputs[1])
        self.out_scale, self.out_zero = outputs[0].to(device), int(outputs[1])

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """The op's INT8 output for `x`, dequantized to float32."""
        raise NotImplementedError


class LinearSite(Site):
    """`quantize -> quantized::linear -> dequantize` of fbgemm, per output channel.

    acc = sum over k of (x_q - x_zero) w_q, exact in int32; y_q = round((acc + b / (x_scale w_scale)) * m) + y_zero with
    m = (x_scale w_scale) / y_scale, all in float32 and in this order (fbgemm's ReQuantizeOutput).
    """

    def __init__(self, name: str, module: torch.nn.Linear, entry: dict[str, Any]) -> None:
        super().__init__(name, module, entry)
        self.w_scale = weight_scale(module.weight, self.weight)
        self.codes = quantize_weight(module.weight.detach(), self.w_scale)
        self.row_sums = self.codes.sum(dim=1, dtype=torch.int32)

    def set_scales(self, inputs: tuple[torch.Tensor, Any], outputs: tuple[torch.Tensor, Any]) -> None:
        super().set_scales(inputs, outputs)
        self.wraps = self.can_wrap()

    def can_wrap(self) -> bool:
        """Whether round(...) can leave int32, where fbgemm's conversion wraps to its lowest value.

        It takes an output scale far too fine for what the op can give, which a calibration on real input never makes;
        so the largest value that there can be decides, and the check costs no pass over the output.
        """
        both = self.in_scale * self.w_scale
        largest = self.codes.shape[1] * 255.0 * 128.0
        bias = 0.0 if self.module.bias is None else self.module.bias.abs() / both
        return bool(((largest + bias) * (both / self.out_scale)).max() >= 2.0**31)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        codes = quantize(x, self.in_scale, self.in_zero).reshape(-1, x.shape[-1])
        # x_q - x_zero = code + 128 - x_zero: the constant comes back as a multiple of each row's sum.
        accumulated = integer_matmul(codes, self.codes).add_(self.row_sums, alpha=128 - self.in_zero)
        both = self.in_scale * self.w_scale
        result = accumulated.float()
        if self.module.bias is not None:
            result.add_(self.module.bias / both)
        result = result.mul_(both / self.out_scale).round_()
        if self.wraps:
            result.masked_fill_(result >= 2.0**31, -(2.0**31))
        return dequantized(result, self.out_scale, self.out_zero).view(*x.shape[:-1], -1)


class Conv3dSite(Site):
    """A Conv3d whose stride is its kernel: on CUDA a linear over patches, on CPU torch's own kernel.

    torch has two kernels for it, oneDNN's and fbgemm's, and picks one by the CPU's instruction set; they differ in one
    output of a million. Calling torch's own leaves the choice to it; on CUDA the formula is oneDNN's.
    """

    def __init__(self, name: str, module: torch.nn.Conv3d, entry: dict[str, Any]) -> None:
        super().__init__(name, module, entry)
        self.w_scale = weight_scale(module.weight, self.weight)
        self.codes = quantize_weight(module.weight.detach(), self.w_scale)
        self.row_sums = self.codes.flatten(1).sum(dim=1, dtype=torch.int32)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        return self.by_formula(x) if x.is_cuda else self.by_kernel(x)

    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """Torch's quantized::conv3d; CPU only."""
        zeros = torch.zeros_like(self.w_scale, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(self.codes, self.w_scale.double(), zeros, 0)
        module = self.module
        packed = torch.ops.quantized.conv3d_prepack(weight, module.bias, module.stride, [0, 0, 0], [1, 1, 1], 1)
        codes = torch.quantize_per_tensor(x, self.in_scale, torch.tensor(self.in_zero), torch.quint8)
        return torch.ops.quantized.conv3d(codes, packed, float(self.out_scale), self.out_zero).dequantize()

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        """The same over patches (n, channels, t, h, w) of exactly the kernel's size or whole multiples of it."""
        patches, spatial = as_patches(quantize(x, self.in_scale, self.in_zero), self.module.kernel_size)
        accumulated = integer_matmul(patches, self.codes.flatten(1)).add_(self.row_sums, alpha=128 - self.in_zero)
        # oneDNN is handed 1 / x_scale and inverts it again, takes scale by scale, and adds y_zero before it rounds.
        result = accumulated.float().mul_(self.in_scale.reciprocal().reciprocal()).mul_(self.w_scale)
        if self.module.bias is not None:
            result.add_(self.module.bias)
        result = result.mul_(self.out_scale.reciprocal()).add_(self.out_zero).round_().sub_(self.out_zero)
        rounded = dequantized(result, self.out_scale, self.out_zero)
        return rounded.view(x.shape[0], *spatial, -1).permute(0, 4, 1, 2, 3)


class EmbeddingSite(Site):
    """`quantized::embedding_byte`: uint8 rows with a float scale and zero_point each, weight only.

    Only the rows that are looked up are ever quantized: w_q = round(w / scale + zero_point), y = fma(w_q, scale,
    -zero_point * scale), which float64 computes exactly and rounds once.
    """

    def __init__(self, name: str, module: torch.nn.Embedding, entry: dict[str, Any]) -> None:
        super().__init__(name, module, entry)
        observer = build_observer(self.weight)
        observer(module.weight.detach().cpu())
        scale, zero = observer.calculate_qparams()
        self.scale, self.zero = scale.to(module.weight.device), zero.to(module.weight.device)

    def observe(self) -> None:
        """Nothing to observe: the output is float and the input are ids."""
        self.executions = 0

    def calibrated(self) -> None:
        """Nothing was observed."""

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.scale[x].unsqueeze(-1), self.zero[x].unsqueeze(-1)
        codes = (self.module.weight[x] * scale.reciprocal()).add_(zero).round_().clamp_(0, 255)
        return (codes.double() * scale.double() + (-zero * scale).double()).float()


def weight_scale(weight: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """The scale (n,), float32, of each output channel by the plan's weight observer."""
    observer = build_observer(entry)
    observer(weight.detach().cpu())
    return observer.calculate_qparams()[0].to(weight.device)


def dequantized(result: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """Codes less their zero_point (float32, rounded, not yet saturated) as saturated float32 values."""
    # The sum with 0 turns -0.0 into 0.0, which an integer code cannot tell apart either.
    return result.clamp_(-zero_point, 255 - zero_point).mul_(scale).add_(0.0)


def as_patches(x: torch.Tensor, kernel: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """(n, c, t, h, w) cut into patches of `kernel`: rows (n * patches, c * kernel), and how many along t, h and w."""
    n, channels = x.shape[:2]
    counts = [size // side for size, side in zip(x.shape[2:], kernel, strict=True)]
    x = x[:, :, : counts[0] * kernel[0], : counts[1] * kernel[1], : counts[2] * kernel[2]]
    x = x.reshape(n, channels, counts[0], kernel[0], counts[1], kernel[1], counts[2], kernel[2])
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n * math.prod(counts), -1), counts


SITES: dict[str, tuple[type[torch.nn.Module], type[Site]]] = {
    "Linear": (torch.nn.Linear, LinearSite),
    "Conv3d": (torch.nn.Conv3d, Conv3dSite),
    "Embedding": (torch.nn.Embedding, EmbeddingSite),
}
# Which observers the formulas hold for: {side: (observer, dtype, qscheme)}.
PER_CHANNEL = "PerChannelMinMaxObserver"
EXACT: dict[str, dict[str, list[tuple[str, str, str]]]] = {
    "matmul": {
        "activation": [
            (observer, "quint8", qscheme)
            for observer in ("HistogramObserver", "MinMaxObserver")
            for qscheme in ("per_tensor_affine", "per_tensor_symmetric")
        ],
        "weight": [(PER_CHANNEL, "qint8", "per_channel_symmetric")],
    },
    "Embedding": {"weight": [(PER_CHANNEL, "quint8", "per_channel_affine_float_qparams")]},
}


def why_not(module: torch.nn.Module, op: dict[str, Any]) -> str:
    """Why a site cannot reproduce an op of the plan exactly; empty if it can."""
    if op["pattern"] != op["op_type"]:
        return f"INC fuses it into a {op['pattern']}"
    if op["op_type"] not in SITES:
        return f"no site for op type {op['op_type']}"
    if type(module) is not SITES[op["op_type"]][0]:
        return f"its module is a {type(module).__name__}"
    if isinstance(module, torch.nn.Conv3d):
        plain = module.padding == (0, 0, 0) and module.dilation == (1, 1, 1) and module.groups == 1
        if module.stride != module.kernel_size or not plain:
            return "a Conv3d whose stride is not its kernel, or that has padding, dilation or groups"
    for side, allowed in EXACT["Embedding" if isinstance(module, torch.nn.Embedding) else "matmul"].items():
        found = op[side]["observer"]
        if (found["name"], found["dtype"], found["qscheme"]) not in allowed:
            return f"its {side} is planned as {found['name']} {found['dtype']} {found['qscheme']}"
    return ""
