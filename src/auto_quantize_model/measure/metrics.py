"""How far an output is from the FP32 output: INC's error, and metrics that compare across batches and models.

In: the FP32 output at the measured op, once, and other outputs. Out: one JSON-able record per output.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.divergence import KL, ROWS_IN_CACHE, Divergence, divergence_at
from auto_quantize_model.models.sample import image_positions, tokens_of


def output_at(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], measured_op: str) -> torch.Tensor:
    """The output of a module in one forward of a model: for the measured op, (samples, tokens, vocabulary)."""
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(measured_op).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    return outputs[-1]


def squared_error(reference: torch.Tensor, output: torch.Tensor) -> float:
    """INC's mse_v2 value: the **sum** of squared differences, in float32, in INC's order of operations."""
    return float((reference - output).pow(2).sum())


class Reference:
    """The FP32 output of one batch, and the metrics of other outputs against it.

    Args:
        output: (batch, tokens, vocabulary) logits, float32. Those of a classifier are (batch, classes), and then each
            sample is one position. A last hidden state is (batch, positions, channels).
        image_tokens: (batch, tokens), true where the input token stands for a part of an image; None without images.
            For a model of images alone it is (batch,).
        divergence: how far an output is from this one.
    """

    def __init__(self, output: torch.Tensor, image_tokens: torch.Tensor | None, divergence: Divergence = KL) -> None:
        self.output, self.divergence = output, divergence
        self.top1 = output.argmax(-1)
        if image_tokens is None:
            image_tokens = torch.zeros(output.shape[:-1], dtype=torch.bool)
        if image_tokens.ndim < output.ndim - 1:
            image_tokens = image_tokens.unsqueeze(-1).expand(output.shape[:-1])
        self.image = image_tokens.to(output.device).bool()

    @classmethod
    def of(cls, output: torch.Tensor, batch: Mapping[str, torch.Tensor], measured_op: str) -> "Reference":
        """The reference for the FP32 output of a batch at the measured op."""
        return cls(output, image_positions(batch), divergence_at(measured_op))

    def totals(self) -> dict[str, float]:
        """What sums of errors and divergences are divided by.

        Returns:
            `all`, `image` and `text`: the sum of squares of the FP32 output at all, image and text positions.
            `image_positions` and `text_positions`: how many there are.
        """
        squares = self.output.double().pow(2).sum(-1)
        positions = {"image_positions": float(self.image.sum()), "text_positions": float((~self.image).sum())}
        return {"all": float(squares.sum()), **self._split(squares), **positions}

    def compare(self, output: torch.Tensor) -> dict[str, float]:
        """The record of another output.

        Returns:
            `mse_value` (INC's sum of squared errors), `image_error` and `text_error` (the same sum at image and text
            positions). `divergence` (of the output from the FP32 one, mean over positions, in nats for logits),
            `image_divergence` and `text_divergence` (its **sum** at image and text positions). `top1_agreement` (share
            of positions whose most likely token or class is that of FP32), which embeddings do not have.
        """
        return self.compare_samples(output)[0]

    def compare_samples(self, output: torch.Tensor) -> tuple[dict[str, float], list[float]]:
        """The record of another output, as `compare` returns it, and the mean divergence of each sample."""
        errors = (self.output - output).pow(2)
        at = self._split(errors.sum(-1).double())
        divergences = self.divergence.between(self.output, output)
        of_parts = self._split(divergences)
        record = {
            "mse_value": float(errors.sum()),
            "image_error": at["image"],
            "text_error": at["text"],
            "divergence": float(divergences.mean()),
            "image_divergence": of_parts["image"],
            "text_divergence": of_parts["text"],
        }
        if self.divergence.names_tokens:
            record["top1_agreement"] = float((output.argmax(-1) == self.top1).double().mean())
        return record, divergences.reshape(len(divergences), -1).mean(-1).tolist()

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


def next_token_loss(
    output: torch.Tensor, batch: Mapping[str, torch.Tensor], spans: Sequence[range | None]
) -> tuple[float, int]:
    """The sum of -log p of tokens, given those before them, in nats, and how many tokens these are.

    They are the tokens of the answer of a sample that has one. Of a sample without an answer they are all tokens but
    the first one and those of images. Where a token sees those after it, and where the output is not one row for each
    token, there are none.

    Args:
        output: (samples, tokens, vocabulary) logits.
        batch: its tokens, int64 (samples, tokens), its image positions, if it has any, and whether it is causal.
        spans: for each sample, the positions of its answer's tokens.
    """
    known = tokens_of(batch)
    if known is None or output.shape[:-1] != known.shape:
        return 0.0, 0
    tokens = known.to(output.device)
    images = image_positions(batch)
    counted = torch.ones_like(tokens, dtype=torch.bool) if images is None else ~images.to(output.device)
    counted &= getattr(batch, "causal", True)
    for row, span in enumerate(spans):
        if span is not None:
            counted[row] = False
            counted[row, span.start : span.stop] = True
    rows = output[:, :-1][counted[:, 1:]], tokens[:, 1:][counted[:, 1:]]
    total = 0.0
    for logits, of_rows in zip(*(side.split(ROWS_IN_CACHE) for side in rows), strict=True):
        total += float(torch.nn.functional.cross_entropy(logits.double(), of_rows, reduction="sum"))
    return total, len(rows[1])


def right_answers(output: torch.Tensor, batch: Mapping[str, torch.Tensor], spans: Sequence[range | None]) -> list[bool]:
    """Whether each sample that has an answer has every token of it as the most likely one, given those before it.

    Args:
        output: (samples, tokens, vocabulary) logits.
        batch: its tokens, int64 (samples, tokens).
        spans: for each sample, the positions of its answer's tokens.
    """
    right, tokens = [], tokens_of(batch)
    for row, span in enumerate(spans):
        if span is not None and tokens is not None:
            expected = tokens[row, span.start : span.stop].to(output.device)
            predicted = output[row, span.start - 1 : span.stop - 1].argmax(-1)
            right.append(bool(torch.equal(predicted, expected)))
    return right
