"""How far an output is from the FP32 output: INC's error, and metrics that compare across batches and models.

In: the FP32 output at the measured op, once, and other outputs. Out: one JSON-able record per output.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from auto_quantize_model.files import InputError

ROWS_AT_ONCE = 4  # positions whose distributions are in float64 at a time; so few fit in the CPU's cache


def squared_error(reference: torch.Tensor, output: torch.Tensor) -> float:
    """INC's mse_v2 value: the **sum** of squared differences, in float32, in INC's order of operations."""
    return float((reference - output).pow(2).sum())


class Reference:
    """The FP32 output of one batch, and the metrics of other outputs against it.

    Args:
        output: (batch, tokens, vocabulary) logits, float32.
        image_tokens: (batch, tokens), true where the input token stands for a part of an image; None without images.
    """

    def __init__(self, output: torch.Tensor, image_tokens: torch.Tensor | None) -> None:
        self.output = output
        self.top1 = output.argmax(-1)
        if image_tokens is None:
            image_tokens = torch.zeros(output.shape[:-1], dtype=torch.bool)
        self.image = image_tokens.to(output.device).bool()

    def totals(self) -> dict[str, float]:
        """Sums of squares of the FP32 output: over all positions, and over image and text positions."""
        squares = self.output.double().pow(2).sum(-1)
        return {"all": float(squares.sum()), **self._split(squares)}

    def compare(self, output: torch.Tensor) -> dict[str, float]:
        """The record of another output.

        Returns:
            `mse_value` (INC's sum of squared errors), `image_error` and `text_error` (the same sum at image and text
            positions). `kl_divergence` (nats, of the next-token distribution from the FP32 one, mean over positions)
            and `top1_agreement` (share of positions whose most likely token is that of FP32).
        """
        errors = (self.output - output).pow(2)
        at = self._split(errors.sum(-1).double())
        return {
            "mse_value": float(errors.sum()),
            "image_error": at["image"],
            "text_error": at["text"],
            "kl_divergence": kl_divergence(self.output, output),
            "top1_agreement": float((output.argmax(-1) == self.top1).double().mean()),
        }

    def _split(self, per_position: torch.Tensor) -> dict[str, float]:
        return {
            "image": float(per_position[self.image].sum()),
            "text": float(per_position[~self.image].sum()),
        }


def require_finite(record: dict[str, float], place: str, state: str, advice: str) -> dict[str, float]:
    """The record of a state, after a check that all its numbers are finite.

    Args:
        record: as `Reference.compare` or `Reference.totals` returns it.
        place: the batch, and more about the place.
        state: what was in INT8 or in FP32.
        advice: the next step.

    Raises:
        InputError: the message names all of these, and the number.
    """
    for metric, value in record.items():
        if not math.isfinite(value):
            raise InputError(f"{place}: {metric} of {state} is {value}; {advice}")
    return record


def kl_divergence(reference: torch.Tensor, output: torch.Tensor) -> float:
    """KL(reference || output) of the distributions that logits over the last dimension give: nats, mean over the rest.

    The sums are in float64, because one op's divergence can be below the resolution of float32.
    """
    total = torch.zeros((), dtype=torch.float64, device=output.device)
    rows = reference.flatten(0, -2), output.flatten(0, -2)
    for p, q in zip(*(side.split(ROWS_AT_ONCE) for side in rows), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum()
    return max(0.0, float(total) / rows[0].shape[0])  # rounding can leave -1e-17 where the divergence is 0


def right_answers(output: torch.Tensor, batch: Mapping[str, torch.Tensor], spans: Sequence[range | None]) -> int:
    """How many samples of a batch have every token of their answer as the most likely one, given those before it.

    Args:
        output: (samples, tokens, vocabulary) logits.
        batch: its `input_ids`, int64 (samples, tokens).
        spans: for each sample, the positions of its answer's tokens.
    """
    right = 0
    for row, span in enumerate(spans):
        if span is not None:
            expected = batch["input_ids"][row, span.start : span.stop].to(output.device)
            predicted = output[row, span.start - 1 : span.stop - 1].argmax(-1)
            right += bool(torch.equal(predicted, expected))
    return right
