"""Replay: one model whose ops switch between schemes in place, and which runs again only from the first changed op.

In: an FP32 model, its ops, scales, and one batch at a time. Out: the output at the measured op for any assignment, with
the bits that INC 2.6 would give on the CPU. Nothing is prepared, converted or copied per op. INC is not imported.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import LIMITS
from auto_quantize_model.models.experts import RoutedExperts, StackedLinear
from auto_quantize_model.models.mapped import Mapped, held
from auto_quantize_model.records import Op, Scales
from auto_quantize_model.replay.forward import Forward, bytes_held_by
from auto_quantize_model.replay.ops import SITES, Site, refusal
from auto_quantize_model.schemes.inc_int8 import require_formula
from auto_quantize_model.schemes.scheme import Assignment

if TYPE_CHECKING:  # the library that it imports is needed for its own schemes alone
    from auto_quantize_model.replay.served import Norm

Batch = dict[str, torch.Tensor]
State = frozenset[tuple[str, str]]  # the items of an assignment
TOGETHER = 16  # states that advance together where weights stay in their files
AROUND = 2  # times what a block gets, for tensors that the code around the blocks holds


def refusals(model: torch.nn.Module, ops: Sequence[Op]) -> dict[str, str]:
    """The ops of a plan that no site reproduces exactly, each with the reason."""
    modules = dict(model.named_modules())
    found = {op.op_name: refusal(modules[op.op_name], op) for op in ops}
    return {name: reason for name, reason in found.items() if reason}


def require_replayable(model: torch.nn.Module, ops: Sequence[Op]) -> None:
    """Refuse a plan with an op that no site reproduces exactly.

    Raises:
        InputError: the message names the first such op.
    """
    if refused := refusals(model, ops):
        name, reason = next(iter(refused.items()))
        raise InputError(
            f"{len(refused)} of {len(ops)} ops cannot be replayed exactly, first {name}: {reason}; set"
            " sensitivity.engine to inc or auto, or keep them in FP32 with sensitivity.op_name_dict"
        )


def block_of(model: torch.nn.Module, op_name: str) -> str:
    """The part of the model whose output is kept for an op: its repeated block, or the op itself outside of any block.

    A repeated block is an element of a `ModuleList`, the outermost where they nest. A container such as a `ModuleDict`
    has no forward, so no block is a container.
    """
    parent, parts = model, op_name.split(".")
    for depth, part in enumerate(parts):
        child = getattr(parent, part)
        if isinstance(parent, torch.nn.ModuleList) and type(child).forward is not torch.nn.Module.forward:
            return ".".join(parts[: depth + 1])
        parent = child
    return op_name


def goes_along(model: torch.nn.Module, norm: str, op_name: str) -> bool:
    """Whether a norm runs whenever the op after it runs: in the op's block, or outside of any block."""
    return block_of(model, norm) in (norm, block_of(model, op_name))


class OtherOrder(InputError):
    """A model ran its blocks in another order than in the calibration, so kept outputs would be wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, unlike in the calibration: the model chooses its blocks by its values")


class Replay:
    """A model under replay. As a context manager, it leaves the model as it was.

    `calibrate(*batches)` runs the batches in FP32 and returns the scales that their observers find; `set_scales` sets
    scales. `begin(batch)` runs one batch in FP32, records the order of the blocks, and keeps their outputs.
    `run(assignment)` then returns the measured output with exactly the ops of the assignment quantized. Prefix reuse:
    outputs of blocks before the first changed op come from the previous run. They are the same tensors, so nothing is
    approximated. Going through the ops from the last to the first runs each time only the blocks from the op on.
    `run_each(assignments)` runs many states. Where weights stay in their files, some of the states advance together.

    Attributes:
        order: the ops that ran, in the order of their first execution.
        first_visit: {op_name: when its block ran first}, for ops that can run on the batch.
        executions: how often each op ran in FP32 on the batch.
        cached_bytes: the size of the kept outputs, at most `cache_bytes`.
        waiting_bytes: the most that a block of the batch gets, with the keys and values of the blocks before it.
        together: how many states advance together in `run_each`, if `cache_bytes` has room for them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ops: Sequence[Op],
        measured_op: str,
        call: Callable[[], Any] | None = None,
        cache_bytes: int | None = None,
        schemes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Replace the forwards of the planned ops and of their blocks.

        Args:
            model: FP32, in eval mode, on its device.
            ops: the plan's ops.
            measured_op: the module at whose output the error is measured.
            call: runs the model; by default `model(**batch)` on the batch that was begun.
            cache_bytes: the maximum memory for kept outputs; None takes the limit of this process.
            schemes: the schemes of compressed-tensors that ops may have, as `replay.by_name.schemes_of` returns them.

        Raises:
            InputError: no site reproduces an op, or INC's arithmetic cannot be repeated on the device.
        """
        require_replayable(model, ops)
        self.model, self.measured_op = model, measured_op
        self.device = next(model.parameters()).device
        require_formula(self.device)
        self.call = call or (lambda: model(**self.batch))
        self.cache_bytes = LIMITS.outputs if cache_bytes is None else cache_bytes
        modules = dict(model.named_modules())
        self.sites: dict[str, Site] = {}
        for op in ops:
            self.sites[op.op_name] = SITES[op.op_type][1](modules[op.op_name], op)
        self.norms: dict[tuple[str, str], Norm] = {}  # by scheme and name
        self._serve(ops, modules, schemes)
        self.blocks = {name: block_of(model, name) for name in self.sites}
        self.experts = [module for module in modules.values() if isinstance(module, RoutedExperts)]
        self._taken: list[tuple[torch.nn.Module, Any]] = []
        for name, site in self.sites.items():
            self._take_over(modules[name], site)
        for block in dict.fromkeys(self.blocks.values()):
            self._take_over(modules[block], functools.partial(self._visit, block, modules[block].forward))
        self._hook = modules[measured_op].register_forward_hook(self._measure)
        self.together = TOGETHER if any(isinstance(weight, Mapped) for weight in model.parameters()) else 1
        self._forget()

    def _serve(self, ops: Sequence[Op], modules: Mapping[str, Any], schemes: Mapping[str, Any]) -> None:
        """Give each op its schemes of compressed-tensors."""
        if not schemes:
            return
        from auto_quantize_model.models.checkpoint import Checkpoint
        from auto_quantize_model.replay.served import Kept, LastInput, Norm, Served, ServedExperts, Stored

        kept, last = Kept(), {name: LastInput() for name in schemes}
        units: dict[str, list[torch.Tensor]] = {}
        for op in ops:
            units.setdefault(op.matrix, []).append(modules[op.op_name].weight)
        checkpoints = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, Checkpoint)}
        for scheme, checkpoint in checkpoints.items():
            for norm in checkpoint.changed:
                self.norms[scheme, norm] = Norm(modules[norm], checkpoint.norm_parameters(norm))
        for op in ops:
            name, module = op.op_name, modules[op.op_name]
            for scheme in (scheme for scheme in op.schemes if scheme in schemes):
                served: Served | ServedExperts | Stored
                if scheme in checkpoints:
                    before = self.norms.get((scheme, checkpoints[scheme].norms.get(name, "")))
                    served = Stored(module, checkpoints[scheme], name, kept, before)
                elif isinstance(module, StackedLinear):
                    served = ServedExperts(module, schemes[scheme], kept, last[scheme])
                else:
                    served = Served(module, schemes[scheme], units[op.matrix], kept, last[scheme])
                self.sites[name].served[scheme] = served

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
        for norm in self.norms.values():
            norm.hook.remove()
        for module, before in reversed(self._taken):
            _given_back(module, before)
        self._forget()

    def _forget(self) -> None:
        self.visitor: Callable[..., Any] | None = None
        self.batch: Batch = {}
        self.sequence: list[str] = []  # the blocks in the order in which they ran
        self.outputs: list[Any] = []  # the output of each block in the previous run, as far as it is kept
        self.recording = False
        self.now: Forward | None = None  # the forward that runs
        self.state: State | None = None  # to which the kept outputs belong
        self.base: Any = None  # what routers and norms remember of that state
        self.measured = torch.empty(0)
        self.order: list[str] = []
        self.executions: dict[str, int] = {}
        self.inside = dict.fromkeys(self.sites, 0)  # how often each op ran in its own block
        self.cached_bytes = self.waiting_bytes = 0

    def calibrate(self, *batches: Batch, on_batch: Callable[[], None] = lambda: None) -> Scales:
        """Run `batches` in FP32, and set the scales that the plan's observers find on all of them.

        `on_batch` is called after each batch.

        Returns:
            The scales of every op.

        Raises:
            InputError: an op's input or output, or the output at the measured op, is not finite, or the measured op
                did not run.
        """
        for site in self.sites.values():
            site.observe()
        for batch in batches:
            self.begin(batch)
            on_batch()
        scales = {name: site.observed() for name, site in self.sites.items()}
        self.set_scales(scales)
        return scales

    def set_scales(self, scales: Scales, of_all: Scales | None = None) -> None:
        """Use these scales from now on; an op without an entry stays in FP32.

        Args:
            scales: for `inc_int8`.
            of_all: whose input ranges the schemes of compressed-tensors take; None takes those of `scales`.
        """
        for name, site in self.sites.items():
            site.set_scales(scales.get(name))
            for served in site.served.values():
                served.set_range((of_all or scales).get(name))
        if self.state:
            self.state = None  # the kept outputs of quantized ops belong to other scales

    def begin(self, batch: Batch) -> torch.Tensor:
        """Run another batch in FP32 and start replaying it; scales stay as they are.

        Returns:
            The FP32 output at the measured op.

        Raises:
            InputError: the output is not finite, the measured op did not run, or an op runs outside of its block.
        """
        self._forget()
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        before = {name: site.executions for name, site in self.sites.items()}
        self.recording = True
        self.measured = self._forward(frozenset())
        self.recording = False
        self.executions = {name: site.executions - before[name] for name, site in self.sites.items()}
        for name, count in self.executions.items():
            if count != self.inside[name]:
                raise InputError(
                    f"{name} runs outside of {self.blocks[name]}, so the replay cannot know when its input changes; set"
                    " sensitivity.engine to inc"
                )
        first = {block: index for index, block in reversed([*enumerate(self.sequence)])}
        # An op that did not run can do so in another state, where a router in its block chooses the op.
        self.first_visit = {name: first[block] for name, block in self.blocks.items() if block in first}
        self.routing = self.routed()
        if not self.measured.numel() or not self.measured.isfinite().all():
            raise InputError("the FP32 output at the measured op is missing or not finite; check the weights")
        return self.measured

    def cost(self, name: str) -> int:
        """How many blocks run again when this op changes, or the number of all blocks for no op: a measure of time."""
        return len(self.sequence) - self.first_visit.get(name, 0)

    def run(self, assignment: Assignment) -> torch.Tensor:
        """The output at the measured op with exactly the ops of `assignment` quantized; float32, as the op returns it.

        An op that has no scales, or whose block does not run on the batch, stays in FP32.

        Raises:
            InputError: an op does not have its scheme.
            OtherOrder: the blocks ran in another order than when the batch was begun, so kept outputs would be wrong.
        """
        return self._forward(self._state(assignment))

    def run_each(self, assignments: Sequence[Assignment]) -> Iterator[torch.Tensor]:
        """As `run` for one assignment after the other.

        Where weights stay in their files, some states advance together, block by block. So the weights of a block are
        read, and become FP32, once for these states. Each state has the bits that it has alone.

        Raises:
            InputError, OtherOrder: as `run` says.
        """
        states = [self._state(assignment) for assignment in assignments]
        room = self.cache_bytes - self.cached_bytes
        together = min(self.together, max(1, room // max(1, AROUND * self.waiting_bytes)))
        for start in range(0, len(states), together):
            yield from self._together(states[start : start + together])

    def _state(self, assignment: Assignment) -> State:
        """The ops of an assignment that the batch runs and that have their scales."""
        return frozenset(
            (name, scheme)
            for name, scheme in assignment.items()
            if self.sites[name].ready(scheme) and name in self.first_visit
        )

    def routed(self) -> list[torch.Tensor]:
        """What each router chose in the last run: the experts of each token, (tokens, chosen), sorted.

        Blocks whose kept output was taken have not run again; their routers chose the same in the run before.
        """
        return [experts.chosen.sort(-1).values for experts in self.experts if experts.chosen is not None]

    def routing_agreement(self) -> float | None:
        """The share of the routers' choices in FP32 that the last run made too; None without a router."""
        if not self.routing:
            return None
        kept = [
            (before.unsqueeze(-1) == now.unsqueeze(-2)).any(-1)
            for before, now in zip(self.routing, self.routed(), strict=True)
        ]
        return float(torch.cat([same.flatten() for same in kept]).double().mean())

    def _forward(self, state: State) -> torch.Tensor:
        """Run one state to its end, and keep the outputs of its blocks."""
        forward = Forward(state, self._unchanged(state, self.state))
        # Until this run has ended, the kept outputs belong to no state.
        self.state = None
        with self._running(forward):
            if self.base:  # the routers of blocks that do not run again have chosen as in the state of the kept outputs
                self._recall(self.base)
            self.call()
        output = self._ended(forward)
        self.state, self.base = state, self._remembered()  # norms remember nothing outside of a run
        return output

    def _together(self, states: Sequence[State]) -> Iterator[torch.Tensor]:
        """Run states block by block, each from its first block that differs from the state of the kept outputs."""
        first, others = states[0], states[1:]
        by_kept = sum(self._unchanged(state, self.state) for state in others)
        if not others or sum(self._unchanged(state, first) for state in others) > by_kept:
            yield self._forward(first)
            states = others
        forwards = [Forward(state, self._unchanged(state, self.state)) for state in states]
        for forward in forwards:
            forward.remembered = self.base
            self._resume(forward)
        for index in range(len(self.sequence)):
            with held():
                for forward in list(forwards):
                    if forward.visits == index + 1 and not forward.ended:
                        self._resume(forward)
                    while forwards and forwards[0].ended:
                        yield self._ended(forwards.pop(0))

    def _resume(self, forward: Forward) -> None:
        """Let a forward go on until it comes to a block that it runs, or to its end."""
        with self._running(forward):
            self._recall(forward.remembered)
            forward.go_on(self.call)
            forward.remembered = self._remembered()

    def _ended(self, forward: Forward) -> torch.Tensor:
        """The output of a forward that has ended."""
        if forward.visits != len(self.sequence):
            raise OtherOrder(f"{forward.visits} blocks ran")
        if forward.remembered:
            self._recall(forward.remembered)
        return forward.measured

    def _remembered(self) -> tuple[list[Any], list[Any]]:
        """What routers and norms remember of the forward that ran last."""
        return [experts.chosen for experts in self.experts], [norm.inputs for norm in self.norms.values()]

    def _recall(self, remembered: tuple[list[Any], list[Any]]) -> None:
        """Let routers and norms remember another forward."""
        chosen, inputs = remembered
        for experts, of_router in zip(self.experts, chosen, strict=True):
            experts.chosen = of_router
        for norm, of_norm in zip(self.norms.values(), inputs, strict=True):
            norm.inputs = of_norm

    def _unchanged(self, state: State, other: State | None) -> int:
        """How many of the kept outputs of one state are valid for another too; `other` is None for no state."""
        if other is None:
            return 0
        return min((self.first_visit[name] for name, _ in state ^ other), default=len(self.sequence))

    @contextmanager
    def _running(self, forward: Forward) -> Iterator[None]:
        """For as long as the context lasts, a forward runs in its state. Otherwise all ops of the model are in FP32."""
        self._switch(forward, dict(forward.state))
        try:
            with torch.no_grad():
                yield
        finally:
            self._switch(None, {})

    def _switch(self, forward: Forward | None, schemes: Assignment) -> None:
        """Set the forward that runs, and every op's scheme."""
        self.now = forward
        for norm in self.norms.values():
            norm.inputs = ()
        for name, site in self.sites.items():
            site.scheme = schemes.get(name)

    @contextmanager
    def watched(self, visit: Callable[..., Any], watch: Callable[..., Any]) -> Iterator[None]:
        """For as long as the context lasts, a forward in FP32 calls these functions.

        Args:
            visit: called in place of each block with its name, its own forward, and its inputs.
            watch: as `Site.watch`.
        """
        self.visitor = visit
        for site in self.sites.values():
            site.watch = watch
        head = self.model.get_submodule(self.measured_op)
        # An op that the plan leaves in FP32 has no site, so nothing calls `visit` for it.
        alone = self.measured_op not in self.sites and block_of(self.model, self.measured_op) == self.measured_op
        if alone:
            self._take_over(head, functools.partial(visit, self.measured_op, head.forward))
        try:
            yield
        finally:
            self.visitor = None
            for site in self.sites.values():
                site.watch = None
            if alone:
                _given_back(*self._taken.pop())

    def _visit(self, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, or return its kept output."""
        if self.visitor:
            return self.visitor(block, forward, *args, **kwargs)
        if self.now is None:
            return forward(*args, **kwargs)
        now, index = self.now, self.now.visits
        now.visits += 1
        if self.recording:
            self.sequence.append(block)
            before = {name: site.executions for name, site in self.sites.items() if self.blocks[name] == block}
            self.waiting_bytes = max(self.waiting_bytes, bytes_held_by((args, kwargs)))
        elif index >= len(self.sequence) or self.sequence[index] != block:
            raise OtherOrder(f"{block} ran")
        if index < min(now.valid, len(self.outputs)):
            return _copied(self.outputs[index])
        now.wait()
        output = forward(*args, **kwargs)
        if self.recording:
            for name, count in before.items():
                self.inside[name] += self.sites[name].executions - count
                if self.inside[name] and name not in self.order:
                    self.order.append(name)
        if not now.waits:
            self._keep(index, output)
        return output

    def _keep(self, index: int, output: Any) -> None:
        """Keep a block's output, if all outputs before it are kept too and the memory allows it.

        The output is copied, here and when it is returned, because code behind the block may write into it.
        """
        if index < len(self.outputs):
            self.outputs[index] = _copied(output)
        elif index == len(self.outputs) and self.cached_bytes + _size(output) <= self.cache_bytes:
            self.outputs.append(_copied(output))
            self.cached_bytes += _size(output)

    def _measure(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.now is not None:
            self.now.measured = output


def _given_back(module: torch.nn.Module, before: Any) -> None:
    """Undo a take-over of a module's forward."""
    if before is None:
        del module.forward
    else:
        module.forward = before


def _copied(output: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, output)


def _size(output: Any) -> int:
    sizes: list[int] = []
    tree_map_only(torch.Tensor, lambda tensor: sizes.append(tensor.nbytes), output)
    return sum(sizes)
