"""The schemes of `compressed-tensors`, the format that llm-compressor writes and that vLLM reads.

In: a scheme by its name or by its fields, a Linear's weight, and its inputs. Out: weight and inputs as the served model
sees them, bit for bit as the library's own quantized module computes them. The library's functions do the arithmetic,
with one faster backend for FP4 in `fp4.py`.
Min/max observers find the ranges, as llm-compressor's `memoryless_minmax` and `static_minmax` do.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from pydantic import ValidationError

from auto_quantize_model.config import Scheme
from auto_quantize_model.files import InputError
from auto_quantize_model.schemes.fp4 import served_fp4
from auto_quantize_model.schemes.scheme import INC_INT8

PRESETS = tuple(name for name in get_args(Scheme) if name != INC_INT8)
IN_GROUPS = ("group", "tensor_group")
VALUES_AT_ONCE = 1 << 25  # of a weight that is quantized: 128 MiB in float32


@dataclass(frozen=True)
class QuantizationParameters:
    """What a static side of an op is quantized with.

    Attributes:
        scale: in the dtype that the library gives it; its shape is that of the strategy, such as (rows, groups).
        zero_point: of the same shape, or None for no shift.
        global_scale: float32 of shape (1,) for `tensor_group`, else None.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    global_scale: torch.Tensor | None = None

    def to(self, device: torch.device) -> "QuantizationParameters":
        """The same parameters on a device."""
        return replace(self, **{key: value.to(device) for key, value in vars(self).items() if value is not None})


def scheme_of(name: str, fields: Mapping[str, Any] | None = None) -> QuantizationScheme:
    """A scheme by the name of a preset, or by its own fields.

    Args:
        name: a preset of compressed-tensors, in its spelling, or any name for a scheme with fields.
        fields: `weights` and `input_activations`, each with the fields of the library's `QuantizationArgs`.

    Raises:
        InputError: there is no such preset, a field is unknown or has a wrong value, or the scheme quantizes outputs.
    """
    if fields is None:
        if name not in PRESETS:
            raise InputError(f"{name}: no scheme of compressed-tensors; take one of {', '.join(PRESETS)}")
        return preset_name_to_scheme(name, ["Linear"])
    try:
        scheme = QuantizationScheme(targets=["Linear"], **fields)
    except (ValidationError, NotImplementedError, ValueError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise InputError(f"{where}: {first['msg']}; take the fields of a preset as an example") from None
    if scheme.weights is None or scheme.output_activations is not None:
        raise InputError(f"{name}: a scheme quantizes weights, and inputs if asked, but no outputs; correct its fields")
    return scheme


def fields_of(scheme: QuantizationScheme) -> dict[str, Any]:
    """The fields of a scheme as JSON, from which `scheme_of` makes the scheme again."""
    fields: dict[str, Any] = scheme.model_dump(mode="json", include={"weights", "input_activations"})
    return fields


def refusal(scheme: QuantizationScheme, op_type: str, shape: tuple[int, ...]) -> str:
    """Why an op cannot have a scheme; empty if it can.

    Args:
        scheme: as `scheme_of` returns it.
        op_type: such as `Linear`; `Experts` for the same matrix of all experts of a block.
        shape: of the op's weight, (rows, columns) for a Linear, and with the number of experts before for `Experts`.
    """
    if op_type == "Experts":
        return refusal(scheme, "Linear", shape[1:])
    if op_type != "Linear":
        return f"compressed-tensors quantizes a Linear, and this op is of the type {op_type}"
    for side, args in (("weight", scheme.weights), ("input", scheme.input_activations)):
        if args and args.strategy in IN_GROUPS and args.group_size and shape[1] % args.group_size:
            return f"its {shape[1]} columns do not divide into the {side}'s groups of {args.group_size}"
        if args and args.block_structure and shape[1] % args.block_structure[1]:
            return f"its {shape[1]} columns do not divide into blocks of {args.block_structure[1]}"
    weights = scheme.weights
    packed = weights.type == "int" and weights.num_bits == 4 and not scheme.input_activations
    # Eight zero_points are one int32. compressed-tensors 0.20 cannot unpack several groups of so few rows.
    several = weights.strategy == "group" and shape[1] > weights.group_size
    if packed and not weights.symmetric and several and shape[0] <= 8:
        return f"compressed-tensors cannot read the packed zero_points of {shape[0]} rows; it needs more than 8"
    return ""


def nearest(scheme: QuantizationScheme, op_type: str, shape: tuple[int, ...]) -> str:
    """The preset that an op can have and that is most like a scheme, by bits and types; empty if there is none."""

    def unlike(name: str) -> tuple[int, bool, int]:
        other = preset_name_to_scheme(name, ["Linear"])
        mine, theirs = (side.input_activations.num_bits if side.input_activations else 16 for side in (scheme, other))
        bits = abs(other.weights.num_bits - scheme.weights.num_bits)
        return bits, other.weights.type != scheme.weights.type, abs(mine - theirs)

    able = [name for name in PRESETS if not refusal(scheme_of(name), op_type, shape)]
    return min(able, key=unlike, default="")


def stored_bytes(scheme: QuantizationScheme, shape: tuple[int, ...]) -> int:
    """The bytes of all tensors that a checkpoint in BF16 stores for a Linear without its bias.

    The library compresses a weight without data, so the bytes are those of its own format.

    Args:
        scheme: one that the op can have; see `refusal`.
        shape: of the weight, (rows, columns), or (experts, rows, columns).
    """
    rows, columns = shape[-2:]
    with torch.device("meta"):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        initialize_module_for_quantization(linear, scheme.model_copy(deep=True))
        put_parameters(linear, "weight", weight_parameters(linear.weight, scheme.weights))
        linear.quantization_status = QuantizationStatus.FROZEN
        compress_module(linear)
    stored = linear.state_dict()
    if "weight_packed" in stored and "weight_zero_point" in stored:  # without data the library leaves it unpacked
        unpacked = torch.zeros(stored["weight_zero_point"].shape, dtype=torch.int8)
        stored["weight_zero_point"] = pack_to_int32(unpacked, scheme.weights.num_bits, packed_dim=0)
    of_matrix: int = sum(tensor.nbytes for tensor in stored.values())
    return math.prod(shape[:-2]) * of_matrix


def put_parameters(module: torch.nn.Module, side: str, found: QuantizationParameters) -> None:
    """Give a module that the library has initialized the parameters of one side, `weight` or `input`."""
    for key, value in vars(found).items():
        if value is not None and value.numel():
            getattr(module, f"{side}_{key}").data = value


def global_scale(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """The global scale of weights that a serving engine holds as one matrix: float32 of shape (1,).

    By compressed-tensors' `generate_gparam`, over the minimum and the maximum of all the weights.
    """
    ranges = [torch.aminmax(weight.detach()) for weight in weights]
    low, high = (torch.stack(side).to(torch.float32) for side in zip(*ranges, strict=True))
    found: torch.Tensor = generate_gparam(low.min(), high.max())
    return found


def weight_parameters(
    weight: torch.Tensor, args: QuantizationArgs, shared: torch.Tensor | None = None
) -> QuantizationParameters:
    """The parameters of a weight (rows, columns) by its minima and maxima.

    Args:
        shared: for `tensor_group`, the global scale that the weight shares with others; None takes the weight's own.
    """
    weight = weight.detach()
    common = (shared if shared is not None else global_scale([weight])) if args.strategy == "tensor_group" else None
    if args.strategy == "tensor":
        low, high = torch.aminmax(weight)
    elif args.strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(-1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, high, args, common)
    return QuantizationParameters(scale, zero_point, common)


def quantized_weight(weight: torch.Tensor, args: QuantizationArgs, found: QuantizationParameters) -> torch.Tensor:
    """The weight as the served model sees it, of the same shape and dtype.

    A large weight is quantized some rows at a time, because the library makes several copies of what it quantizes. Each
    value depends on its own scale alone, so the bits are the same.
    """
    weight = weight.detach()
    height = args.block_structure[0] if args.block_structure else 1
    rows = max(1, VALUES_AT_ONCE // (weight.shape[1] * height)) * height
    served = torch.empty_like(weight)
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        of_part = slice(start // height, -(-(start + rows) // height))
        scale, zero_point = _of_rows(found.scale, of_part), _of_rows(found.zero_point, of_part)
        with served_fp4():
            served[part] = fake_quantize(weight[part], scale, zero_point, args, global_scale=found.global_scale)
    return served


def _of_rows(side: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The scales or zero_points of some rows, or the one that all rows share."""
    return side if side is None or side.ndim < 2 or side.shape[0] == 1 else side[rows]


def input_parameters(low: float, high: float, args: QuantizationArgs, dtype: torch.dtype) -> QuantizationParameters:
    """The parameters of a static input, or the global scale of a locally dynamic one, by the range of a calibration.

    They are on the CPU, which computes them for every device.

    Args:
        low, high: the least and the greatest value that the calibration saw.
        dtype: of the model, which scales take.
    """
    ends = torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype)
    if args.dynamic == "local":
        common = generate_gparam(*(end.to(torch.float32) for end in ends))
        return QuantizationParameters(torch.empty(0), torch.empty(0), common)
    return QuantizationParameters(*calculate_qparams(*ends, args))


def quantized_input(
    x: torch.Tensor, args: QuantizationArgs, found: QuantizationParameters | None = None
) -> torch.Tensor:
    """An input (..., columns) as the served model sees it, of the same shape and dtype.

    A dynamic scale per token is one of each row, also where the input has no dimension for samples, as in a vision
    tower. There the library itself would take one scale for all tokens, and vLLM takes one for each.

    Args:
        found: for a side that is not wholly dynamic, as `input_parameters` returns it.
    """
    if x.ndim == 2:
        return quantized_input(x.unsqueeze(0), args, found).squeeze(0)
    common = found.global_scale if found else None
    if args.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), common)
    else:
        assert found is not None  # noqa: S101  the replay calibrates static inputs first
        scale, zero_point = found.scale, found.zero_point
    with served_fp4():
        served: torch.Tensor = fake_quantize(x, scale, zero_point, args, global_scale=common)
    return served
