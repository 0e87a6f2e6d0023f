"""The module that takes a smoothing scale up is found by trying, and its absence has a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_quantize_model.measure.folding import folding_of


class Gated(torch.nn.Module):
    """A norm that feeds two Linears, whose product feeds a third; and a head behind a second norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = torch.nn.RMSNorm(8), torch.nn.LayerNorm(8)
        self.gate, self.up, self.down = (torch.nn.Linear(*shape) for shape in ((8, 12), (8, 12), (12, 8)))
        self.router, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)
        self.routed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        gated = self.down(torch.nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        found: torch.Tensor = self.head(self.last(x + gated + (self.router(hidden) if self.routed else 0)))
        return found


class Shifted(torch.nn.RMSNorm):
    """A norm whose factor is its weight and one, so that dividing the weight does not divide the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.nn.functional.rms_norm(x, (8,)) * (1 + self.weight)
        return found


def tie(model: Any) -> None:
    model.router.weight = model.up.weight = model.gate.weight


CASES: list[tuple[tuple[str, ...], Callable[[Any], None], str, str]] = [
    (("gate", "up"), lambda model: None, "norm", ""),
    (("down",), lambda model: None, "up", ""),
    (("head",), lambda model: None, "last", ""),
    (("gate", "up"), lambda model: setattr(model, "routed", True), "", "the norm norm before the op also feeds router"),
    (("gate", "up"), lambda model: setattr(model, "norm", Shifted(8)), "", "does not multiply its output by a weight"),
    (("gate", "up"), tie, "", "the op shares its weight with router"),
    (("router",), lambda model: setattr(model, "routed", True), "", "also feeds gate, up"),
]


@pytest.mark.parametrize(("ops", "change", "expected", "reason"), CASES)
def test_the_scale_folds_where_the_model_stays_the_same(
    ops: tuple[str, ...], change: Callable[[Any], None], expected: str, reason: str
) -> None:
    torch.manual_seed(0)
    model = Gated().eval().requires_grad_(False)
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name, why = folding_of(model, ops, "head", {"x": torch.randn(2, 3, 8)})
    assert name == expected and why.endswith(reason) and bool(why) == (not name)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_a_module_of_the_width_there_is_none() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)).requires_grad_(False)
    assert folding_of(model, ["2"], "2", {"input": torch.randn(3, 8)})[1].startswith("no norm and no Linear")
