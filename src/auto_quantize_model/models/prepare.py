"""Modules that hold a Linear or an Embedding in another form, made into the plain form that INC and the replay know.

In: a model of transformers. Out: the same model, in which experts, custom Linears and scaled Embeddings hold plain
modules that share the weights. A module is changed only where its output keeps every bit on a trial input.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

TRIAL_ROWS = 8  # of the input on which a changed module must give the same bits
INNER = "plain"  # the name of the plain module inside a module that scales or shifts
PLAIN: tuple[type[torch.nn.Module], ...] = (torch.nn.Linear, torch.nn.Embedding)
Change = Callable[[Any], None]
Trial = tuple[Any, ...]  # arguments of a forward
# What a forward raises on an input that it does not take.
OTHER_INPUT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def prepare(model: torch.nn.Module) -> dict[str, str]:
    """Make all that a model holds in another form plain, in place.

    Args:
        model: in FP32 and eval mode on the CPU, with its weights. Its experts run one after the other (`eager`).

    Returns:
        {module name: reason}, for modules of a known form that stay as they are, because their bits would change.
    """
    refused = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            changes = changes_of(module)
            if changes and not any(is_changed(module, change) for change in changes):
                refused[name] = f"{type(module).__name__} uses its weight otherwise than a plain module does"
    return refused


def changes_of(module: torch.nn.Module) -> list[Change]:
    """The ways to make a module plain, the simplest first; empty where it is plain already, or of an unknown form."""
    if isinstance(module, Conv1D):
        return [as_linear]
    if isinstance(module, PLAIN) and type(module) not in PLAIN and not type(module).__module__.startswith("torch."):
        return [as_base, with_inner]
    found = stacked(module)
    if "down_proj" in found and ("gate_up_proj" in found or "up_proj" in found):
        return [partial(with_experts, form=BatchedExperts if takes_one_input(module) else RoutedExperts)]
    if "weight" in found and hasattr(module, "num_experts"):
        return [partial(with_experts, form=SplitExperts)]
    return []


def is_changed(module: Any, change: Change) -> bool:
    """Change a module if its output on a trial input keeps every bit; else leave the module as it was.

    A subclass of Linear or Embedding is tried with few rows of random weights, so the answer depends on its class and
    settings alone.
    """
    if isinstance(module, PLAIN):
        if not is_changed_in_place(with_random_rows(module), change):
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


def with_random_rows(module: Any) -> Any:
    """A copy of a Linear or an Embedding with few rows of random weights."""
    made = copy.copy(module)
    rows, columns = min(module.weight.shape[0], 8 * TRIAL_ROWS), module.weight.shape[1]
    fields = {"weight": torch.nn.Parameter(torch.randn(rows, columns), requires_grad=False)}
    if getattr(module, "bias", None) is not None:
        fields["bias"] = torch.nn.Parameter(torch.randn(rows), requires_grad=False)
    vars(made).update(_parameters={**module._parameters, **fields}, _modules=dict(module._modules))
    return made


def runs_plain(module: torch.nn.Module, trial: Trial) -> bool:
    """Whether a forward calls plain modules. Some forwards read the weights by themselves."""
    calls: list[torch.nn.Module] = []
    plain = [child for child in module.modules() if type(child) in PLAIN]
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
    return [trial_of_experts(module)]


def trial_of_experts(module: Any) -> Trial:
    """Random rows for experts, and a random choice of a router where they take one."""
    found = stacked(module)
    name, weight = next(item for item in found.items() if item[0] != "down_proj")
    experts, width = len(weight), weight.shape[1 if is_transposed(module) else 2]
    if name == "weight":
        return torch.randn(2 * experts, width), [2] * experts
    if takes_one_input(module):
        return (torch.randn(experts * TRIAL_ROWS, width),)
    index = torch.rand(TRIAL_ROWS, len(found["down_proj"])).topk(min(2, len(found["down_proj"]))).indices
    return torch.randn(TRIAL_ROWS, width), index, torch.rand(index.shape)


def stacked(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module that hold one matrix for each expert."""
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def takes_one_input(module: torch.nn.Module) -> bool:
    """Whether experts get the rows of each expert one after the other, and no choice of a router."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def is_transposed(module: Any) -> bool:
    """Whether the matrices of experts are (columns, rows), unlike the weight of a Linear."""
    return bool(getattr(module, "is_transposed", takes_one_input(module)))


def as_linear(module: Any) -> None:
    """Make a Conv1D of GPT-2 a Linear, whose weight is the transposed view of the same memory."""
    weight = module.weight
    module.__class__ = torch.nn.Linear
    module.in_features, module.out_features = weight.shape
    module.weight = torch.nn.Parameter(weight.t(), requires_grad=weight.requires_grad)


def as_base(module: Any) -> None:
    """Make a subclass of Linear or Embedding the class itself."""
    module.__class__ = torch.nn.Linear if isinstance(module, torch.nn.Linear) else torch.nn.Embedding


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
        inner = torch.nn.Embedding(*module.weight.shape, padding_idx=module.padding_idx, _weight=module.weight)
        inner.weight = module.weight
        form = InnerEmbedding
    setattr(module, INNER, inner)
    module.__class__ = type(type(module).__name__, (type(module), form), {})


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A Linear with this weight (rows, columns) and bias, which are not copied."""
    rows, columns = weight.shape
    made = torch.nn.Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight = as_parameter(weight)
    made.bias = None if bias is None else as_parameter(bias)
    return made


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """The parameter itself, or a view of one as a frozen parameter."""
    return tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, requires_grad=False)


def with_experts(module: Any, form: type[torch.nn.Module]) -> None:
    """Make each expert's matrices Linears, `NAME.0`, `NAME.1` and so on, where NAME is the stacked parameter's name.

    Their weights are views of the stacked parameter.
    """
    experts = len(stacked(module).get("down_proj", ())) or None  # LongCat stacks experts without a second matrix
    lists = {}
    for name, weight in stacked(module).items():
        biases: Sequence[Any] = module._parameters.get(f"{name}_bias")
        matrices = [matrix.t() if is_transposed(module) else matrix for matrix in weight.data[:experts]]
        lists[name] = torch.nn.ModuleList(
            linear(matrix, None if biases is None else biases.data[index]) for index, matrix in enumerate(matrices)
        )
    for name, linears in lists.items():
        delattr(module, name)
        if f"{name}_bias" in module._parameters:
            delattr(module, f"{name}_bias")
        setattr(module, name, linears)
    module.__class__ = type(type(module).__name__, (form, type(module)), {})


class RoutedExperts(torch.nn.Module):
    """Experts that transformers runs in a loop over those that a router chose (`eager`), as Linears.

    In: hidden states (tokens, columns), the router's choice (tokens, chosen), and its weights of the same shape. The
    order of tokens and experts is that of transformers, so sums have the same bits. `chosen` is that of the last
    forward.
    """

    chosen: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.chosen = chosen.detach()
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            place, token = torch.where(chosen.t() == expert)
            output = self.of_expert(expert, hidden[token])
            if output is not None:
                total.index_add_(0, token, output * weights[token, place, None])
        return total

    def of_expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor | None:
        """The output of one expert for its rows; None for a number that stands for no expert."""
        own: Any = self
        if expert >= len(own.down_proj):
            return rows if hasattr(own, "identity_expert") else None
        if "gate_up_proj" in own._modules:
            inner = gated(own, own.gate_up_proj[expert](rows))
        else:
            inner = own.act_fn(own.up_proj[expert](rows))
        output: torch.Tensor = own.down_proj[expert](inner)
        return own.post_expert_norm(output) if getattr(own, "has_post_expert_norm", False) else output


def gated(experts: Any, both: torch.Tensor) -> torch.Tensor:
    """The product of gate and up that a class of experts makes of both, (rows, 2 * columns)."""
    if hasattr(experts, "_apply_gate"):
        product: torch.Tensor = experts._apply_gate(both)
        return product
    gate, up = both.chunk(2, dim=-1)
    product = experts.act_fn(gate) * up
    return product


class BatchedExperts(torch.nn.Module):
    """Experts of Llama 4, each of which gets all tokens, scaled by its share of each token, as Linears."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        own: Any = self
        outputs = []
        for expert, rows in enumerate(hidden.view(len(own.down_proj), -1, hidden.shape[-1])):
            gate, up = own.gate_up_proj[expert](rows).chunk(2, dim=-1)
            outputs.append(own.down_proj[expert](up * own.act_fn(gate)))
        return torch.cat(outputs)


class SplitExperts(torch.nn.Module):
    """Matrices of experts whose rows come one expert after the other, as Linears. In: rows, and how many each has."""

    def forward(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts, experts = rows.split(sizes, dim=0), self.get_submodule("weight")
        return torch.cat([expert(part) for expert, part in zip(experts.children(), parts, strict=True) if len(part)])
