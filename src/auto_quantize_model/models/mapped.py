"""Weights that stay as a snapshot stores them, in BF16 or F16 and memory-mapped, and that are FP32 to all who use them.

In: the safetensors of a snapshot. Out: parameters that say that they are float32. A view of one is again such a tensor.
Any other use gets FP32 values, which are made for this use alone. BF16 and F16 become FP32 without rounding, so each op
gets the bits that an FP32 model has. The operating system can drop a page of a mapped file and read it again.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from auto_quantize_model.needs import HELD_BYTES

HALVES = ("BF16", "F16")  # by the names of safetensors
FROM_FILE = "that is mapped from a file"
aten = torch.ops.aten
# Functions that move values and change none: they run on the stored values.
MOVES = {aten.clone.default, aten.stack.default, aten.cat.default}
LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}


class Mapped(torch.Tensor):
    """A tensor of BF16 or F16 values that says that it is float32.

    torch asks `__torch_dispatch__` below autograd, so the graph of a backward pass holds this tensor and no FP32 copy.

    Attributes:
        stored: the values as the file has them.
        whole: the stored values of the weight of which this is a view.
    """

    stored: torch.Tensor
    whole: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: torch.Tensor, whole: torch.Tensor | None = None) -> "Mapped":
        made: Mapped = torch.Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=torch.float32, device=stored.device
        )
        made.stored, made.whole = stored, stored if whole is None else whole
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Mapped({self.stored!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mapped":
        """The tensor itself, because nothing can write into it: a copy of a model shares the mapped weights."""
        memo[id(self)] = self
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A saved file holds the FP32 values."""
        return in_fp32(self).__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:
        """The tensor without history."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not (isinstance(value, Mapped) and value.stored is self.stored):
            raise RuntimeError(f"the values of a weight {FROM_FILE} cannot be set")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func.is_view and func is not aten.as_strided.default:
            views = func(first.stored, *args[1:], **kwargs)
            return tree_map_only(torch.Tensor, lambda view: Mapped(view, first.whole), views)
        if func in MOVES and are_alike(first):
            return Mapped(func(*tree_map_only(Mapped, lambda tensor: tensor.stored, args), **kwargs))
        if func in LOOKUPS and isinstance(first, Mapped):
            return func(first.stored, *args[1:], **kwargs).float()
        if func._schema.is_mutable and isinstance(first, Mapped):
            raise RuntimeError(f"{func} would write into a weight {FROM_FILE}")
        buffers = [SCRATCH]

        def fp32(tensor: Mapped) -> torch.Tensor:
            if (values := held_values(tensor)) is not None:
                return values
            return buffers.pop().filled(tensor) if buffers else tensor.stored.float()

        args, kwargs = tree_map_only(Mapped, fp32, (args, kwargs))
        return func(*args, **kwargs)


def are_alike(tensors: Any) -> bool:
    """Whether one tensor or several are all mapped and stored in the same type."""
    several = tensors if isinstance(tensors, list | tuple) else [tensors]
    return all(isinstance(one, Mapped) for one in several) and len({one.stored.dtype for one in several}) == 1


class Scratch:
    """Memory for the FP32 values of one weight at a time: to ask the system for it again takes longer than to fill it.

    The output of a function has memory of its own, unless it is a view. So the values may go with the next use. Where
    the next use is of the same weight, as in states that advance together, they are there already.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)
        self.whole: torch.Tensor | None = None  # the stored weight whose values the memory has
        self.values = torch.empty(0)

    def filled(self, tensor: Mapped) -> torch.Tensor:
        """The values in FP32, in a tensor of the same strides, until the next call."""
        # All views of a whole weight share its values; a part, such as one expert's, has its own.
        part = tensor.stored.numel() < tensor.whole.numel()
        whole = tensor.stored if part else tensor.whole
        if not is_dense(whole):
            return tensor.stored.float()
        if self.whole is not whole:
            self.whole = None
            if self.memory.numel() < whole.numel():
                self.values = self.memory = torch.empty(0)  # frees the smaller one first
                self.memory = torch.empty(whole.numel(), dtype=torch.float32)
            self.values = self.memory.as_strided(whole.shape, whole.stride()).copy_(whole)
            self.whole = whole
        return as_view(self.values, tensor.stored, whole)


def as_view(values: torch.Tensor, stored: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The view of a weight's FP32 values that is where `stored` is in the stored weight."""
    return values.as_strided(stored.shape, stored.stride(), stored.storage_offset() - whole.storage_offset())


def is_dense(stored: torch.Tensor) -> bool:
    """Whether a tensor has each place of its memory once, in any order."""
    return bool(aten.is_non_overlapping_and_dense.default(stored))


SCRATCH = Scratch()
HELD: list[dict[int, torch.Tensor]] = []  # the FP32 values of whole weights, in the contexts of `held`


@contextmanager
def held() -> Iterator[None]:
    """Within this context, a weight becomes FP32 once, when it is used first: for a block that runs many times.

    That takes at most `HELD_BYTES`; weights that do not fit become FP32 at each use.
    """
    HELD.append({})
    try:
        yield
    finally:
        HELD.pop()


def held_values(weight: Mapped) -> torch.Tensor | None:
    """The FP32 values of a weight or of a view of one in a context of `held`; None where they are not held."""
    stored, whole = weight.stored, weight.whole
    if not HELD or not is_dense(whole):
        return None
    values = HELD[-1].get(id(whole))
    if values is None:
        if sum(other.nbytes for other in HELD[-1].values()) + 4 * whole.numel() > HELD_BYTES:
            return None
        values = HELD[-1][id(whole)] = whole.float()
    return as_view(values, stored, whole)


def moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A copy of a module on a device, whose own weights are plain tensors in FP32."""
    made = copy.deepcopy(module)
    for name, weight in [*made.named_parameters(recurse=False)]:
        setattr(made, name, torch.nn.Parameter(in_fp32(weight), requires_grad=False))
    return made.to(device)


def in_fp32(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor in FP32, to be used several times and not changed; a plain weight itself."""
    if not isinstance(weight, Mapped):
        return weight
    values = held_values(weight)
    return weight.stored.float() if values is None else values
