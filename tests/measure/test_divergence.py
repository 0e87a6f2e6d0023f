"""The divergences of outputs: known values, tiny ones with all their digits, and the covariance of directions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.measure.divergence import (
    COSINE,
    KL,
    Divergence,
    cosine_distances,
    divergence_at,
    kl_divergences,
)
from auto_quantize_model.models.hidden_state import HIDDEN_STATE

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 30), st.integers(1, 9))
def test_the_divergence_is_torchs_and_never_negative(seed, spread, rows):
    generator = torch.Generator().manual_seed(seed)
    reference, output = (torch.randn(2, rows, 11, generator=generator) * spread for _ in range(2))
    log_p, log_q = (side.double().log_softmax(-1) for side in (reference, output))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    found = kl_divergences(reference, output)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.shape == (2, rows) and found.min() >= 0


@given(st.integers(0, 2**32 - 1), st.floats(1e-9, 1e-5))
def test_a_tiny_divergence_keeps_its_digits(seed, size):
    generator = torch.Generator().manual_seed(seed)
    reference, change = (torch.randn(1, 4, 100, generator=generator).double() for _ in range(2))
    p = reference.softmax(-1)
    error = size * change
    centred = error - (p * error).sum(-1, keepdim=True)
    # To second order, half the variance of the change; the third order is smaller by the size of the change.
    expected = (p * centred.pow(2)).sum(-1) / 2
    torch.testing.assert_close(kl_divergences(reference, reference + error), expected, rtol=1e-3, atol=1e-29)


def test_a_divergence_of_thousands_of_nats_is_finite():
    reference = torch.tensor([[0.0, 0.0, -3000.0]])
    output = torch.tensor([[0.0, 0.0, 3000.0]])
    assert math.isclose(float(kl_divergences(reference, output)), 3000 - math.log(2), rel_tol=1e-12)


def test_directions_have_the_covariance_of_the_softmaxs_fisher_matrix():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = torch.stack([KL.direction(logits, seed)[0] for seed in range(20_000)])
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - torch.outer(p, p), atol=6e-3, rtol=0)
    assert torch.allclose(drawn.sum(-1), torch.zeros(()), atol=1e-5)  # a shift of all logits changes nothing


def test_directions_of_an_embedding_have_the_covariance_of_its_angles():
    x = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    drawn = torch.stack([COSINE.direction(x, seed)[0] for seed in range(20_000)])
    u = x[0] / 5
    expected = (torch.eye(4) - torch.outer(u, u)) / 25
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), expected, atol=6e-4, rtol=0)
    assert torch.allclose(drawn @ u, torch.zeros(()), atol=1e-6)  # a longer embedding has the same angle


@given(SEEDS, st.floats(0.01, 100), st.integers(1, 9))
def test_the_cosine_distance_is_torchs_whatever_the_lengths(seed, length, rows):
    generator = torch.Generator().manual_seed(seed)
    reference, output = (torch.randn(2, rows, 11, generator=generator) * length for _ in range(2))
    expected = 1 - torch.nn.functional.cosine_similarity(reference.double(), output.double(), dim=-1)
    found = cosine_distances(reference, output)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.shape == (2, rows) and found.min() >= 0
    torch.testing.assert_close(cosine_distances(reference, 7 * output), found, rtol=1e-5, atol=1e-6)


def test_a_tiny_cosine_distance_keeps_its_digits():
    reference = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angle = 1e-9
    output = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert float(cosine_distances(reference, output)) == pytest.approx(angle**2 / 2, rel=1e-9)
    zero = torch.zeros(1, 2)
    assert cosine_distances(zero, zero).item() == 0 and cosine_distances(zero, torch.eye(2)[:1]).item() == 0.5


@pytest.mark.parametrize("divergence", [KL, COSINE])
@given(seed=SEEDS)
def test_the_gradient_is_that_of_the_sum_over_positions(divergence: Divergence, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, output = (torch.randn(2, 3, 7, generator=generator).double() for _ in range(2))
    divergence.between(reference, output.requires_grad_()).sum().backward()
    found = divergence.gradient(reference, output.detach())
    torch.testing.assert_close(found, output.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", [KL, COSINE])
def test_products_with_directions_estimate_the_divergence_of_a_small_error(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(1, 4, 9, generator=generator)
    error = 1e-3 * torch.randn(reference.shape, generator=generator)
    exact = divergence.between(reference, reference + error)
    products = [(divergence.direction(reference, seed) * error).sum(-1).pow(2) / 2 for seed in range(4000)]
    torch.testing.assert_close(torch.stack(products).mean(0).double(), exact, rtol=0.1, atol=0)


def test_logits_are_compared_by_kl_and_a_hidden_state_by_angles():
    assert divergence_at("lm_head") is KL and divergence_at(HIDDEN_STATE) is COSINE
