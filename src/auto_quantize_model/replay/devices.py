"""The INT8 outputs of another device, compared with the CPU's, op by op, on the same input and with the same scales."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import any_algorithm
from auto_quantize_model.models.mapped import moved
from auto_quantize_model.records import Op, Plan, Scales
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.replay.ops import Site


def check_sites(
    model: torch.nn.Module,
    batch: Batch,
    plan: Plan,
    names: Sequence[str],
    device: torch.device,
    scales: Scales | None = None,
) -> None:
    """Compare each named op's INT8 output on `device` with the CPU's for the same input, bit for bit.

    Args:
        model: FP32, eval mode, on the CPU; left as it was.
        batch: gives the ops their inputs.
        plan: the plan of the model.
        names: the ops to compare; each runs on `batch`.
        device: the other device.
        scales: of the ops; None calibrates on `batch`.

    Raises:
        InputError: the message names the first op that differs, and the number of its values that differ.
    """
    with any_algorithm():
        with Replay(model, plan.ops, plan.measured_op) as replay:
            if scales is None:
                scales = replay.calibrate(batch)
            replay.set_scales(scales)
            inputs = op_inputs(replay, batch, names)
        # Only after the replay, so that copies of the modules do not carry its forwards, and with them the model.
        found = site_differences(replay.sites, scales, inputs, plan.ops, device)
    for name, (differing, values) in found.items():
        if differing:
            raise InputError(
                f"audit: {differing} of {values} INT8 outputs of {name} differ between {device.type} and CPU on"
                " the same input. Do not use this capture, and report the difference with the plan"
            )


def op_inputs(replay: Replay, batch: Batch, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The input of each named op when `replay` runs the batch in FP32: {op_name: input}."""
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            handle = replay.sites[name].module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: args[0]})
            )
            stack.callback(handle.remove)
        replay.begin(batch)
    return inputs


def site_differences(
    sites: Mapping[str, Site],
    scales: Scales,
    inputs: Mapping[str, torch.Tensor],
    ops: Sequence[Op],
    device: torch.device,
) -> dict[str, tuple[int, int]]:
    """How many INT8 outputs of each op on `device` differ from the CPU's: {op_name: (differing, values)}.

    Args:
        sites: on the CPU, with these scales; their modules have their own forwards again.
        scales: of the ops.
        inputs: the input of each op to compare, on the CPU.
        ops: the plan's ops.
        device: the other device; it holds one op at a time.
    """
    by_name = {op.op_name: op for op in ops}
    found = {}
    for name, x in inputs.items():
        there = type(sites[name])(moved(sites[name].module, device), by_name[name])
        there.set_scales(scales[name])
        with torch.no_grad():
            expected, output = sites[name].quantized(x), there.quantized(x.to(device)).cpu()
        found[name] = int((output != expected).sum()), output.numel()
    return found
