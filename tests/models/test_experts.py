"""The experts of a block, each as an op or all as one, in the schemes of compressed-tensors: the library's own bits."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from build import a_plan, an_op
from transformers import AutoModelForCausalLM

from auto_quantize_model.made.tiny_text import small_config
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.models.experts import StackedLinear
from auto_quantize_model.models.prepare import prepare
from auto_quantize_model.records import Op
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.compressed import scheme_of
from auto_quantize_model.schemes.scheme import assigned

SCHEMES = {name: scheme_of(name) for name in ("FP8_DYNAMIC", "W8A8", "NVFP4", "FP8")}


def model_of(experts: str, kind: str = "mixtral") -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind, 61), experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    assert prepare(model, experts) == {}
    return model


def ops_of(model: torch.nn.Module) -> list[Op]:
    kinds = {torch.nn.Linear: "Linear", StackedLinear: "Experts"}
    found = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    return [
        replace(
            an_op(name, kinds[type(module)], shape=tuple(module.weight.shape), expert="experts" in name),
            schemes=tuple(SCHEMES),
            inc_int8=None,
        )
        for name, module in found
    ]


# The experts of GPT-OSS are stored transposed. A GPU adds the products of the library's copy in another order.
KINDS: list[Any] = [("each", "mixtral", "cpu"), ("block", "mixtral", "cpu"), ("block", "gpt_oss", "cpu")]
KINDS += [pytest.param(experts, "mixtral", "cuda", marks=pytest.mark.gpu) for experts in ("each", "block")]


@pytest.mark.parametrize(("experts", "kind", "device"), KINDS)
def test_experts_have_the_bits_of_the_library(experts: str, kind: str, device: str) -> None:
    model = model_of(experts, kind).to(device)
    ops = ops_of(model)
    batch = {"input_ids": torch.arange(3, 27, device=device)[None]}
    with Replay(model, ops, "lm_head") as replay:
        seen = replay.calibrate(batch)
    states = [assigned([op.op_name for op in ops], scheme) for scheme in SCHEMES]
    states += [{op.op_name: scheme} for op, scheme in zip([op for op in ops if op.expert], SCHEMES, strict=False)]
    library = Library(model, a_plan(ops), SCHEMES, seen)
    expected = [library.logits(batch, state) for state in states]
    with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
        replay.set_scales(seen)
        fp32 = replay.begin(batch).clone()
        for state, output in zip(states, expected, strict=True):
            assert torch.equal(replay.run(state), output) and not torch.equal(output, fp32), state


def test_a_dynamic_scheme_is_the_same_for_experts_as_one_op_and_as_many() -> None:
    batch = {"input_ids": torch.arange(3, 27)[None]}
    outputs = []
    for experts in ("each", "block"):
        model = model_of(experts)
        ops = ops_of(model)
        with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
            replay.calibrate(batch)
            replay.begin(batch)
            outputs.append([replay.run(assigned(replay.first_visit, scheme)) for scheme in ("FP8_DYNAMIC", "W8A8")])
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_a_backward_pass_reaches_every_expert_that_ran() -> None:
    model = model_of("block")
    ops = ops_of(model)
    with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
        replay.calibrate({"input_ids": torch.arange(3, 27)[None]})
        names = [op.op_name for op in ops if op.expert]
        ones = lambda output, index: torch.ones_like(output)  # noqa: E731
        products = Backward(replay, dict.fromkeys(names, ["FP8_DYNAMIC"]), 1).run(ones, lambda done, total: None)
    assert products.keys() == set(names)
    assert all(bool(product.abs().sum() > 0) for product in products.values())


def test_a_copy_of_experts_shares_no_parts() -> None:
    stacked = StackedLinear(torch.randn(2, 3, 4))
    other = copy.deepcopy(stacked)
    other.parts = other.linears()
    rows = torch.randn(5, 4)
    assert stacked.parts is None and len(stacked) == 2
    assert torch.equal(stacked[1](rows), other[1](rows))
