"""What an op's inputs and weight look like: outlier channels, clipped values, ranges by modality, kurtosis, histograms.

In: the unquantized model, and batches. Out: facts about units, which explain a measured loss. They never rank ops.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.models.mapped import in_fp32
from auto_quantize_model.models.sample import image_positions
from auto_quantize_model.models.units import tower_of
from auto_quantize_model.records import Channel, Histogram, InputFacts, WeightFacts
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.schemes.compressed import global_scale, quantized_weight, weight_parameters

OUTLIER = 6.0  # times the largest magnitude of the median channel
NAMED = 8  # outlier channels that are named
BINS = 32
Range = tuple[float, float]


class Inputs:
    """The inputs of one unit.

    Attributes:
        low, high: the minimum and the maximum of each channel on the calibration batches, (columns,).
    """

    def __init__(self, op_name: str) -> None:
        self.op_name = op_name
        self.low = self.high = torch.empty(0)
        self.largest = torch.empty(0)  # the largest magnitude of each channel on held-out batches
        self.seen: dict[str, Range] = {}  # on held-out batches, by `all`, `image` and `text`
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.outside = 0

    def calibrate(self, x: torch.Tensor, image: torch.Tensor | None) -> None:
        """Take the inputs (..., columns) of a calibration batch."""
        low, high = x.flatten(0, -2).aminmax(dim=0)
        self.low = torch.minimum(self.low, low) if self.low.numel() else low
        self.high = torch.maximum(self.high, high) if self.high.numel() else high

    def observe(self, x: torch.Tensor, image: torch.Tensor | None) -> None:
        """Take the inputs (..., columns) of a held-out batch, after all calibration batches.

        Args:
            image: (samples, tokens), true at the positions of images; None for a batch without images. For a model of
                images alone it is (samples,).
        """
        largest = x.abs().flatten(0, -2).amax(0)
        self.largest = torch.maximum(self.largest, largest) if self.largest.numel() else largest
        low, high = self.calibration_range
        self.counts += counted(x, low, high)
        self.outside += int(((x < low) | (x > high)).sum())
        self._widen("all", x)
        alone = image is not None and image.ndim == 1  # the model takes images alone
        if alone or tower_of(self.op_name) == "vision":
            self._widen("image", x)
        elif image is None:
            self._widen("text", x)
        elif x.shape[:-1] == image.shape:
            self._widen("image", x[image])
            self._widen("text", x[~image])

    def _widen(self, part: str, x: torch.Tensor) -> None:
        if x.numel():
            low, high = (float(end) for end in x.aminmax())
            before = self.seen.get(part, (low, high))
            self.seen[part] = min(low, before[0]), max(high, before[1])

    @property
    def calibration_range(self) -> Range:
        """The minimum and the maximum on the calibration batches."""
        return float(self.low.min()), float(self.high.max())

    def facts(self) -> InputFacts:
        """What was seen."""
        ratios = self.largest / self.largest.median().clamp(min=torch.finfo(torch.float32).tiny)
        beyond = int((ratios >= OUTLIER).sum())
        order = ratios.argsort(descending=True, stable=True)[: min(beyond, NAMED)].tolist()
        return InputFacts(
            range=self.seen["all"],
            calibration_range=self.calibration_range,
            image_range=self.seen.get("image"),
            text_range=self.seen.get("text"),
            clipped=self.outside / max(1, int(self.counts.sum())),
            outliers=tuple(Channel(index, float(ratios[index])) for index in order),
            outlier_count=beyond,
            histogram=Histogram(*self.calibration_range, tuple(self.counts.tolist())),
        )


def counted(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """How many values lie in each of the bins from `low` to `high`, int64; the outer bins take what lies beyond."""
    width = (high - low) / BINS or 1.0
    bins = ((values.detach().flatten() - low) / width).floor().clamp(0, BINS - 1).long()
    return torch.bincount(bins, minlength=BINS).cpu()


@torch.no_grad()
def watch_inputs(
    model: torch.nn.Module,
    op_names: Sequence[str],
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    on_forward: Callable[[], None] = lambda: None,
) -> dict[str, Inputs]:
    """The inputs of ops on all calibration batches and on held-out ones, by one forward of each batch.

    Args:
        model: FP32, eval mode, on its device.
        on_forward: called after each forward.
    """
    found = {name: Inputs(name) for name in op_names}
    device = next(model.parameters()).device
    for batches, step in ((calibration, Inputs.calibrate), (heldout, Inputs.observe)):
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            image = image_positions(batch)
            image = None if image is None else image.to(device)
            with hooked(model, {name: partial(step, of, image=image) for name, of in found.items()}):
                model(**on_device)
            on_forward()
    return {name: of for name, of in found.items() if of.low.numel() and of.largest.numel()}


@contextmanager
def hooked(model: torch.nn.Module, watch: Mapping[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """Within this context, each named module hands its input to its function."""

    def hook(see: Callable[[torch.Tensor], None]) -> Any:
        return lambda module, args: see(args[0].detach())

    with ExitStack() as stack:
        for name, see in watch.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook(see)).remove)
        yield


def weight_facts(weights: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> WeightFacts:
    """What the weights of a unit look like.

    Args:
        weights: {op: (rows, columns)}, all with the same columns.
    """
    weights = {name: in_fp32(weight.detach()) for name, weight in weights.items()}
    whole = torch.cat(list(weights.values()))
    shared = global_scale(weights.values()) if scheme.weights.strategy == "tensor_group" else None
    rows = {name: kurtosis(weight) for name, weight in weights.items()}
    name, of_op = max(rows.items(), key=lambda item: float(item[1].max()))
    low, high = (float(end) for end in whole.aminmax())
    clipped = sum(clipped_values(weight, scheme, shared) for weight in weights.values())
    return WeightFacts(
        kurtosis=float(kurtosis(whole.flatten())),
        worst_kurtosis=float(of_op.max()),
        worst_op=name,
        worst_row=int(of_op.argmax()),
        clipped=clipped / whole.numel(),
        histogram=Histogram(low, high, tuple(counted(whole, low, high).tolist())),
    )


def kurtosis(values: torch.Tensor) -> torch.Tensor:
    """The excess kurtosis over the last dimension, float64; 0 for a normal distribution, and where all are equal."""
    centred = values.double() - values.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    fourth = centred.pow(4).mean(-1)
    return torch.where(variance > 0, fourth / variance.square().clamp(min=torch.finfo(torch.float64).tiny) - 3, 0.0)


def clipped_values(weight: torch.Tensor, scheme: QuantizationScheme, shared: torch.Tensor | None) -> int:
    """How many values of a weight lie beyond the largest or below the least value that their scale can represent."""
    args = scheme.weights
    parameters = weight_parameters(weight, args, shared)
    beyond = 2 * weight.abs().max()
    ends = (quantized_weight(torch.full_like(weight, end), args, parameters) for end in (-float(beyond), float(beyond)))
    low, high = ends
    return int(((weight < low) | (weight > high)).sum())
