"""The second reference: torch's own quantized modules in the FP32 model, for models that INC cannot convert.

In: the model, one batch, the plan, and the ops to score. Out: for each map, the value that a correct conversion by INC
would give. From the replay this module takes only the builder of the plan's observers. torch's own modules observe,
quantize and compute.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.ao.nn import intrinsic
from torch.ao.nn import quantized as torch_quantized
from torch.ao.nn.intrinsic import quantized as quantized_intrinsic
from torch.ao.quantization import QConfig

from auto_quantize_model.inc_pytorch_mse_patching import copies_sharing_parameters
from auto_quantize_model.measure.metrics import output_at, squared_error
from auto_quantize_model.records import IncInt8, Op, Plan
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.replay.ops import LINEAR_RELU
from auto_quantize_model.schemes.inc_int8 import build_observer

QUANTIZED: dict[str, Any] = {
    "Linear": torch_quantized.Linear,
    "Conv1d": torch_quantized.Conv1d,
    "Conv2d": torch_quantized.Conv2d,
    "Conv3d": torch_quantized.Conv3d,
    "Embedding": torch_quantized.Embedding,
}
Forward = Callable[[torch.Tensor], torch.Tensor]


def torch_scores(
    model: torch.nn.Module,
    batch: Batch,
    plan: Plan,
    names: Sequence[str],
    on_op: Callable[[str, str], None] = lambda label, name: None,
) -> dict[str, dict[str, float]]:
    """The error at the measured op for each map of the plan and each op of `names`: {map: {op: mse_value}}.

    Args:
        model: FP32, eval mode, on the CPU; left as it was.
        batch: calibrates, and is scored, as in INC.
        plan: with ops of the types that `QUANTIZED` knows.
        names: ops that run on `batch`.
        on_op: called with map and op before each score.
    """
    modules = dict(model.named_modules())
    planned = [op for op in plan.ops if op.inc_int8]
    with observed(modules, planned) as observers:
        reference = output_at(model, batch, plan.measured_op)
    int8 = {op.op_name: quantized(modules[op.op_name], op, observers[op.op_name]) for op in planned}
    values: dict[str, dict[str, float]] = {}
    for label in plan.maps:
        values[label] = {}
        for name in names:
            on_op(label, name)
            state = {modules[other]: int8[other] for other in state_of(label, name, list(int8))}
            with forwards_replaced(state):
                values[label][name] = squared_error(reference, output_at(model, batch, plan.measured_op))
    return values


def state_of(label: str, name: str, planned: Sequence[str]) -> Sequence[str]:
    """The ops that are INT8 where a map scores an op; `planned` are those that run, in the plan's order."""
    if label == "isolated":
        return [name]
    if label == "fallback":
        return [other for other in planned if other != name]
    return planned[: planned.index(name) + 1]


def of_inc(op: Op) -> IncInt8:
    """What INC plans for an op.

    Raises:
        ValueError: INC plans nothing for the op.
    """
    if op.inc_int8 is None:
        raise ValueError(f"INC does not plan {op.op_name}")
    return op.inc_int8


@contextmanager
def observed(modules: Mapping[str, torch.nn.Module], ops: Sequence[Op]) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Let the plan's observers see every op's input and output: {op: (of input, of output)}.

    An Embedding has no observers, because its input is ids and its output is FP32.
    """
    observers = {
        op.op_name: tuple(
            build_observer(of_inc(op).activation.observer) for _ in range(2 * (op.op_type != "Embedding"))
        )
        for op in ops
    }

    def observe(op: Op) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            seen = output.relu() if of_inc(op).pattern == LINEAR_RELU else output
            for observer, tensor in zip(observers[op.op_name], ((*args, *kwargs.values())[0], seen), strict=False):
                observer(tensor)

        return hook

    handles = [modules[op.op_name].register_forward_hook(observe(op), with_kwargs=True) for op in ops]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()


def quantized(module: torch.nn.Module, op: Op, observers: tuple[Any, ...]) -> Forward:
    """The forward of torch's quantized module for an op: FP32 or ids in, FP32 out."""
    with copies_sharing_parameters():
        plain: Any = copy.deepcopy(module)
    kind = QUANTIZED[op.op_type]
    plain.qconfig = QConfig(activation=None, weight=lambda: build_observer(of_inc(op).weight.observer))
    if of_inc(op).pattern == LINEAR_RELU:
        qconfig = plain.qconfig
        plain, kind = intrinsic.LinearReLU(plain, torch.nn.ReLU()), quantized_intrinsic.LinearReLU
        plain.qconfig = qconfig  # torch reads that of the Linear, and asks for one of both
    if not observers:
        # A module itself cannot be set as another module's `forward`: torch would register it as a child.
        rows_of: Forward = kind.from_float(plain).forward
        # torch's kernel takes ids of one or two dimensions. Each id has its own row.
        return lambda input: rows_of(input.flatten()).unflatten(0, input.shape)
    of_input, plain.activation_post_process = observers
    kernel = kind.from_float(plain)
    scale, zero_point = of_input.calculate_qparams()
    to_codes = torch_quantized.Quantize(scale, zero_point, torch.quint8)
    return lambda input: kernel(to_codes(input)).dequantize()  # named as in torch's modules


@contextmanager
def forwards_replaced(forwards: Mapping[torch.nn.Module, Forward]) -> Iterator[None]:
    """Give modules other forwards for the duration."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield
