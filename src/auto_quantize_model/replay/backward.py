"""Backward passes through a model under replay, block by block, with the gradient at the output of every op.

In: a replay with a batch, and directions at the measured op's output. Out: for each op and scheme, the product of that
gradient with the error that the scheme makes at each row of the op's output. A row is a token or an image patch. A
first forward keeps the inputs of each block alone.
The backward runs one block again at a time, so the graph of one block is the most that memory holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from auto_quantize_model.files import InputError
from auto_quantize_model.models.mapped import held
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.replay.ops import Site
from auto_quantize_model.schemes.scheme import UNQUANTIZED, Assignment

Direction = Callable[[torch.Tensor, int], torch.Tensor]  # (measured output, index) -> gradient of the same shape
Gradients = Sequence[torch.Tensor | None]  # of one tensor, one for each direction


@dataclass
class Seen:
    """One execution of an op in the block that runs again.

    Attributes:
        output: of the op, as a leaf or with its history.
        errors: float32 (schemes, *shape of the output).
        products: float32 (schemes, directions, samples, rows), filled direction by direction; None without a gradient.
    """

    name: str
    output: torch.Tensor
    errors: torch.Tensor
    products: torch.Tensor | None = None


@dataclass
class Visit:
    """One execution of a block.

    Attributes:
        forward: the block's own.
        inputs: args and kwargs, flat, without history.
        spec: how `inputs` make args and kwargs.
        incoming: the inputs that earlier blocks have a part in, by index, with their history.
        outputs: the block's outputs, as leaves of the graph that follows.
    """

    block: str
    forward: Callable[..., Any]
    inputs: list[Any]
    spec: TreeSpec
    incoming: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]


class Backward:
    """The backward passes of one batch.

    Args:
        replay: with a batch begun.
        schemes: {op_name: schemes whose errors count}; `unquantized` is one of them where `state` quantizes the op.
        count: how many directions.
        state: of the model, in schemes of compressed-tensors that are ready. Errors are those against the op's output
            in this state.
    """

    def __init__(
        self,
        replay: Replay,
        schemes: Mapping[str, Sequence[str]],
        count: int,
        state: Assignment = MappingProxyType({}),
    ) -> None:
        self.replay, self.schemes, self.count, self.state = replay, schemes, count, state
        self.samples = replay.measured.shape[0]
        self.recording = False
        self.visits: list[Visit] = []
        self.seen: list[Seen] = []  # of the block that runs again
        self.gradients: dict[int, list[torch.Tensor | None]] = {}  # of leaves, by their id
        self.products: dict[str, list[torch.Tensor]] = {}  # of each execution

    def run(self, direction: Direction, on_block: Callable[[int, int], None]) -> dict[str, torch.Tensor]:
        """The products of gradients and errors.

        Args:
            direction: gives the gradient at the measured op's output.
            on_block: called after each block with the number done and the total.

        Returns:
            {op_name: float32 (schemes, directions, samples, rows)}, with the rows of all executions. Where an op's
            output does not keep samples apart, as in a vision tower, one sample has all rows. An op that has no part in
            the output is absent.

        Raises:
            InputError: the measured op runs inside of a block.
        """
        with frozen(self.replay.model), self.replay.watched(self.visit, self.watch):
            with torch.enable_grad():
                self.replay.call()
            last = self._measured()
            for done, visit in enumerate(reversed(self.visits), start=1):
                gradients = [self.gradients.pop(id(leaf), None) for leaf in visit.outputs]
                if visit is last or any(gradients):
                    with held():
                        self._back(visit, gradients, direction if visit is last else None)
                on_block(done, len(self.visits))
                visit.inputs, visit.incoming, visit.outputs = [], {}, []
        return {name: joined(executions) for name, executions in self.products.items()}

    def _measured(self) -> Visit:
        found = [visit for visit in self.visits if visit.block == self.replay.measured_op]
        if not found:
            raise InputError(
                f"{self.replay.measured_op}, where errors are measured, is part of a larger block, so nothing can be"
                " estimated; set sensitivity.exact to all"
            )
        return found[-1]

    def visit(self, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block without a graph, and start the graph of what follows at its outputs."""
        flat, spec = tree_flatten((args, kwargs))
        incoming = {index: given for index, given in enumerate(flat) if _has_history(given)}
        # Copied, because code behind a block may write into its inputs and outputs.
        inputs = [given.detach().clone() if index in incoming else given for index, given in enumerate(flat)]
        args, kwargs = tree_unflatten(inputs, spec)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        leaves: list[torch.Tensor] = []

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            leaves.append(tensor.detach().clone().requires_grad_())
            return leaves[-1].clone()

        self.visits.append(Visit(block, forward, inputs, spec, incoming, leaves))
        return tree_map_only(torch.Tensor, cut, output)

    def watch(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Keep an op's output in the state, and the errors that other schemes make there."""
        unquantized = output
        if scheme := self.state.get(site.name):
            output = site.differentiable(scheme, x)
        if not self.recording or not self.schemes.get(site.name):
            return output
        with torch.no_grad():
            schemes = self.schemes[site.name]
            errors = output.new_empty(len(schemes), *output.shape)
            for error, scheme in zip(errors, schemes, strict=True):
                other = unquantized if scheme == UNQUANTIZED else site.in_scheme(scheme, x)
                torch.sub(other, output, out=error)
        kept = output if output.requires_grad else output.detach().requires_grad_()
        self.seen.append(Seen(site.name, kept, errors))
        return kept.clone()  # code behind the op may write into its output

    def _back(self, visit: Visit, gradients: Sequence[Any], direction: Direction | None) -> None:
        """Run one block again with its graph, and go back through it once for each direction."""
        fresh = {index: visit.inputs[index].requires_grad_() for index in visit.incoming}
        args, kwargs = tree_unflatten(visit.inputs, visit.spec)
        self.seen, self.recording = [], True
        with torch.enable_grad():
            output = visit.forward(*args, **kwargs)
        self.recording = False
        outputs = [tensor for tensor in tree_flatten(output)[0] if _is_floating(tensor)]
        pairs = [(out, gradient) for out, gradient in zip(outputs, gradients, strict=True) if gradient or direction]
        heads = [out for out, _ in pairs if out.requires_grad]
        targets = [*(seen.output for seen in self.seen), *fresh.values()]
        if not heads or not targets:
            return
        into: list[list[torch.Tensor | None]] = [[] for _ in fresh]
        for index in range(self.count):
            ends = [
                direction(visit.outputs[0].detach(), index) if direction else gradient[index]
                for out, gradient in pairs
                if out.requires_grad
            ]
            found = torch.autograd.grad(heads, targets, ends, retain_graph=index + 1 < self.count, allow_unused=True)
            for seen, gradient in zip(self.seen, found, strict=False):
                self._add(seen, index, gradient)
            for known, gradient in zip(into, found[len(self.seen) :], strict=True):
                known.append(gradient)
        for seen in self.seen:
            if seen.products is not None:
                self.products.setdefault(seen.name, []).append(seen.products)
        self.seen = []
        self._propagate(list(visit.incoming.values()), into)

    def _add(self, seen: Seen, index: int, gradient: torch.Tensor | None) -> None:
        """Set the products of one execution of an op in one direction."""
        if gradient is None:
            return
        apart = gradient.ndim > 2 and gradient.shape[0] == self.samples
        shape = (self.samples if apart else 1, -1, gradient.shape[-1])
        products = torch.stack([(error * gradient).reshape(shape).sum(-1) for error in seen.errors])
        if seen.products is None:
            seen.products = products.new_zeros(len(products), self.count, *products.shape[1:])
        seen.products[:, index] = products

    def _propagate(self, incoming: list[torch.Tensor], into: Sequence[Gradients]) -> None:
        """Take gradients at a block's inputs back to the outputs of earlier blocks, through what lies between."""
        leaves = leaves_of(incoming)
        for index in range(self.count):
            known = [(at, of[index]) for at, of in zip(incoming, into, strict=True) if of[index] is not None]
            if not known:
                return
            tensors, ends = zip(*known, strict=True)
            found = torch.autograd.grad(tensors, leaves, ends, retain_graph=True, allow_unused=True)
            for leaf, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    so_far = self.gradients.setdefault(id(leaf), [None] * self.count)
                    before = so_far[index]
                    so_far[index] = gradient if before is None else before + gradient


def joined(executions: Sequence[torch.Tensor]) -> torch.Tensor:
    """The products of an op's executions, with the rows of all."""
    if len({products.shape[-2] for products in executions}) > 1:  # some keep samples apart, and others do not
        executions = [products.flatten(-2).unsqueeze(-2) for products in executions]
    return torch.cat(list(executions), -1)


def leaves_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves of a graph that tensors were computed from."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    left = [tensor.grad_fn for tensor in tensors]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        left.extend(following for following, _ in node.next_functions)
    return list(found.values())


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """A model whose weights take no gradients and which keeps no cache of keys and values.

    A block that runs again would add its keys and values to the cache a second time.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for parameter in trained:
        parameter.requires_grad_(False)
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        for config in cached:
            config.use_cache = True


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _has_history(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
