"""Models without a head, which are measured at their last hidden state.

In: a model of transformers that returns a last hidden state and no logits. Out: the same model, in which that state
passes through a module of its own. So it has a name, whichever module computes it.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

HIDDEN_STATE = "last_hidden_state"


def with_hidden_state(model: torch.nn.Module) -> None:
    """Give the last hidden state of a model a module that returns the state as it is."""
    model.add_module(HIDDEN_STATE, torch.nn.Identity())
    model.register_forward_hook(_pass_through)


def _pass_through(model: torch.nn.Module, args: Any, output: Any) -> Any:
    output[HIDDEN_STATE] = model.get_submodule(HIDDEN_STATE)(output[HIDDEN_STATE])
    return output


def without_part(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], names: Collection[str]) -> set[str]:
    """The modules that run on a batch and have no part in the last hidden state, such as those of a pooler.

    Args:
        model: as `with_hidden_state` leaves it, its parameters frozen.
        batch: the model's keyword arguments.
        names: of the modules to look at.
    """
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in names]
    handles.append(model.get_submodule(HIDDEN_STATE).register_forward_hook(remember(HIDDEN_STATE)))
    try:
        with torch.enable_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    state = outputs.pop(HIDDEN_STATE)
    gradients = torch.autograd.grad(state.sum(), list(outputs.values()), allow_unused=True)
    return {name for name, gradient in zip(outputs, gradients, strict=True) if gradient is None}
