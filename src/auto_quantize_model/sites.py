"""Op sites: a module of the plan whose forward can be switched between FP32 and the INT8 that INC would make of it.

In: the FP32 module and its entry of the plan. Out: the same module, calibrated once, switched by a flag, bit-identical
to INC 2.6's model on this machine's CPU. On the CPU a site calls the kernel that INC's model calls, so the bits are
INC's on every instruction set. On CUDA a site computes the kernel's formula; the order of the float32 roundings is the
kernel's, and a change of the order changes results.
"""

import functools
import math
from typing import Any

import torch
from torch.ao.quantization import observer as observers

from auto_quantize_model.device import has_vnni
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


def saturation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The difference that saturation makes to the product of `x` (m, k) and `weight` (n, k), both int8: (m, n) int32.

    A CPU without VNNI adds the products of columns 2i and 2i + 1 in int16 (vpmaddubsw) and keeps what exceeds int16 at
    its limit. The CPU multiplies unsigned codes, `x` + 128. Only pairs that can exceed int16 for some row of the weight
    are computed, which are few: codes and weights both have to be large.
    """
    odd = x.shape[1] % 2
    codes = with_zeros(x.float() + 128, 0, odd).unflatten(1, (-1, 2))
    pairs = with_zeros(weight.float(), 0, odd).unflatten(1, (-1, 2))
    low, high = -(2.0**15), 2.0**15 - 1
    highest = (codes * pairs.amax(0).clamp_(min=0)).sum(-1)
    lowest = (codes * pairs.amin(0).clamp_(max=0)).sum(-1)
    exceeds = (highest > high) | (lowest < low)
    lost = torch.zeros(len(codes), len(pairs), device=x.device)
    for column in exceeds.any(0).nonzero().flatten().tolist():
        rows = exceeds[:, column]
        products = codes[rows, column] @ pairs[:, column].t()
        lost[rows] += products.clamp(low, high) - products
    return lost.int()


@functools.cache
def cpu_kernel() -> str:
    """How the kernel of INC's INT8 linears adds products on this CPU, found by running it on large codes.

    Returns:
        `exact`, as with VNNI; `saturating`, as with AVX2 alone, see `saturation`; `unknown` for any other result.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-128, 128, (64, 64), generator=generator, dtype=torch.int8) for _ in range(2))
    x[:8], weight[:8], weight[8:16] = 127, 127, -128
    scale, out_scale = torch.full((64,), 2.0**-8), 2.0**5  # powers of two: no product is rounded
    codes = torch._make_per_tensor_quantized_tensor((x.int() + 128).to(torch.uint8), 1.0, 0)
    found = torch.ops.quantized.linear(codes, pack_linear(weight, scale, None), out_scale, 128).int_repr().int()
    exact = (x.int() + 128) @ weight.int().t()
    for name, product in (("exact", exact), ("saturating", exact + saturation(x, weight))):
        if torch.equal(found, (product * 2.0**-13).round().add(128).clamp(0, 255).int()):
            return name
    return "unknown"


def pack_linear(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The weight `codes` (n, k) int8 with a scale (n,) for each row, packed for torch's quantized linear kernel."""
    return torch.ops.quantized.linear_prepack(per_channel(codes, scale), bias)


def per_channel(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """torch's quantized tensor of int8 `codes` (n, ...) with a scale (n,) for each output channel and zero_point 0."""
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)


def require_formula(device: torch.device) -> None:
    """Refuse a device that needs the formula where the formula does not hold.

    Raises:
        InputError: the CPU's kernel is one that the formula does not know, or the device's int8 product is not exact.
    """
    if device.type == "cpu":
        return  # sites call INC's kernel itself
    if cpu_kernel() == "unknown":
        raise InputError(
            f"torch's INT8 kernel on this CPU adds products in a way that {device.type} cannot repeat; set"
            " sensitivity.device to cpu"
        )
    check_integer_matmul(device)


def check_integer_matmul(device: torch.device) -> None:
    """Refuse a device whose int8 product is not exact.

    Raises:
        InputError: the product of extreme codes is not exact.
    """
    x, weight = torch.full((32, 64), -128, dtype=torch.int8), torch.full((32, 64), -128, dtype=torch.int8)
    weight[1::2] = 127
    if not torch.equal(integer_matmul(x.to(device), weight.to(device)).cpu().long(), x.long() @ weight.long().t()):
        raise InputError(f"torch's int8 product is not exact on this {device.type}; set sensitivity.device to cpu")


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


class MatmulSite(Site):
    """An op whose INT8 output is a product of codes: `quantize -> kernel -> dequantize`.

    The weight's codes are packed for the kernel on the CPU, and kept as they are on CUDA.
    """

    def __init__(self, name: str, module: Any, entry: dict[str, Any]) -> None:
        super().__init__(name, module, entry)
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
        """The weight and bias as the CPU's kernel takes them."""
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
        """The same output by torch operations that run everywhere."""
        raise NotImplementedError

    def accumulated(self, codes: torch.Tensor) -> torch.Tensor:
        """The sum over k of (x_q - x_zero) w_q for `codes` (m, k) int8, as this CPU's kernel adds it: (m, n) int32."""
        # x_q - x_zero = code + 128 - x_zero: the constant comes back as a multiple of each row's sum.
        product = integer_matmul(codes, self.codes).add_(self.row_sums, alpha=128 - self.in_zero)
        return product.add_(saturation(codes, self.codes)) if cpu_kernel() == "saturating" else product

    def requantized(self, accumulated: torch.Tensor) -> torch.Tensor:
        """fbgemm's ReQuantizeOutput of `accumulated` (m, n): round((acc + b / (x_scale w_scale)) * m) in float32.

        m = (x_scale w_scale) / y_scale. The conversion to int32 wraps what is too large to its lowest value.
        """
        both = self.in_scale * self.w_scale
        result = accumulated.float()
        if self.module.bias is not None:
            result.add_(self.module.bias / both)
        result = result.mul_(both / self.out_scale).round_()
        return result.masked_fill_(result >= 2.0**31, -(2.0**31))


class LinearSite(MatmulSite):
    """`quantize -> quantized::linear -> dequantize` of fbgemm, per output channel."""

    def pack(self) -> Any:
        return pack_linear(quantize_weight(self.module.weight.detach(), self.w_scale), self.w_scale, self.module.bias)

    def columns(self, codes: torch.Tensor) -> torch.Tensor:
        return codes

    def kernel(self, codes: torch.Tensor, packed: Any, scale: float, zero_point: int) -> torch.Tensor:
        output: torch.Tensor = torch.ops.quantized.linear(codes, packed, scale, zero_point)
        return output

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        codes = quantize(x, self.in_scale, self.in_zero).reshape(-1, x.shape[-1])
        result = self.requantized(self.accumulated(codes))
        return dequantized(result, self.out_scale, self.out_zero).view(*x.shape[:-1], -1)


class Conv3dSite(MatmulSite):
    """A Conv3d whose stride is its kernel, which is a linear over patches.

    torch has two kernels for a Conv3d, oneDNN's with AVX-512 VNNI and fbgemm's without, and they round differently. On
    the CPU torch chooses; the formula follows the kernel that this CPU takes.
    """

    def pack(self) -> Any:
        weight = per_channel(quantize_weight(self.module.weight.detach(), self.w_scale), self.w_scale)
        module = self.module
        return torch.ops.quantized.conv3d_prepack(weight, module.bias, module.stride, [0, 0, 0], [1, 1, 1], 1)

    def columns(self, codes: torch.Tensor) -> torch.Tensor:
        # Channels last: fbgemm's order, which decides which products are added in a pair.
        return codes.permute(0, 2, 3, 4, 1).flatten(1)

    def kernel(self, codes: torch.Tensor, packed: Any, scale: float, zero_point: int) -> torch.Tensor:
        output: torch.Tensor = torch.ops.quantized.conv3d(codes, packed, scale, zero_point)
        return output

    def by_formula(self, x: torch.Tensor) -> torch.Tensor:
        """For patches (n, channels, t, h, w) of exactly the kernel's size or whole multiples of the size."""
        patches, spatial = as_patches(quantize(x, self.in_scale, self.in_zero), self.module.kernel_size)
        accumulated = self.accumulated(patches)
        result = self.by_onednn(accumulated) if has_vnni() else self.requantized(accumulated)
        rounded = dequantized(result, self.out_scale, self.out_zero)
        return rounded.view(x.shape[0], *spatial, -1).permute(0, 4, 1, 2, 3)

    def by_onednn(self, accumulated: torch.Tensor) -> torch.Tensor:
        """oneDNN's codes less their zero_point, (m, n) float32.

        oneDNN is handed 1 / x_scale and inverts it again, multiplies by one scale after the other, and adds y_zero
        before it rounds.
        """
        result = accumulated.float().mul_(self.in_scale.reciprocal().reciprocal()).mul_(self.w_scale)
        if self.module.bias is not None:
            result.add_(self.module.bias)
        return result.mul_(self.out_scale.reciprocal()).add_(self.out_zero).round_().sub_(self.out_zero)


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
    """(n, c, t, h, w) cut into patches of `kernel`: rows (n * patches, kernel * c), and how many along t, h and w."""
    n, channels = x.shape[:2]
    counts = [size // side for size, side in zip(x.shape[2:], kernel, strict=True)]
    x = x[:, :, : counts[0] * kernel[0], : counts[1] * kernel[1], : counts[2] * kernel[2]]
    x = x.reshape(n, channels, counts[0], kernel[0], counts[1], kernel[1], counts[2], kernel[2])
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(n * math.prod(counts), -1), counts


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
