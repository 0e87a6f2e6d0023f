"""Weights that stay as a snapshot stores them, in BF16 or F16 and memory-mapped, and that are FP32 to all who use them.

In: the safetensors of a snapshot. Out: parameters that say that they are float32. A view of one is again such a tensor.
Any other use gets FP32 values, which are made for this use alone. BF16 and F16 become FP32 without rounding, so each op
gets the bits that an FP32 model has. The operating system can drop a page of a mapped file and read it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import modeling_utils

HALVES = ("BF16", "F16")  # by the names of safetensors
aten = torch.ops.aten
# Functions that move values and change none: they run on the stored values.
MOVES = {aten.clone.default, aten.stack.default, aten.cat.default}
LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}


class Mapped(torch.Tensor):
    """A tensor of BF16 or F16 values that says that it is float32.

    torch asks `__torch_dispatch__` below autograd, so the graph of a backward pass holds this tensor and no FP32 copy.

    Attributes:
        stored: the values as the file has them.
    """

    stored: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: torch.Tensor) -> "Mapped":
        made: Mapped = torch.Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=torch.float32, device=stored.device
        )
        made.stored = stored
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Mapped({self.stored!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and func is not aten.as_strided.default:
            return tree_map_only(torch.Tensor, Mapped, func(args[0].stored, *args[1:], **kwargs))
        if func in MOVES and are_alike(args[0]):
            return Mapped(func(*tree_map_only(Mapped, lambda tensor: tensor.stored, args), **kwargs))
        if func in LOOKUPS and isinstance(args[0], Mapped):
            return func(args[0].stored, *args[1:], **kwargs).float()
        if func._schema.is_mutable and isinstance(args[0], Mapped):
            raise RuntimeError(f"{func} would write into a weight that is mapped from a file")
        buffers = [SCRATCH]

        def fp32(tensor: Mapped) -> torch.Tensor:
            return buffers.pop().filled(tensor.stored) if buffers else tensor.stored.float()

        args, kwargs = tree_map_only(Mapped, fp32, (args, kwargs))
        return func(*args, **kwargs)


def are_alike(tensors: Any) -> bool:
    """Whether one tensor or several are all mapped and stored in the same type."""
    several = tensors if isinstance(tensors, list | tuple) else [tensors]
    return all(isinstance(one, Mapped) for one in several) and len({one.stored.dtype for one in several}) == 1


class Scratch:
    """Memory for the FP32 values of one weight at a time: to ask the system for it again takes longer than to fill it.

    A function of torch that is no view returns none of its inputs' memory, so the values may go with the next use.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def filled(self, stored: torch.Tensor) -> torch.Tensor:
        """The values in FP32, in a tensor of the same strides, until the next call."""
        if not aten.is_non_overlapping_and_dense.default(stored):
            return stored.float()
        if self.memory.numel() < stored.numel():
            self.memory = torch.empty(0)  # frees the smaller one first
            self.memory = torch.empty(stored.numel(), dtype=torch.float32)
        return self.memory.as_strided(stored.shape, stored.stride()).copy_(stored)


SCRATCH = Scratch()


def in_fp32(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor in FP32, to be used several times; the weight itself if it is plain."""
    return weight.stored.float() if isinstance(weight, Mapped) else weight


class Opened:
    """A safetensors file whose matrices in BF16 and F16 are read as mapped tensors."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.file = OPEN(*args, **options)

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


LOADING: Any = modeling_utils
OPEN = LOADING.safe_open


@contextmanager
def mapped_weights() -> Iterator[None]:
    """Within this context, transformers loads matrices in BF16 and F16 as mapped tensors."""
    LOADING.safe_open = Opened
    try:
        yield
    finally:
        LOADING.safe_open = OPEN
