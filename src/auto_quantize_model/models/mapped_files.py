"""How transformers is made to load matrices in BF16 and F16 as mapped tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_utils

from auto_quantize_model.models.mapped import HALVES, Mapped


class Opened:
    """A safetensors file whose matrices in BF16 and F16 are read as mapped tensors."""

    def __init__(self, opened: Any) -> None:
        self.file = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def get_slice(self, name: str) -> Any:
        """A tensor that is read when it is indexed."""
        found = self.file.get_slice(name)
        matrix = len(found.get_shape()) > 1 and found.get_dtype() in HALVES
        return Slice(found) if matrix else found


class Slice:
    """A matrix of a file, which is mapped when it is indexed."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __getitem__(self, key: Any) -> Mapped:
        return Mapped(self.found[key])


@contextmanager
def mapped_weights() -> Iterator[None]:
    """Within this context, transformers loads matrices in BF16 and F16 as mapped tensors."""
    loading: Any = modeling_utils
    opening = loading.safe_open
    loading.safe_open = lambda *args, **options: Opened(opening(*args, **options))
    try:
        yield
    finally:
        loading.safe_open = opening
