"""The experts of a block as plain Linears, in the forms in which transformers holds and runs experts.

In: a module whose parameters hold one matrix for each expert. Out: the same module with a Linear for each matrix, which
shares the memory, and with a forward that gives the same bits. `models.prepare` tries that.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

TRIAL_ROWS = 8  # of an input on which a changed module must give the same bits


def form_of(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class below that runs a module's experts; None where the module holds none in a known form."""
    if flat(module):
        return FlatExperts
    found = stacked(module)
    if "down_proj" in found and ("gate_up_proj" in found or "up_proj" in found):
        return BatchedExperts if takes_one_input(module) else RoutedExperts
    return SplitExperts if "weight" in found and hasattr(module, "num_experts") else None


def stacked(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module that hold one matrix for each expert."""
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def flat(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The matrices of DBRX's experts, (experts, rows, columns): views of parameters that hold one under the other."""
    held: Any = module._modules.get("mlp")
    found = dict(held.named_parameters(recurse=False)) if held is not None else {}
    if not {"w1", "v1", "w2"} == {*found} or not hasattr(module, "num_experts"):
        return {}
    whole = {name: weight.data.unflatten(0, (held.moe_num_experts, -1)) for name, weight in found.items()}
    return whole | {"w2": whole["w2"].transpose(1, 2)}


def takes_one_input(module: torch.nn.Module) -> bool:
    """Whether experts get the rows of each expert one after the other, and no choice of a router."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def is_transposed(module: Any) -> bool:
    """Whether the matrices of experts are (columns, rows), unlike the weight of a Linear."""
    return bool(getattr(module, "is_transposed", takes_one_input(module)))


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A Linear with this weight (rows, columns) and bias, which are not copied."""
    rows, columns = weight.shape
    made = torch.nn.Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight = as_parameter(weight)
    if bias is not None:
        made.bias = as_parameter(bias)
    return made


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """The parameter itself, or a view of one as a frozen parameter."""
    return tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, requires_grad=False)


class StackedLinear(torch.nn.Module):
    """The same matrix of all experts of a block, as one op.

    Attributes:
        weight: (experts, rows, columns), a view of the stacked parameter.
        parts: for each expert the module that stands for its matrix; None for the matrices themselves.
    """

    parts: Sequence[torch.nn.Module] | None = None

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function that an expert's matrix is."""
        return functools.partial(self, expert=expert)

    def forward(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """The output of one expert's matrix for its rows, (tokens, columns)."""
        if self.parts is not None:
            output: torch.Tensor = self.parts[expert](rows)
            return output
        return torch.nn.functional.linear(rows, self.weight[expert])

    def linears(self) -> list[torch.nn.Linear]:
        """Each expert's matrix as a Linear that shares the memory."""
        return [linear(weight, None) for weight in self.weight.data]


def with_experts(module: Any, form: type[torch.nn.Module], as_block: bool) -> None:
    """Make the matrices of experts ops, whose weights are views of the stacked parameters.

    Biases stay in the module. transformers adds them after the product, and a Linear with a bias has other bits where
    an expert has one row.

    Args:
        module: holds the stacked parameters.
        form: the class below that runs the experts.
        as_block: whether all experts of a matrix are one op, with the name of the stacked parameter. Otherwise each
            expert is a Linear: `NAME.0`, `NAME.1` and so on.
    """
    if form is FlatExperts:
        with_flat_experts(module, as_block)
        return
    experts = len(stacked(module).get("down_proj", ())) or None  # LongCat stacks experts without a second matrix
    found: dict[str, torch.nn.Module] = {}
    for name, parameter in stacked(module).items():
        matrices = parameter.data.transpose(1, 2) if is_transposed(module) else parameter.data
        whole = StackedLinear(matrices[:experts])
        found[name] = whole if as_block else torch.nn.ModuleList(whole.linears())
    for name, matrix in found.items():
        delattr(module, name)
        setattr(module, name, matrix.train(module.training))
    module.__class__ = type(type(module).__name__, (form, type(module)), {})


def with_flat_experts(module: Any, as_block: bool) -> None:
    """As `with_experts`, for DBRX. The matrices stay in the child that held the parameters."""
    matrices, held = flat(module), module.mlp
    module.mlp = torch.nn.Module()
    for name, matrix in matrices.items():
        whole = StackedLinear(matrix)
        setattr(module.mlp, name, whole if as_block else torch.nn.ModuleList(whole.linears()))
    module.mlp.activation_fn = held.activation_fn
    module.mlp.train(module.training)
    module.__class__ = type(type(module).__name__, (FlatExperts, type(module)), {})


class Experts(torch.nn.Module):
    """A module whose children are the matrices of experts."""

    holds_experts = True  # so that modules without torch can tell


class RoutedExperts(Experts):
    """Experts that transformers runs in a loop over those that a router chose (`eager`), as Linears.

    In: hidden states (tokens, columns), the router's choice (tokens, chosen), and its weights of the same shape. The
    order of tokens and experts is that of transformers, so sums have the same bits. `chosen` is that of the last
    forward.
    """

    chosen: torch.Tensor | None = None

    def count(self) -> int:
        """The number of experts."""
        own: Any = self
        return len(own.down_proj)

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
        if expert >= self.count():
            return rows if hasattr(own, "identity_expert") else None
        if "gate_up_proj" in own._modules:
            inner = gated(own, product(own, "gate_up_proj", expert, rows))
        else:
            inner = own.act_fn(product(own, "up_proj", expert, rows))
        output = product(own, "down_proj", expert, inner)
        return own.post_expert_norm(output) if getattr(own, "has_post_expert_norm", False) else output


class FlatExperts(RoutedExperts):
    """Experts of DBRX, whose matrices lie one under the other, as Linears."""

    def count(self) -> int:
        """The number of experts."""
        own: Any = self
        return int(own.num_experts)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, -2)
        return super().forward(rows, chosen, weights).view(len(hidden), -1, hidden.shape[-1])

    def of_expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """The output of one expert for its rows."""
        own: Any = self
        inner = own.mlp.activation_fn(own.mlp.w1[expert](rows)) * own.mlp.v1[expert](rows)
        output: torch.Tensor = own.mlp.w2[expert](inner)
        return output


def product(experts: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """The product of rows with one matrix of an expert, and the bias where the experts have one."""
    output: torch.Tensor = getattr(experts, name)[expert](rows)
    biases = experts._parameters.get(f"{name}_bias")
    return output if biases is None else output + biases[expert]


def gated(experts: Any, both: torch.Tensor) -> torch.Tensor:
    """The product of gate and up that a class of experts makes of both, (rows, 2 * columns)."""
    if hasattr(experts, "_apply_gate"):
        found: torch.Tensor = experts._apply_gate(both)
        return found
    gate, up = both.chunk(2, dim=-1)
    found = experts.act_fn(gate) * up
    return found


class BatchedExperts(Experts):
    """Experts of Llama 4, each of which gets all tokens, scaled by its share of each token, as Linears."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        own: Any = self
        outputs = []
        for expert, rows in enumerate(hidden.view(len(own.down_proj), -1, hidden.shape[-1])):
            gate, up = own.gate_up_proj[expert](rows).chunk(2, dim=-1)
            outputs.append(own.down_proj[expert](up * own.act_fn(gate)))
        return torch.cat(outputs)


class SplitExperts(Experts):
    """Matrices of experts whose rows come one expert after the other, as Linears. In: rows, and how many each has."""

    def forward(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        experts: Any = self.get_submodule("weight")
        parts = enumerate(rows.split(sizes, dim=0))
        return torch.cat([experts[expert](part) for expert, part in parts if len(part)])


def trial_of_experts(module: Any) -> tuple[Any, ...]:
    """Random rows for experts, and a random choice of a router where they take one. The last expert has one row."""
    found: Mapping[str, torch.Tensor] = flat(module) or stacked(module)
    name, weight = next(item for item in found.items() if item[0] != "down_proj")
    experts, width = len(weight), weight.shape[1 if is_transposed(module) else 2]
    if name == "weight":
        return torch.randn(2 * experts, width), [2] * experts
    if takes_one_input(module):
        return (torch.randn(experts * TRIAL_ROWS, width),)
    able = len(found.get("down_proj", weight))  # LongCat stacks experts without a second matrix
    preference = torch.rand(TRIAL_ROWS, able)
    preference[:, -1] = torch.eye(TRIAL_ROWS)[0] * 2 - 1  # products of one row have a kernel of their own
    index = preference.topk(min(2, able)).indices
    return torch.randn(TRIAL_ROWS, width), index, torch.rand(index.shape)
