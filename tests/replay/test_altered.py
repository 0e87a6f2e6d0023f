"""An altered op has the bits of the library's own quantized module on smoothed inputs and weights."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

from auto_quantize_model.replay.altered import Alteration, Altered
from auto_quantize_model.replay.served import Kept, LastInput
from auto_quantize_model.schemes.compressed import (
    global_scale,
    input_parameters,
    put_parameters,
    scheme_of,
    weight_parameters,
)
from auto_quantize_model.schemes.cures import smoothing_scale

STATIC = {"weights": {"num_bits": 8, "strategy": "channel"}}
STATIC["input_activations"] = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def linears() -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(32, rows).requires_grad_(False) for rows in (16, 8)]


def inputs() -> torch.Tensor:
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 30
    return x


def altered(modules: list[torch.nn.Linear], alteration: Alteration) -> list[Altered]:
    unit, last = [module.weight for module in modules], LastInput()
    return [Altered(module, alteration, unit, Kept(), last) for module in modules]


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8", "NVFP4", "STATIC"])
def test_a_smoothed_op_has_the_bits_of_the_librarys_module_on_smoothed_tensors(name: str) -> None:
    scheme = scheme_of(name, STATIC if name == "STATIC" else None)
    modules, x = linears(), inputs()
    low, high = x.flatten(0, -2).aminmax(dim=0)
    scale = smoothing_scale(low, high, [module.weight for module in modules], 0.5)
    alteration = Alteration(scheme.weights, scheme.input_activations, scale, channels=(low, high))
    smoothed = [module.weight * scale for module in modules]
    shared = global_scale(smoothed) if scheme.weights.strategy == "tensor_group" else None
    for op, module, weight in zip(altered(modules, alteration), modules, smoothed, strict=True):
        library: Any = torch.nn.Linear(32, weight.shape[0]).requires_grad_(False)
        library.weight.data, library.bias.data = weight.clone(), module.bias.clone()
        found = weight_parameters(weight, scheme.weights, shared)
        initialize_module_for_quantization(library, scheme.model_copy(deep=True))
        put_parameters(library, "weight", found)
        if scheme.input_activations.dynamic is not True:
            ends = float((x / scale).min()), float((x / scale).max())
            assert alteration.range == ends
            put_parameters(library, "input", input_parameters(*ends, scheme.input_activations, weight.dtype))
        library.quantization_status = QuantizationStatus.FROZEN
        assert torch.equal(op(x), library(x / scale))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["W8A8", "FP8", "NVFP4", "STATIC"])
def test_a_gpu_alters_weights_and_inputs_to_the_bits_of_the_cpu(name: str) -> None:
    scheme, modules, x = scheme_of(name, STATIC if name == "STATIC" else None), linears(), inputs()
    channels = x.flatten(0, -2).aminmax(dim=0)
    scale = smoothing_scale(*channels, [module.weight for module in modules], 0.5)
    found = []
    for device in ("cpu", "cuda"):
        low, high = (end.to(device) for end in channels)
        alteration = Alteration(scheme.weights, scheme.input_activations, scale.to(device), channels=(low, high))
        ops = altered([copy.deepcopy(module).to(device) for module in modules], alteration)
        found.append([(op.weight().cpu(), op.served_input(x.to(device)).cpu()) for op in ops])
    for here, there in zip(*found, strict=True):
        assert all(map(torch.equal, here, there))


def test_a_side_alone_leaves_the_other_as_it_is() -> None:
    scheme, x = scheme_of("W8A8"), inputs()
    modules = linears()[:1]
    (neither,) = altered(modules, Alteration(None, None))
    assert torch.equal(neither(x), modules[0](x))
    (weight,) = altered(modules, Alteration(scheme.weights, None))
    (served,) = altered(modules, Alteration(None, scheme.input_activations))
    assert torch.equal(weight.served_input(x), x) and not torch.equal(weight.weight(), modules[0].weight)
    assert torch.equal(served.weight(), modules[0].weight) and not torch.equal(served.served_input(x), x)


def test_asymmetric_inputs_have_a_finer_step_where_all_values_are_positive() -> None:
    args = scheme_of("W8A8").input_activations
    x = inputs().abs()
    errors = []
    for symmetric in (True, False):
        side = args.model_copy(update={"symmetric": symmetric})
        (op,) = altered(linears()[:1], Alteration(None, side))
        errors.append(float((op.served_input(x) - x).square().sum()))
    assert errors[1] < 0.5 * errors[0]
