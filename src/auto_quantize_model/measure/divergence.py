"""How far one output is from another at each position, and the matrix that gives small divergences.

In: outputs at the measured op. Out: divergences, their gradient, and random directions whose covariance is that matrix.
Logits are compared by the KL divergence of their distributions. A last hidden state has no distribution, so embeddings
are compared by their cosine distance, as a search compares them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from auto_quantize_model.models.hidden_state import HIDDEN_STATE

ROWS_AT_ONCE = 64  # positions whose distributions are in memory at a time
ROWS_IN_CACHE = 4  # positions whose distributions are in float64 at a time; so few fit in the CPU's cache
Rows = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """A divergence of outputs, of the shape (..., channels), from reference outputs.

    For a small error e at a position it is e' F e / 2, with a matrix F of that position.

    Attributes:
        between: takes the reference and another output, and returns float64 of the shape (...).
        drawn: takes rows of the reference and a generator, and returns random rows with the covariance F.
        gradient: takes the reference and another output, and returns the gradient at the other output of the sum over
            positions.
        names_tokens: whether the largest channel of a position is a token or a class that the model chooses.
    """

    between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    drawn: Rows
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    names_tokens: bool

    def direction(self, reference: torch.Tensor, seed: int) -> torch.Tensor:
        """A random direction with the covariance F at each position.

        Args:
            reference: (..., channels), float32.
            seed: the same on every device gives the same direction, apart from rounding.

        Returns:
            float32 of the shape of `reference`.
        """
        generator = torch.Generator().manual_seed(seed)
        found = torch.empty_like(reference)
        for rows, out in zip(*(of.flatten(0, -2).split(ROWS_AT_ONCE) for of in (reference, found)), strict=True):
            out.copy_(self.drawn(rows, generator))
        return found


def kl_divergences(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """KL(reference || output) at each position, of the distributions that logits over the last dimension give.

    The divergence is log(1 + sum p (exp(d - m) - 1)). Here p is the reference's distribution, d the difference of the
    logits, and m the mean of d under p. No two large terms cancel in this form, so a tiny divergence keeps its digits.
    A difference of logarithms would lose them.

    Args:
        reference: logits of shape (..., vocabulary).
        output: logits of the same shape.

    Returns:
        Nats, float64, of the shape (...).
    """
    rows = reference.flatten(0, -2), output.flatten(0, -2)
    found = [_divergences(p, q) for p, q in zip(*(side.split(ROWS_IN_CACHE) for side in rows), strict=True)]
    return torch.cat(found).reshape(reference.shape[:-1])


def _divergences(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """As `kl_divergences`, for logits of shape (rows, vocabulary) that fit in float64."""
    p = reference.double().softmax(-1)
    d = output.double() - reference.double()
    d -= (p * d).sum(-1, keepdim=True)
    found = torch.log1p((p * d.expm1()).sum(-1)).clamp(min=0)  # rounding can leave -1e-17 where the divergence is 0
    if not found.isfinite().all():  # exp overflows where a logit grew by more than 700; nothing cancels there
        large = (reference.double().log_softmax(-1) + d).logsumexp(-1)
        found = torch.where(found.isfinite(), found, large)
    return found


def of_softmax(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows with the covariance diag(p) - p p' of the softmax p, which is the Fisher matrix of the logits.

    With r standard normal they are sqrt(p) r - p <sqrt(p), r>.
    """
    p = logits.softmax(-1)
    root = p.sqrt()
    r = torch.randn(p.shape, generator=generator).to(p.device)
    return root * r - p * (root * r).sum(-1, keepdim=True)


def cosine_distances(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """1 - cos of the angle between two embeddings at each position, as half the squared distance of the unit vectors.

    Two large terms would cancel in 1 - cos, so a tiny distance would lose its digits.

    Args:
        reference: (..., channels).
        output: of the same shape.

    Returns:
        From 0 to 2, float64, of the shape (...). An embedding of zeros has a distance of 1/2 from any other.
    """
    return (unit(reference.double()) - unit(output.double())).pow(2).sum(-1) / 2


def of_angles(embeddings: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows with the covariance (I - u u') / |x|^2, where u is the unit vector of an embedding x.

    A small error e turns the embedding by |e - u <u, e>| / |x|. With r standard normal the rows are
    (r - u <u, r>) / |x|.
    """
    r = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
    return across(unit(embeddings), r) / length(embeddings)


def gradient_of_cosine(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The gradient of the cosine distance at `output`: what of -u lies across the output, over the output's length."""
    return -across(unit(output), unit(reference)) / length(output)


def across(units: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The part of vectors that is orthogonal to unit vectors."""
    return vectors - units * (units * vectors).sum(-1, keepdim=True)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors at length 1; a vector of zeros stays zero."""
    return vectors / length(vectors)


def length(vectors: torch.Tensor) -> torch.Tensor:
    """The length of each vector, (..., 1), or the smallest normal number where that is larger."""
    found: torch.Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return found.clamp(min=torch.finfo(vectors.dtype).tiny)


KL = Divergence(kl_divergences, of_softmax, lambda reference, output: output.softmax(-1) - reference.softmax(-1), True)
COSINE = Divergence(cosine_distances, of_angles, gradient_of_cosine, False)


def divergence_at(measured_op: str) -> Divergence:
    """The divergence of the outputs at an op."""
    return COSINE if measured_op == HIDDEN_STATE else KL
