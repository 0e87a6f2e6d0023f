"""The arithmetic of a scheme is that of compressed-tensors' own quantized module, bit for bit."""

import re
from typing import Any, get_args

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import ValidationError

from auto_quantize_model.config import Inputs, OwnScheme, Weights
from auto_quantize_model.files import InputError
from auto_quantize_model.schemes import compressed
from auto_quantize_model.schemes.compressed import (
    PRESETS,
    QuantizationParameters,
    quantized_weight,
    refusal,
    scheme_of,
    weight_parameters,
)


def by_module(
    linear: torch.nn.Linear, x: torch.Tensor, scheme: Any, weight: QuantizationParameters, given: Any
) -> torch.Tensor:
    """The output of the library's own module, with the same scales and zero_points."""
    with_parameters(linear, scheme, weight, given)
    with torch.no_grad():
        return linear(x)


def with_parameters(linear: torch.nn.Linear, scheme: Any, weight: QuantizationParameters, given: Any) -> None:
    """Have the library quantize a module with these scales and zero_points of weight and input."""
    initialize_module_for_quantization(linear, scheme)
    for side, found in (("weight", weight), ("input", given)):
        for key, value in vars(found).items() if found else ():
            if value is not None and value.numel():
                parameter = getattr(linear, f"{side}_{key}")
                assert parameter.shape == value.shape
                parameter.data = value.to(parameter.dtype)
    linear.quantization_status = QuantizationStatus.FROZEN


def values(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """Values of one kind: with outliers, with rows of zeros, on the borders of codes, or far apart."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator)
    if kind == "outliers":
        drawn.view(-1)[:: max(1, drawn.numel() // 5)] *= 1000
    if kind == "zeros":
        drawn[..., : shape[-1] // 2, :] = 0
    if kind == "borders":
        drawn = (drawn * 4).round() / 8
    if kind == "far apart":
        drawn *= torch.logspace(-20, 20, shape[-1])
    return drawn


def sides(draw: st.DrawFn, kind: type[Weights] | type[Inputs]) -> Weights | Inputs:
    """One side of a scheme of one's own: fields in any combination that the config takes."""
    fields: dict[str, Any] = {"num_bits": draw(st.integers(2, 8)), "symmetric": draw(st.booleans())}
    fields["type"] = draw(st.sampled_from(["int", "float"]))
    fields["scale_dtype"] = draw(st.sampled_from([None, None, "torch.float8_e4m3fn", "torch.uint8"]))
    fields["strategy"] = draw(st.sampled_from(get_args(kind.model_fields["strategy"].annotation)))
    if "group" in fields["strategy"]:
        fields["group_size"] = draw(st.sampled_from([16, 32, 64, 128]))
    if fields["strategy"] == "block":
        fields["block_structure"] = draw(st.sampled_from([(128, 128), (16, 64), (1, 32)]))
    if kind is Inputs:
        fields["dynamic"] = draw(st.sampled_from([True, False, "local"]))
    try:
        return kind(**fields)
    except ValidationError:
        reject()


@st.composite
def own_schemes(draw: st.DrawFn) -> OwnScheme:
    """A scheme of one's own, with or without inputs."""
    inputs = sides(draw, Inputs) if draw(st.booleans()) else None
    return OwnScheme(name="mine", weights=sides(draw, Weights), input_activations=inputs)


ANY_OP = {
    "kinds": st.tuples(*[st.sampled_from(["plain", "outliers", "zeros", "borders", "far apart"])] * 2),
    "rows": st.integers(1, 300),
    "groups": st.integers(1, 3),
    "tokens": st.integers(1, 9),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "bias": st.booleans(),
    "seed": st.integers(0, 9),
}


@pytest.mark.parametrize("name", PRESETS)
@given(**ANY_OP)
def test_an_op_has_the_bits_of_the_librarys_module(name: str, **op: Any) -> None:
    require_the_librarys_bits(scheme_of(name), **op)


@given(own=own_schemes(), **ANY_OP)
def test_a_scheme_of_ones_own_has_the_bits_of_the_librarys_module(own: OwnScheme, **op: Any) -> None:
    require_the_librarys_bits(scheme_of(own.name, own.fields), **op)


@given(own=own_schemes(), rows=st.integers(1, 70), columns=st.sampled_from([128, 384]), seed=st.integers(0, 9))
def test_a_scheme_that_the_config_takes_can_be_stored_and_read_again(
    own: OwnScheme, rows: int, columns: int, seed: int
) -> None:
    scheme = scheme_of(own.name, own.fields)
    weight = values((rows, columns), "plain", seed).to(torch.bfloat16)
    linear: Any = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight.clone()
    found = compressed.weight_parameters(weight, scheme.weights)
    with_parameters(linear, scheme, found, None)
    compress_module(linear)
    if refusal(scheme, "Linear", (rows, columns)):
        with pytest.raises(RuntimeError, match="must be 1 to view Int as Byte"):
            decompress_module(linear)
        return
    decompress_module(linear)
    assert torch.equal(linear.weight, compressed.quantized_weight(weight, scheme.weights, found))


def test_zero_points_that_the_library_cannot_read_are_refused() -> None:
    scheme = scheme_of("W4A16_ASYM")
    assert refusal(scheme, "Linear", (9, 128)) == refusal(scheme_of("W4A16"), "Linear", (8, 128)) == ""
    why = "compressed-tensors cannot read the packed zero_points of 8 rows; it needs more than 8"
    assert refusal(scheme, "Linear", (8, 256)) == why and refusal(scheme, "Linear", (8, 128)) == ""
    assert compressed.nearest(scheme, "Linear", (8, 256)) == "W4A16"


def test_the_preset_nearest_to_a_scheme_of_ones_own_is_one_that_the_op_can_have() -> None:
    scheme = scheme_of("mine", {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 48}})
    assert refusal(scheme, "Linear", (8, 64)) == "its 64 columns do not divide into the weight's groups of 48"
    assert compressed.nearest(scheme, "Linear", (8, 64)) == "NVFP4A16"
    assert compressed.nearest(scheme, "Linear", (8, 128)) == "W4A16"


def require_the_librarys_bits(
    scheme: Any,
    kinds: tuple[str, str],
    rows: int,
    groups: int,
    tokens: int,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    linear = torch.nn.Linear(128 * groups, rows, bias=bias)
    linear.weight.data = values((rows, 128 * groups), kinds[0], seed)
    linear.to(dtype)
    x = values((2, tokens, 128 * groups), kinds[1], seed + 1).to(dtype)
    assert refusal(scheme, "Linear", tuple(linear.weight.shape)) == "" or rows <= 8
    weight, bias_of = linear.weight.detach().clone(), linear.bias
    found = compressed.weight_parameters(weight, scheme.weights)
    inputs, seen = scheme.input_activations, None
    if inputs and inputs.dynamic is not True:
        seen = compressed.input_parameters(float(x.min()), float(x.max()), inputs, dtype)
    used = compressed.quantized_input(x, inputs, seen) if inputs else x
    output = torch.nn.functional.linear(used, compressed.quantized_weight(weight, scheme.weights, found), bias_of)
    expected = by_module(linear, x, scheme, found, seen)
    assert output.dtype == expected.dtype == dtype
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())


def test_each_token_has_its_own_scale_with_and_without_a_dimension_for_samples() -> None:
    args = scheme_of("W8A8").input_activations
    x = values((5, 32), "plain", 0) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1e5]).unsqueeze(1)
    found = compressed.quantized_input(x, args)
    assert torch.equal(found, compressed.quantized_input(x.unsqueeze(0), args)[0])
    assert all(torch.equal(found[row], compressed.quantized_input(x[row : row + 1], args)[0]) for row in range(5))


def test_the_global_scale_of_a_unit_is_that_of_its_largest_value() -> None:
    small, large = values((4, 32), "plain", 0), 7 * values((4, 32), "plain", 1)
    shared = compressed.global_scale([small, large])
    assert shared == compressed.global_scale([large]) != compressed.global_scale([small])
    args = scheme_of("NVFP4").weights
    found = compressed.weight_parameters(small, args, shared)
    assert found.global_scale is shared and not torch.equal(
        found.scale, compressed.weight_parameters(small, args).scale
    )


@pytest.mark.parametrize(
    ("name", "op_type", "shape", "why"),
    [
        ("W4A16", "Linear", (8, 576), "its 576 columns do not divide into the weight's groups of 128"),
        ("NVFP4", "Linear", (8, 24), "its 24 columns do not divide into the weight's groups of 16"),
        ("FP8_BLOCK", "Linear", (8, 192), "its 192 columns do not divide into blocks of 128"),
        (
            "W8A8",
            "Conv3d",
            (8, 3, 2, 14, 14),
            "compressed-tensors quantizes a Linear, and this op is of the type Conv3d",
        ),
        ("W8A8", "Linear", (8, 13), ""),
        ("FP8_BLOCK", "Linear", (130, 256), ""),
    ],
)
def test_an_op_that_cannot_have_a_scheme_is_refused_with_the_reason(
    name: str, op_type: str, shape: tuple[int, ...], why: str
) -> None:
    assert refusal(scheme_of(name), op_type, shape) == why


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("W9A9", None, "W9A9: no scheme of compressed-tensors; take one of W8A8, INT8, FP8, "),
        ("mine", {"weights": {"num_bit": 4}}, "mine.weights.num_bit: Extra inputs are not permitted; take the fields"),
        ("mine", {"weights": {"strategy": "group"}}, "requires group_size to be set"),
        ("mine", {"input_activations": {"dynamic": True}}, "mine: a scheme quantizes weights, and inputs if asked"),
        ("mine", {"weights": {}, "output_activations": {}}, "but no outputs; correct its fields"),
    ],
)
def test_an_unknown_or_wrong_scheme_is_refused(name: str, fields: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        scheme_of(name, fields)


def test_every_preset_of_the_library_is_a_scheme() -> None:
    assert set(PRESETS) == set(PRESET_SCHEMES) - {"UNQUANTIZED"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_weight_that_is_quantized_in_parts_has_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = scheme_of(name).weights
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    parameters = weight_parameters(weight, args)
    whole = quantized_weight(weight, args, parameters)
    monkeypatch.setattr(compressed, "VALUES_AT_ONCE", 7 * 256)
    assert torch.equal(quantized_weight(weight, args, parameters), whole)
