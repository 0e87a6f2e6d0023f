"""A router that chooses otherwise in a quantized state: what is counted, and how the chosen experts are quantized."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.inc.plan import build_plan, check_inc, plan_ops
from auto_quantize_model.made.tiny_text import small_config
from auto_quantize_model.measure.metrics import squared_error
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.models.prepare import prepare
from auto_quantize_model.records import OpScales, Plan
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.scheme import assigned

VOCABULARY = 61
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"head_dim": 16, "tie_word_embeddings": False}
DYNAMIC, STATIC = ("FP8_DYNAMIC", "NVFP4A16", "MXFP4"), "FP8"
SCHEMES = (*DYNAMIC, STATIC)
LAST, NEVER = 2, 5  # experts
Choices = list[list[set[int]]]  # of each router, of each token


def mixtral(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = small_config("mixtral", VOCABULARY, **SMALL | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape) * 2 * parameter.shape[-1] ** -0.5)
    assert prepare(model) == {}
    return model


def batch_of(tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))}


def spec(*schemes: str) -> PlanSpec:
    return PlanSpec(confidence_batches=1, maps=("isolated",), engine="replay", schemes=schemes)


@contextmanager
def choices_of(model: Any) -> Iterator[list[Choices]]:
    """What the routers of a model, and of copies of it, choose; each forward adds an entry."""
    found: list[Choices] = []
    blocks = [layer.mlp.experts for layer in model.model.layers]

    def remember(index: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            if index == 0:
                found.append([])
            found[-1].append([set(row) for row in args[1].tolist()])

        return hook

    handles = [block.register_forward_pre_hook(remember(index)) for index, block in enumerate(blocks)]
    yield found
    for handle in handles:
        handle.remove()


def shared(before: Choices, now: Choices) -> float:
    pairs = [pair for both in zip(before, now, strict=True) for pair in zip(*both, strict=True)]
    return sum(len(one & other) for one, other in pairs) / sum(len(one) for one, _ in pairs)


class TwoRouters:
    """A model with two routers, its plan, its replay after a calibration, and the library's own copy."""

    def __init__(self) -> None:
        self.model, self.batch = mixtral(), batch_of(16)
        self.plan = build_plan(self.model, [self.batch], spec(*SCHEMES))
        self.schemes = schemes_of(self.plan.schemes, self.model)
        with choices_of(self.model) as found, torch.no_grad():
            self.model(**self.batch)
        (self.in_fp32,) = found

    def replay(self) -> Replay:
        return Replay(self.model, self.plan.ops, self.plan.measured_op, schemes=self.schemes)


@pytest.fixture(scope="module")
def routers() -> TwoRouters:
    return TwoRouters()


@settings(max_examples=5)
@given(data=st.data())
def test_the_share_of_kept_choices_is_that_of_the_librarys_own_model(routers: TwoRouters, data: st.DataObject) -> None:
    """Also where the outputs of the first block are kept, so that its router does not run again."""
    names = routers.plan.op_names
    some = st.dictionaries(st.sampled_from(names), st.sampled_from(SCHEMES))
    every = st.sampled_from(SCHEMES).map(lambda scheme: assigned(names, scheme))
    states = data.draw(st.lists(st.one_of(some, every), max_size=4))
    found = []
    with routers.replay() as replay:
        scales = replay.calibrate(routers.batch)
        assert replay.routing_agreement() == 1
        for state in states:
            replay.run(state)
            found.append(replay.routing_agreement())
        replay.together = data.draw(st.integers(2, 3))
        assert [replay.routing_agreement() for _ in replay.run_each([*states, *states])] == found + found
    library = Library(routers.model, routers.plan, routers.schemes, scales)
    with choices_of(routers.model) as choices:
        for state in states:
            library.logits(routers.batch, state)
    assert found == [pytest.approx(shared(routers.in_fp32, now), abs=1e-15) for now in choices]


def test_routers_change_their_choice_in_four_bits_and_the_score_of_all_ops_says_so(routers: TwoRouters) -> None:
    with routers.replay() as replay:
        replay.calibrate(routers.batch)
        replay.run(assigned(routers.plan.op_names, "MXFP4"))
        assert 0.5 < (replay.routing_agreement() or 0) < 1
        replay.run({})
        assert replay.routing_agreement() == 1


def test_without_a_router_there_is_no_share() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with Replay(model, [], "0", lambda: model(torch.ones(1, 4))) as replay:
        replay.begin({})
        assert replay.routing_agreement() is None


class NearTie:
    """A router of eight experts, by which every token comes to expert `LAST` in FP32, and almost to expert `NEVER`."""

    def __init__(self) -> None:
        self.model = mixtral(num_local_experts=8, num_experts_per_tok=1, num_hidden_layers=1)
        self.batch = batch_of(12)
        gate = self.model.model.layers[0].mlp.gate
        inputs: list[torch.Tensor] = []
        handle = gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with torch.no_grad():
            self.model(**self.batch)
        handle.remove()
        hidden = inputs[0].reshape(-1, gate.weight.shape[1]).double()
        to_logits = torch.linalg.pinv(hidden)
        aside = torch.randn(hidden.shape[1], dtype=torch.float64)
        aside -= to_logits @ (hidden @ aside)  # changes no logit of these tokens
        weight = torch.zeros_like(gate.weight)
        weight[LAST] = to_logits @ torch.full((len(hidden),), 4.0, dtype=torch.float64)
        weight[NEVER] = weight[LAST] + aside - to_logits @ torch.full((len(hidden),), 1e-4, dtype=torch.float64)
        gate.weight.copy_(weight)
        self.never = [f"model.layers.0.mlp.experts.{name}.{NEVER}" for name in ("gate_up_proj", "down_proj")]

    def plan(self, *schemes: str) -> Plan:
        return build_plan(self.model, [self.batch], spec(*schemes))


@pytest.fixture(scope="module")
def tie() -> NearTie:
    return NearTie()


@pytest.fixture(scope="module")
def served(tie: NearTie) -> Plan:
    return tie.plan(*SCHEMES)


@pytest.mark.slow
def test_an_expert_that_did_not_run_is_in_int8_with_scale_1_as_in_inc(tie: NearTie) -> None:
    planned = plan_ops(tie.model, [tie.batch], spec("inc_int8"))
    check, errors = check_inc(planned, [tie.batch])
    assert check == {"status": "reproduces_fp32"}
    with Replay(tie.model, planned.ops, planned.measured_op) as replay:
        scales = replay.calibrate(tie.batch)
        reference = replay.begin(tie.batch)
        assert not {*tie.never} & {*replay.order} and {*tie.never} <= replay.first_visit.keys()
        assert all(scales[name] == OpScales(1.0, 0, 1.0, 0) for name in tie.never)
        assert squared_error(reference, replay.run(assigned(replay.first_visit))) == errors[0]["every op"]
        assert all(replay.sites[name].executions for name in tie.never)  # the router chose the expert
        assert 0 < (replay.routing_agreement() or 0) < 1
        # In FP32 the expert would give another error, so its scale of 1 is seen.
        assert squared_error(reference, replay.run(assigned(replay.order))) != errors[0]["every op"]


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_a_dynamic_scheme_quantizes_an_expert_that_did_not_run(tie: NearTie, served: Plan, scheme: str) -> None:
    schemes = schemes_of(served.schemes, tie.model)
    with Replay(tie.model, served.ops, served.measured_op, schemes=schemes) as replay:
        scales = replay.calibrate(tie.batch)
        before = {name: replay.sites[name].executions for name in tie.never}
        found = replay.run(assigned(replay.first_visit, scheme)).clone()
        assert all(replay.sites[name].executions > count for name, count in before.items())
        assert not torch.equal(found, replay.run(assigned(replay.order, scheme)))
    library = Library(tie.model, served, schemes, scales)
    assert torch.equal(found, library.logits(tie.batch, assigned(served.op_names, scheme)))


def test_a_static_scheme_leaves_an_expert_that_did_not_run_unquantized(tie: NearTie, served: Plan) -> None:
    schemes = schemes_of(served.schemes, tie.model)
    with Replay(tie.model, served.ops, served.measured_op, schemes=schemes) as replay:
        scales = replay.calibrate(tie.batch)
        assert not any(replay.sites[name].ready(STATIC) for name in tie.never)
        before = {name: replay.sites[name].executions for name in tie.never}
        found = replay.run(assigned(replay.first_visit, STATIC)).clone()
        assert all(replay.sites[name].executions > count for name, count in before.items())
        assert torch.equal(found, replay.run(assigned(replay.order, STATIC)))
    library = Library(tie.model, served, schemes, scales)
    assert not any(library.is_ready(name, schemes[STATIC]) for name in tie.never)
    assert torch.equal(found, library.logits(tie.batch, assigned(served.op_names, STATIC)))


def test_an_expert_that_did_not_run_has_no_score_and_is_in_each_state_of_all_ops(tie: NearTie, served: Plan) -> None:
    ran = {op.op_name for op in served.ops if op.ran}
    assert not ran & {*tie.never} and all(op.expert for op in served.ops if not op.ran)
    with Replay(tie.model, served.ops, served.measured_op, schemes=schemes_of(served.schemes, tie.model)) as replay:
        replay.calibrate(tie.batch)
        assert {*replay.order} == ran and {*replay.first_visit} == {*served.op_names}
