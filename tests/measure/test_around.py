"""Near a mixed state, slopes and curvature say how the measured divergence changes with the schemes of units."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from build import an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.measure.around import Around, around, mean, second_order
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay

# Weights alone, so that a change of one op does not draw the roundings of all ops behind it again.
WEIGHTS = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
FIELDS: dict[str, Any] = {"weights": WEIGHTS, "W8A8": {}}
SCHEMES = tuple(FIELDS)
BATCH = 1
PROBES = 64


@pytest.fixture
def replay(request: pytest.FixtureRequest) -> Iterator[Replay]:
    """On the device that a test asks for, or on the CPU."""
    model = few_ops_model().to(getattr(request, "param", "cpu"))
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    ops = [an_op(name, schemes=SCHEMES, shape=tuple(modules[name].weight.shape)) for name in names]
    with Replay(model, ops, "lm_head", schemes=schemes_of(FIELDS, model)) as made:
        made.calibrate(*token_batches(2))
        yield made


def divergence(replay: Replay, state: Mapping[str, str]) -> float:
    batch = token_batches(2)[BATCH]
    return Reference(replay.begin(batch).clone(), None).compare(replay.run(state))["divergence"]


def near(replay: Replay, state: Mapping[str, str], wanted: Mapping[str, Any], probes: int = PROBES) -> Around:
    return around(replay, token_batches(2)[BATCH], state, wanted, range(probes))


def test_the_divergence_of_the_state_is_that_of_the_replay(replay: Replay) -> None:
    """The backward runs block by block, and its last output has the bits of a whole run."""
    state = {name: SCHEMES[index % 2] for index, name in enumerate(list(replay.sites)[:-1])}
    assert near(replay, state, {}, 1).divergence == divergence(replay, state)


ON_EACH_DEVICE = pytest.mark.parametrize("replay", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@ON_EACH_DEVICE
def test_both_orders_together_predict_changes_of_one_unit_and_of_two(replay: Replay) -> None:
    names = list(replay.sites)
    state = dict.fromkeys(names, "weights")
    found = near(replay, state, {name: ([name], ["unquantized"]) for name in names})
    sets = [*itertools.combinations(range(len(names)), 1), *itertools.combinations(range(len(names)), 2)]
    predicted, first_order, measured = [], [], []
    for chosen in sets:
        taken = np.array([index in chosen for index in range(len(names))])
        first_order.append(found.slopes @ taken)
        predicted.append(found.slopes @ taken + taken @ found.curvature @ taken / 2)
        left = {name: "weights" for index, name in enumerate(names) if index not in chosen}
        measured.append(divergence(replay, left) - found.divergence)
    assert math.dist(predicted, measured) < 0.15 * math.hypot(*measured)
    assert math.dist(first_order, measured) > 0.3 * math.hypot(*measured)


def test_an_unquantized_model_has_no_slope_and_the_curvature_of_each_unit_alone(replay: Replay) -> None:
    """The divergence has its least there, and half of the curvature is the divergence of a unit alone."""
    names = list(replay.sites)
    found = near(replay, {}, {name: ([name], ["weights"]) for name in names})
    assert found.divergence == 0.0 and not found.slopes.any()
    alone = [divergence(replay, {name: "weights"}) for name in names]
    assert math.dist(found.curvature.diagonal() / 2, alone) < 0.3 * math.hypot(*alone)


def test_a_unit_has_the_sum_of_its_ops_and_an_op_that_did_not_run_has_none(replay: Replay) -> None:
    first, second, *_ = replay.sites
    state = dict.fromkeys(replay.sites, "weights")
    wanted = {"a": ([first], ["W8A8"]), "b": ([second], ["W8A8"]), "both": ([first, second], ["W8A8"])}
    found = near(replay, state, wanted | {"absent": (["no.op"], ["W8A8"])}, 2)
    a, b, both, absent = found.slopes
    assert both == pytest.approx(a + b) and absent == 0.0
    (ab,) = found.curvature[:2, :2].sum(keepdims=True).flatten()
    assert found.curvature[2, 2] == pytest.approx(ab) and not found.curvature[3].any()


def test_ops_with_other_rows_have_no_curvature_together() -> None:
    products = [torch.ones(2, 1, 3), None, 2 * torch.ones(2, 1, 3), torch.ones(2, 1, 5)]
    found = second_order(0.5, products, probes=1, positions=3)
    assert found.slopes.tolist() == [3.0, 0.0, 6.0, 5.0] and np.allclose(found.whole, [3.0, 0.0, 12.0, 25 / 3])
    assert np.allclose(found.apart, [[1, 0, 2, 0], [0, 0, 0, 0], [2, 0, 4, 0], [0, 0, 0, 5 / 3]])
    assert np.allclose(found.curvature, found.apart * (3 + 12 + 25 / 3) / (1 + 4 + 5 / 3))


def test_the_mean_over_batches_is_that_of_each_number() -> None:
    one, two = (Around(value, np.full(2, value), np.full((2, 2), value), np.full(2, value)) for value in (1.0, 3.0))
    both = mean([one, two])
    assert (both.divergence, both.slopes.tolist(), both.apart.tolist()) == (2.0, [2, 2], [[2, 2], [2, 2]])


def test_errors_of_a_state_are_those_against_the_state(replay: Replay) -> None:
    """An op that keeps its scheme makes no error, and `unquantized` has an error."""
    name = list(replay.sites)[0]
    replay.begin(token_batches(2)[BATCH])
    backward = Backward(replay, {name: ["weights", "unquantized"]}, 1, {name: "weights"})
    kept, back = backward.run(lambda logits, index: torch.ones_like(logits).cumsum(-1), lambda done, total: None)[name]
    assert not kept.any() and back.any()


def test_a_gradient_goes_through_the_quantized_weight_and_past_the_rounding_of_inputs(replay: Replay) -> None:
    site = next(iter(replay.sites.values()))
    served = site.served["W8A8"]
    x = torch.randn(3, site.module.weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = served.differentiable(x)
    assert torch.equal(output, served(x.detach()))
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, torch.ones_like(output) @ served.weight())
