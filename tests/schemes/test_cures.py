"""Cures of a scheme: a smoothing scale by its formula, and ranges of a weight that leave out its largest values."""

import pytest
import torch

from auto_quantize_model.schemes.compressed import (
    global_scale,
    quantized_weight,
    scheme_of,
    weight_parameters,
)
from auto_quantize_model.schemes.cures import narrowed, smoothing_scale, summed

ROWS = {"num_bits": 4, "strategy": "channel"}


def with_an_outlier() -> torch.Tensor:
    """A weight of normal values, and one value far out."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 12.0
    return weight


def test_the_smoothing_scale_is_that_of_the_formula() -> None:
    low, high = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([3.0, 9.0, 2.0])
    weights = [torch.tensor([[0.5, -2.0, 0.0]]), torch.tensor([[-1.0, 1.0, 0.0]])]
    found = smoothing_scale(low, high, weights, 0.5)
    # The range over twice the largest weight of the column, both to the power 0.5; a column of zeros keeps the range.
    assert torch.allclose(found, torch.tensor([(4 / 2) ** 0.5, (9 / 4) ** 0.5, 2.0]))
    assert smoothing_scale(low, low, weights, 0.5).tolist() == [pytest.approx(1e-5)] * 3


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "NVFP4", "W4A16", "W4A16_ASYM", "FP8_BLOCK", "ROWS"])
def test_narrow_ranges_have_no_more_error(name: str) -> None:
    args, weight = scheme_of(name, {"weights": ROWS} if name == "ROWS" else None).weights, with_an_outlier()
    ranges = narrowed(weight, args)
    factors = ranges / weight
    assert factors.min() > 0.2 and factors.max() <= 1.0
    shared = global_scale([ranges]) if args.strategy == "tensor_group" else None
    plain = quantized_weight(weight, args, weight_parameters(weight, args))
    narrow = quantized_weight(weight, args, weight_parameters(ranges, args, shared))
    assert (narrow - weight).square().sum() <= (plain - weight).square().sum()


def test_one_value_far_out_is_clipped_and_the_error_of_its_row_falls() -> None:
    args, weight = scheme_of("own", {"weights": ROWS}).weights, with_an_outlier()[3:4]
    errors = {}
    for step in range(20):
        served = quantized_weight(weight, args, weight_parameters(weight * (1 - step / 25), args))
        errors[1 - step / 25] = float((served - weight).square().sum())
    best = min(errors, key=errors.__getitem__)
    assert torch.equal(narrowed(weight, args), weight * best)
    assert best < 0.8 and errors[best] < 0.8 * errors[1.0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_bits": 8, "strategy": "tensor"}, [[10.0] * 4]),
        ({"num_bits": 8, "strategy": "channel"}, [[10.0] * 4]),
        ({"num_bits": 8, "strategy": "group", "group_size": 2}, [[3.0, 3.0, 7.0, 7.0]]),
        ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2, 2]}, [[3.0, 3.0, 7.0, 7.0]]),
    ],
)
def test_values_are_summed_over_what_shares_a_scale(fields: dict[str, object], expected: list[list[float]]) -> None:
    args = scheme_of("own", {"weights": fields}).weights
    assert summed(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), args).tolist() == expected
