"""The module before an op that can take a smoothing scale up, so that nothing is computed besides.

In: a model, the ops of a unit, and a batch. Out: the name of a norm or of a Linear, or the reason why there is none. A
module is found by trying: with its output divided and the columns of the ops multiplied, all outputs must stay.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch

from auto_quantize_model.models.checkpoint import fed_by
from auto_quantize_model.models.weights import listed

TOLERANCE = 1e-4  # of the output's largest magnitude; float32 rounds far below that, and a wrong module is far above
NONE = "no norm and no Linear of the same width comes directly before the op"


@torch.no_grad()
def folding_of(
    model: torch.nn.Module, ops: Sequence[str], measured_op: str, batch: Mapping[str, torch.Tensor]
) -> tuple[str, str]:
    """The module that can take a scale of the ops' input up, and otherwise an empty name with the reason.

    Args:
        model: FP32, in eval mode; left as it was.
        ops: of one unit, which have the same input.
        measured_op: at whose output the model is compared.
        batch: on the model's device.
    """
    modules = dict(model.named_modules())
    columns = modules[ops[0]].weight.shape[1]
    if tied := [name for name, other in modules.items() if name not in ops and shares_weight(other, modules[ops[0]])]:
        return "", f"the op shares its weight with {tied[0]}"
    norms = [name for name, module in modules.items() if is_norm(module, columns)]
    fed = {norm: found for norm, (found, _) in fed_by(model, norms, [batch]).items() if ops[0] in found}
    parent = ops[0].rpartition(".")[0]
    linears = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and name.rpartition(".")[0] == parent
        and name not in ops
        and module.weight.shape[0] == columns
    ]
    watched = list(dict.fromkeys([*ops, measured_op]))
    before = outputs_of(model, watched, batch)
    factors = torch.linspace(0.5, 2.0, columns)[torch.randperm(columns, generator=seeded())]
    for name in (*fed, *linears):
        after = outputs_of(model, watched, batch, folded(modules, name, ops, factors))
        if all(is_near(after[op], before[op]) for op in watched):
            return name, ""
    for norm, found in fed.items():
        others = sorted(found - set(ops))
        return "", f"the norm {norm} before the op also feeds {listed(others)}" if others else (
            f"the norm {norm} before the op does not multiply its output by a weight"
        )
    return "", NONE


def seeded() -> torch.Generator:
    """Gives the same factors in each run."""
    return torch.Generator().manual_seed(0)


def is_norm(module: torch.nn.Module, columns: int) -> bool:
    """Whether a module is a leaf whose parameters are vectors of this length."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(p.shape == (columns,) for p in parameters)


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs differ by rounding alone."""
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def shares_weight(module: torch.nn.Module, op: torch.nn.Module) -> bool:
    """Whether another module has the very weight of an op."""
    return getattr(module, "weight", None) is op.weight


def outputs_of(
    model: torch.nn.Module,
    names: Sequence[str],
    batch: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """The last output of each named module in one forward.

    Args:
        values: {parameter: what it is in this forward}, also for the modules that share it.
    """
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            remember = lambda module, args, output, name=name: outputs.update({name: output})  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(remember).remove)
        torch.func.functional_call(model, dict(values), kwargs=dict(batch))
    return outputs


def folded(
    modules: Mapping[str, Any], before: str, ops: Sequence[str], factors: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The parameters of a module divided by factors, and the ops' weights with their columns multiplied, by name."""
    factors = factors.to(modules[ops[0]].weight.device)
    divided = {
        f"{before}.{name}": parameter / (factors if parameter.ndim == 1 else factors.view(-1, 1))
        for name, parameter in modules[before].named_parameters()
    }
    return divided | {f"{op}.weight": modules[op].weight * factors for op in ops}
