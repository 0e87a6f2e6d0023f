"""Ops of one matrix or one weight form a unit, which has only the schemes that all its modules can have."""

import torch
from build import an_op

from auto_quantize_model.models.units import unit_of, units_of


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(2, 2))


class Model(torch.nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention()])
        self.embed_tokens, self.lm_head = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def planned(model: torch.nn.Module, *left_out: str):
    modules = dict(model.named_modules())
    ops = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and name not in left_out:
            able = ("inc_int8", "W8A8") if isinstance(module, torch.nn.Linear) else ("inc_int8",)
            refused = {} if "W8A8" in able else {"W8A8": "an Embedding"}
            ops.append(an_op(name, schemes=able, refused=refused, unit=unit_of(name, modules)))
    return {unit.name: unit for unit in units_of(ops, modules)}


QKV = "layers.0.q_proj+k_proj+v_proj"


def test_q_k_and_v_are_a_unit_and_other_ops_are_alone():
    units = planned(Model(tied=False))
    assert list(units) == [QKV, "layers.0.o_proj", "embed_tokens", "lm_head"]
    assert units[QKV].ops == tuple(f"layers.0.{name}_proj" for name in "qkv") and not units[QKV].tied
    assert units[QKV].schemes == ("W8A8",) and units["lm_head"].schemes == ("W8A8",)
    assert units["embed_tokens"].refused == {"W8A8": "embed_tokens: an Embedding"}


def test_a_tied_head_has_only_what_its_embedding_can_have():
    units = planned(Model(tied=True))
    tied = units["embed_tokens+lm_head"]
    assert tied.tied and tied.ops == ("embed_tokens", "lm_head")
    assert tied.schemes == () and tied.refused == {"W8A8": "embed_tokens: an Embedding"}


def test_a_unit_with_a_module_that_stays_unquantized_stays_so_too():
    units = planned(Model(tied=True), "embed_tokens", "layers.0.k_proj")
    assert units["embed_tokens+lm_head"].refused == {
        "W8A8": "embed_tokens has the same weight, and it stays unquantized"
    }
    assert units[QKV].refused == {"W8A8": "layers.0.k_proj has the same matrix, and it stays unquantized"}
    assert units[QKV].schemes == units["embed_tokens+lm_head"].schemes == ()
