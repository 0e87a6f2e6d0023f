"""The metrics of an output: INC's number as INC computes it, and metrics with known values."""

import math

import pytest
import torch

from auto_quantize_model.measure.divergence import kl_divergences
from auto_quantize_model.measure.metrics import Reference


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    reference = torch.randn(2, 7, 50)
    return reference, reference + torch.randn_like(reference) * 0.1


def test_the_mse_value_is_incs_sum_in_float32(outputs):
    reference, output = outputs
    record = Reference(reference, None).compare(output)
    assert record["mse_value"] == (reference - output).pow(2).sum().item()


def test_errors_at_image_and_text_positions_add_up(outputs):
    reference, output = outputs
    image = torch.zeros(2, 7, dtype=torch.int64)
    image[:, 2:5] = 1
    against = Reference(reference, image)
    record, totals = against.compare(output), against.totals()
    assert math.isclose(record["image_error"] + record["text_error"], record["mse_value"], rel_tol=1e-6)
    assert math.isclose(totals["image"] + totals["text"], totals["all"])
    assert math.isclose(record["image_error"], float((reference - output)[:, 2:5].double().pow(2).sum()), rel_tol=1e-6)


def test_without_image_tokens_every_position_is_text(outputs):
    reference, output = outputs
    record = Reference(reference, None).compare(output)
    assert record["image_error"] == 0
    assert math.isclose(record["text_error"], record["mse_value"], rel_tol=1e-6)


def test_an_equal_output_has_no_error_and_agrees_everywhere(outputs):
    reference, _ = outputs
    assert Reference(reference, None).compare(reference.clone()) == {
        "mse_value": 0.0,
        "image_error": 0.0,
        "text_error": 0.0,
        "divergence": 0.0,
        "image_divergence": 0.0,
        "text_divergence": 0.0,
        "top1_agreement": 1.0,
    }


def test_top1_agreement_is_a_share_of_positions(outputs):
    reference, _ = outputs
    output = reference.clone()
    output[0, :, 0] = 1000.0
    unmoved = int((reference[0].argmax(-1) == 0).sum())
    assert Reference(reference, None).compare(output)["top1_agreement"] == (7 + unmoved) / 14


def test_divergences_at_image_and_text_positions_are_sums_over_these(outputs):
    reference, output = outputs
    image = torch.zeros(2, 7, dtype=torch.int64)
    image[:, 2:5] = 1
    against = Reference(reference, image)
    record, totals, each = against.compare(output), against.totals(), kl_divergences(reference, output)
    assert math.isclose(record["image_divergence"], float(each[:, 2:5].sum()), rel_tol=1e-12)
    assert math.isclose(record["image_divergence"] + record["text_divergence"], 14 * record["divergence"])
    assert (totals["image_positions"], totals["text_positions"]) == (6, 8)
