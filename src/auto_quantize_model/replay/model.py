"""Replay: one model whose planned ops are switched between FP32 and INT8 in place, run again from where it changes.

In: an FP32 model, INC's plan of it, and one batch at a time. Out: the output at the measured op for any set of ops in
INT8, the same bits that INC 2.6 would measure on the CPU. Nothing is prepared, converted or copied per op, and INC is
not imported: the plan is all it takes.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from auto_quantize_model.files import InputError
from auto_quantize_model.replay.ops import SITES, Site, why_not
from auto_quantize_model.schemes.inc_int8 import require_formula

CACHE_BYTES = 2 << 30  # of block outputs; what does not fit is computed again
Batch = dict[str, torch.Tensor]


def refusals(model: torch.nn.Module, ops: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The ops of a plan that no site reproduces exactly, each with the reason."""
    modules = dict(model.named_modules())
    found = {op["op_name"]: why_not(modules[op["op_name"]], op) for op in ops}
    return {name: reason for name, reason in found.items() if reason}


def require_replayable(model: torch.nn.Module, ops: Sequence[dict[str, Any]]) -> None:
    """Refuse a plan with an op that no site reproduces exactly.

    Raises:
        InputError: naming the first such op.
    """
    if refused := refusals(model, ops):
        name, reason = next(iter(refused.items()))
        raise InputError(
            f"{len(refused)} of {len(ops)} ops cannot be replayed exactly, first {name}: {reason}; set"
            " sensitivity.engine to inc or auto, or keep them in FP32 with sensitivity.op_name_dict"
        )


def block_of(model: torch.nn.Module, op_name: str) -> str:
    """The part of the model whose output is kept for an op: its repeated block, or the op itself outside of any.

    A repeated block is an element of a `ModuleList`, the outermost where they nest.
    """
    parent, parts = model, op_name.split(".")
    for depth, part in enumerate(parts):
        if isinstance(parent, torch.nn.ModuleList):
            return ".".join(parts[: depth + 1])
        parent = getattr(parent, part)
    return op_name


class OtherOrder(InputError):
    """A model ran its blocks in another order than in the calibration, so kept outputs would be wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} where the calibration ran otherwise: the model chooses its blocks by its values")


class Replay:
    """A model under replay; a context manager, so that the model is as before afterwards.

    `calibrate(batch)` runs the model in FP32 once: it sets every op's scales, records in which order the blocks run
    and keeps their outputs. With several batches the scales are of all of them, and `take_up` goes over to another
    batch without touching the scales. `run(int8)` then gives the measured output with exactly the ops of `int8` in
    INT8. Blocks that ran before the first op whose state differs from the run before return what they returned then:
    the same tensors, so nothing is approximated. Going through the ops from the last to the first therefore runs each
    time only what follows the op.

    Attributes:
        order: the ops that ran, in the order of their first execution.
        executions: how often each op ran in FP32 on the batch.
        cached_bytes: what the kept outputs take, at most `cache_bytes`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ops: Sequence[dict[str, Any]],
        measured_op: str,
        call: Callable[[], Any] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Take over the forwards of the planned ops and of their blocks.

        Args:
            model: FP32, in eval mode, on its device.
            ops: entries of the plan (`op_name`, `op_type`, `pattern`, `activation`, `weight`).
            measured_op: the module at whose output the error is measured.
            call: runs the model; by default `model(**batch)` on what `calibrate` was given.
            cache_bytes: bound of the memory for kept outputs.

        Raises:
            InputError: an op that no site reproduces, or a device on which INC's arithmetic cannot be repeated.
        """
        require_replayable(model, ops)
        self.device = next(model.parameters()).device
        require_formula(self.device)
        self.call = call or (lambda: model(**self.batch))
        self.cache_bytes = cache_bytes
        modules = dict(model.named_modules())
        self.sites: dict[str, Site] = {}
        for op in ops:
            self.sites[op["op_name"]] = SITES[op["op_type"]][1](op["op_name"], modules[op["op_name"]], op)
        self.blocks = {name: block_of(model, name) for name in self.sites}
        self._taken: list[tuple[torch.nn.Module, Any]] = []
        for name, site in self.sites.items():
            self._take_over(modules[name], site)
        for block in dict.fromkeys(self.blocks.values()):
            self._take_over(modules[block], functools.partial(self._visit, block, modules[block].forward))
        self._hook = modules[measured_op].register_forward_hook(self._measure)
        self._forget()

    def _take_over(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._taken.append((module, vars(module).get("forward")))
        module.forward = forward

    def __enter__(self) -> "Replay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give every module its own forward back."""
        self._hook.remove()
        for module, before in reversed(self._taken):
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._forget()

    def _forget(self) -> None:
        self.batch: Batch = {}
        self.sequence: list[str] = []  # the blocks in the order in which they ran
        self.outputs: list[Any] = []  # what each of them returned in the run before, as far as it is kept
        self.recording = self.running = False
        self.state: frozenset[str] | None = None
        self.measured = torch.empty(0)
        self.order: list[str] = []
        self.executions: dict[str, int] = {}
        self.cached_bytes = 0

    def calibrate(self, *batches: Batch) -> torch.Tensor:
        """Run `batches` in FP32, calibrate every op on all of them, and start replaying the last.

        Returns:
            The FP32 output at the measured op, of the last batch.

        Raises:
            InputError: an op's input or output, or that output, is not finite, or the measured op did not run.
        """
        for site in self.sites.values():
            site.observe()
        for batch in batches:
            output = self.take_up(batch)
        for site in self.sites.values():
            site.calibrated()
        self.calibrated = frozenset(name for name, site in self.sites.items() if site.executions)
        return output

    def take_up(self, batch: Batch) -> torch.Tensor:
        """Run another batch in FP32 and start replaying it, with the scales of the calibration.

        An op that did not run in the calibration has no scales and stays in FP32.

        Returns:
            The FP32 output at the measured op.

        Raises:
            InputError: that output is not finite, or the measured op did not run.
        """
        self._forget()
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        before = {name: site.executions for name, site in self.sites.items()}
        self.recording = True
        self._forward(frozenset())
        self.recording = False
        self.executions = {name: site.executions - before[name] for name, site in self.sites.items()}
        self.first_visit = {name: self.sequence.index(self.blocks[name]) for name in self.order}
        if not self.measured.numel() or not self.measured.isfinite().all():
            raise InputError("the FP32 output at the measured op is missing or not finite; check the weights")
        return self.measured

    def cost(self, name: str) -> int:
        """How many blocks run again when this op changes, or all of them for no op: a measure of the time it takes."""
        return len(self.sequence) - self.first_visit.get(name, 0)

    def run(self, int8: Collection[str]) -> torch.Tensor:
        """The output at the measured op with exactly the ops of `int8` in INT8; float32, as the op gives it.

        Raises:
            OtherOrder: the blocks ran in another order than in the calibration, so kept outputs would be wrong.
        """
        return self._forward(frozenset(int8) & self.calibrated & frozenset(self.order))

    def _forward(self, int8: frozenset[str]) -> torch.Tensor:
        self.valid = self._unchanged(int8)
        # Until this run has ended, the kept outputs are those of no state.
        self.state, self.visits = None, 0
        self._switch(int8, running=True)
        try:
            with torch.no_grad():
                self.call()
        finally:
            self._switch(frozenset(), running=False)
        if self.visits != len(self.sequence):
            raise OtherOrder(f"{self.visits} blocks ran")
        self.state = int8
        return self.measured

    def _unchanged(self, int8: frozenset[str]) -> int:
        """How many of the kept outputs are those of the state `int8` too."""
        if self.state is None:
            return 0
        return min((self.first_visit[name] for name in int8 ^ self.state), default=len(self.outputs))

    def _switch(self, int8: frozenset[str], running: bool) -> None:
        """Set every op's flag; outside of a run the model is its FP32 self."""
        self.running = running
        for name, site in self.sites.items():
            site.int8 = name in int8

    def _visit(self, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's turn: what it returned before, or a real run of it."""
        if not self.running:
            return forward(*args, **kwargs)
        index = self.visits
        self.visits += 1
        if self.recording:
            self.sequence.append(block)
            before = {name: site.executions for name, site in self.sites.items() if self.blocks[name] == block}
        elif index >= len(self.sequence) or self.sequence[index] != block:
            raise OtherOrder(f"{block} ran")
        if index < min(self.valid, len(self.outputs)):
            return _copied(self.outputs[index])
        output = forward(*args, **kwargs)
        if self.recording:
            ran = [name for name, count in before.items() if self.sites[name].executions > count]
            self.order += [name for name in ran if name not in self.order]
        self._keep(index, output)
        return output

    def _keep(self, index: int, output: Any) -> None:
        """Keep a block's output, as long as those before it are kept too and the memory allows.

        It is copied, here and when it is returned: code behind the block may write into what it gets.
        """
        if index < len(self.outputs):
            self.outputs[index] = _copied(output)
        elif index == len(self.outputs) and self.cached_bytes + _size(output) <= self.cache_bytes:
            self.outputs.append(_copied(output))
            self.cached_bytes += _size(output)

    def _measure(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.running:
            self.measured = output


def _copied(output: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, output)


def _size(output: Any) -> int:
    sizes: list[int] = []
    tree_map_only(torch.Tensor, lambda tensor: sizes.append(tensor.nbytes), output)
    return sum(sizes)
