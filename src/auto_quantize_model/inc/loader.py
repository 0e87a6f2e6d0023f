"""Batches in the form that INC takes."""

from collections.abc import Iterator, Sequence

from auto_quantize_model.models.sample import samples_in
from auto_quantize_model.replay.model import Batch


class CalibrationLoader:
    """Batches as INC takes them: `(inputs, None)`, iterable many times, with the `batch_size` that INC asks for."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.batch_size = samples_in(batches[0])

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        return ((batch, None) for batch in self.batches)
