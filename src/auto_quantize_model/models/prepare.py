"""Modules that hold a Linear or an Embedding in another form, made into the plain form that INC and the replay know.

In: a model of transformers. Out: the same model, in which experts, custom Linears and scaled Embeddings hold plain
modules that share the weights. A module is changed only where its output keeps every bit on a trial input.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from auto_quantize_model.models.experts import (
    TRIAL_ROWS,
    StackedLinear,
    form_of,
    linear,
    trial_of_experts,
    with_experts,
)

INNER = "plain"  # the name of the plain module inside a module that scales or shifts
PLAIN: tuple[type[torch.nn.Module], ...] = (torch.nn.Linear, torch.nn.Embedding)
CONVOLUTIONS: tuple[type[torch.nn.Module], ...] = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
Change = Callable[[Any], None]
Trial = tuple[Any, ...]  # arguments of a forward
# What a forward raises on an input that it does not take.
OTHER_INPUT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def prepare(model: torch.nn.Module, experts: str = "each") -> dict[str, str]:
    """Make all that a model holds in another form plain, in place.

    Args:
        model: in FP32 and eval mode on the CPU, with its weights. Its experts run one after the other (`eager`).
        experts: `each` makes each matrix of an expert a Linear. `block` makes the same matrix of all experts one op.

    Returns:
        {module name: reason}, for modules of a known form that stay as they are, because their bits would change.
    """
    refused = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            changes = changes_of(module, experts)
            if changes and not any(is_changed(module, change) for change in changes):
                refused[name] = f"{type(module).__name__} uses its weight otherwise than a plain module does"
    return refused


def changes_of(module: torch.nn.Module, experts: str = "each") -> list[Change]:
    """The ways to make a module plain, the simplest first; empty where it is plain already, or of an unknown form."""
    if INNER in module._modules:
        return []
    if isinstance(module, Conv1D):
        return [as_linear]
    if isinstance(module, PLAIN) and type(module) not in PLAIN and not type(module).__module__.startswith("torch."):
        return [as_base, with_inner]
    if isinstance(module, CONVOLUTIONS) and module.padding == "valid":
        return [with_number_of_padding]
    form = form_of(module)
    return [partial(with_experts, form=form, as_block=experts == "block")] if form else []


def is_changed(module: Any, change: Change) -> bool:
    """Change a module if its output on a trial input keeps every bit; else leave the module as it was.

    A subclass of Linear or Embedding is tried with few rows of random weights, so the answer depends on its class and
    settings alone.
    """
    if isinstance(module, PLAIN):
        small = with_random_rows(module)
        if takes_shares(small) or not is_changed_in_place(small, change):
            return False
        change(module)
        return True
    return is_changed_in_place(module, change)


def is_changed_in_place(module: Any, change: Change) -> bool:
    """As `is_changed`, tried with the module's own weights."""
    before, fields = type(module), dict(vars(module))
    fields |= {key: dict(fields[key]) for key in ("_parameters", "_modules")}
    try:
        trial, expected = first_taken(module, trials_of(module))
        change(module)
        if runs_plain(module, trial) and torch.equal(module(*trial), expected):
            return True
    except OTHER_INPUT:
        pass
    module.__class__ = before
    vars(module).clear()
    vars(module).update(fields)
    return False


def takes_shares(module: torch.nn.Module) -> bool:
    """Whether an Embedding also takes a share for each row in place of ids, as that of Ovis2's images does."""
    if not isinstance(module, torch.nn.Embedding):
        return False
    shares = torch.rand(1, 2, len(module.weight))
    try:
        return torch.equal(module(shares), shares @ module.weight)
    except OTHER_INPUT:
        return False


def with_random_rows(module: Any) -> Any:
    """A copy of a Linear or an Embedding with few rows of random weights."""
    made = copy.copy(module)
    rows, columns = min(module.weight.shape[0], 8 * TRIAL_ROWS), module.weight.shape[1]
    fields = {"weight": torch.nn.Parameter(torch.randn(rows, columns), requires_grad=False)}
    if getattr(module, "bias", None) is not None:
        fields["bias"] = torch.nn.Parameter(torch.randn(rows), requires_grad=False)
    vars(made).update(_parameters={**module._parameters, **fields}, _modules=dict(module._modules))
    if getattr(module, "padding_idx", None) is not None:
        made.padding_idx = min(module.padding_idx, rows - 1)
    return made


def runs_plain(module: torch.nn.Module, trial: Trial) -> bool:
    """Whether a forward calls plain modules. Some forwards read the weights by themselves."""
    calls: list[torch.nn.Module] = []
    plain = [child for child in module.modules() if type(child) in (*PLAIN, *CONVOLUTIONS, StackedLinear)]
    handles = [child.register_forward_pre_hook(lambda child, args: calls.append(child)) for child in plain]
    try:
        module(*trial)
    finally:
        for handle in handles:
            handle.remove()
    return bool(calls)


def first_taken(module: torch.nn.Module, trials: Sequence[Trial]) -> tuple[Trial, torch.Tensor]:
    """The first input that a module takes, and its output."""
    for trial in trials[:-1]:
        try:
            return trial, module(*trial)
        except OTHER_INPUT:
            pass
    return trials[-1], module(*trials[-1])


def trials_of(module: Any) -> list[Trial]:
    """Random inputs of which a module of a known form takes one."""
    if isinstance(module, torch.nn.Embedding):
        rows = min(TRIAL_ROWS, len(module.weight) - 1)
        ids = torch.arange(1, 1 + rows).unsqueeze(0)
        return [(ids,), (torch.ones_like(ids),), (ids.shape,)]  # ids, or a mask or a shape that tells positions
    if isinstance(module, torch.nn.Linear):
        return [(torch.randn(TRIAL_ROWS, module.in_features),)]
    if isinstance(module, Conv1D):
        return [(torch.randn(TRIAL_ROWS, module.weight.shape[0]),)]
    if isinstance(module, CONVOLUTIONS):
        weight: Any = module.weight
        channels, *sides = weight.shape[1:]
        return [(torch.randn([1, channels, *(2 * side for side in sides)]),)]
    return [trial_of_experts(module)]


def as_linear(module: Any) -> None:
    """Make a Conv1D of GPT-2 a Linear, whose weight is the transposed view of the same memory."""
    weight = module.weight
    module.__class__ = torch.nn.Linear
    module.in_features, module.out_features = weight.shape
    module.weight = torch.nn.Parameter(weight.t(), requires_grad=weight.requires_grad)


def as_base(module: Any) -> None:
    """Make a subclass of Linear or Embedding the class itself."""
    module.__class__ = torch.nn.Linear if isinstance(module, torch.nn.Linear) else torch.nn.Embedding


def with_number_of_padding(module: Any) -> None:
    """Say "no padding" by numbers, because torch's quantized convolutions do not know the word `valid`."""
    module.padding = (0,) * len(module.kernel_size)


class InnerLinear(torch.nn.Linear):
    """A Linear that calls a plain one. A subclass that calls `super().forward` keeps what it does before and after."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self, INNER)(input)
        return output


class InnerEmbedding(torch.nn.Embedding):
    """As `InnerLinear`, for an Embedding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self, INNER)(input)
        return output


def with_inner(module: Any) -> None:
    """Put a plain module inside a subclass of Linear or Embedding; both hold the same weight."""
    if isinstance(module, torch.nn.Linear):
        inner: torch.nn.Module = linear(module.weight, module.bias)
        form: type[torch.nn.Module] = InnerLinear
    else:
        rows, columns = module.weight.shape
        inner = torch.nn.Embedding(rows, columns, padding_idx=module.padding_idx, device="meta")
        inner.weight = module.weight
        form = InnerEmbedding
    setattr(module, INNER, inner.train(module.training))
    module.__class__ = type(type(module).__name__, (type(module), form), {})
