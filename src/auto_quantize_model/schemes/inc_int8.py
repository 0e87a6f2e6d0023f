"""The scheme `inc_int8`: the arithmetic of INC 2.6's static per-tensor INT8, as functions of tensors.

In: float32 tensors, scales and zero_points. Out: int8 codes, exact integer products, and the float32 values of torch's
quantized kernels. The order of the float32 roundings is the kernels' order; another order gives other results.
"""

import functools
from typing import Any

import torch
from torch.ao.quantization import observer as observers

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import any_algorithm

ROWS_AT_ONCE = 16384  # of a weight that is quantized, so that the FP32 temporaries of an lm_head stay small
# The observers for which the formulas hold: {side: (observer, dtype, qscheme)}.
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


def build_observer(entry: dict[str, Any]) -> Any:
    """The observer that a plan describes: {name, dtype, qscheme, reduce_range, quant_min, quant_max}."""
    arguments = {key: value for key, value in entry.items() if key != "name"}
    for key in ("dtype", "qscheme"):
        arguments[key] = getattr(torch, arguments[key])
    return getattr(observers, entry["name"])(**arguments)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int, wide: torch.dtype | None = None) -> torch.Tensor:
    """`x` (any shape, float32) as int8 codes `quint8 - 128`, rounded as `torch.quantize_per_tensor` rounds.

    The kernel rounds once after a fused multiply-add. So the float32 sum decides how x / scale + zero_point rounds near
    a tie. On CPU `addcmul` is that fused operation. On CUDA it may round the product first, so the sum is in float64
    there (`wide`), where the product of two float32 numbers is exact.
    """
    wide = wide or (torch.float64 if x.is_cuda else torch.float32)
    if rounds_before_zero_point():
        codes = (x * scale.reciprocal()).round_().add_(zero_point)
    else:
        shift = torch.full((), zero_point, dtype=wide, device=x.device)
        codes = torch.addcmul(shift, x.to(wide), scale.reciprocal().to(wide)).float().round_()
    return codes.clamp_(0, 255).sub_(128).to(torch.int8)


@functools.cache
def rounds_before_zero_point() -> bool:
    """Whether this torch rounds x / scale before it adds the zero_point, as torch 2.11 does and torch 2.13 does not."""
    with any_algorithm():
        code = torch.quantize_per_tensor(torch.tensor([0.5]), 1.0, 1, torch.quint8).int_repr()
    return int(code) == 1  # 0 + 1; otherwise 1.5 becomes 2


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

    Zeros fill k and n up to multiples of 8, and m above 16, because CUDA's kernel needs them. On CPU, torch 2.13 gives
    wrong products at k = 1 without them.
    """
    (m, k), n = x.shape, weight.shape[0]
    x = with_zeros(x, max(0, 17 - m), -k % 8)
    weight = with_zeros(weight, -n % 8, -k % 8)
    return torch._int_mm(x, weight.t())[:m, :n]


def with_zeros(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`x` with that many rows and columns of zeros added, or `x` itself where there are none to add."""
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def saturation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The change that saturation makes to the product of `x` (m, k) and `weight` (n, k), both int8: (m, n) int32.

    A CPU without VNNI adds the products of columns 2i and 2i + 1 in int16 (vpmaddubsw), and cuts sums beyond int16 at
    its limit. The CPU multiplies unsigned codes, `x` + 128. Only pairs that can exceed int16 for some row of the weight
    are computed. They are few, because codes and weights must both be large.
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
        `exact`, as with VNNI; `saturating`, as with AVX2 alone (see `saturation`); `unknown` for any other result.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-128, 128, (64, 64), generator=generator, dtype=torch.int8) for _ in range(2))
    x[:8], weight[:8], weight[8:16] = 127, 127, -128
    scale, out_scale = torch.full((64,), 2.0**-8), 2.0**5  # powers of two: no product is rounded
    codes = torch._make_per_tensor_quantized_tensor((x.int() + 128).to(torch.uint8), 1.0, 0)
    with any_algorithm():  # a run on a GPU asks torch for deterministic ones
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
    """Refuse a device that needs the formula if the formula does not hold for it.

    Raises:
        InputError: the formula does not know the CPU's kernel, or the device's int8 product is not exact.
    """
    if device.type == "cpu":
        return  # on the CPU, sites call INC's kernel itself
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


def weight_scale(weight: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """The scale (n,), float32, of each output channel by the plan's weight observer."""
    observer = build_observer(entry)
    observer(weight.detach().cpu())
    scale: torch.Tensor = observer.calculate_qparams()[0]
    return scale.to(weight.device)


def dequantized(result: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """Codes less their zero_point (float32, rounded, not yet saturated) as saturated float32 values."""
    # The sum with 0 turns -0.0 into 0.0, because an integer code cannot tell them apart.
    return result.clamp_(-zero_point, 255 - zero_point).mul_(scale).add_(0.0)
