"""Slopes at a mixed state say how the measured divergence changes when one unit changes its scheme."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.slopes import slopes
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay

# Weights alone, so that a change of one op does not draw the roundings of all ops behind it again.
WEIGHTS = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
FIELDS: dict[str, Any] = {"weights": WEIGHTS, "W8A8": {}}
SCHEMES = tuple(FIELDS)


@pytest.fixture
def replay() -> Iterator[Replay]:
    model = few_ops_model()
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    ops = [an_op(name, schemes=SCHEMES, shape=tuple(modules[name].weight.shape)) for name in names]
    with Replay(model, ops, "lm_head", schemes=schemes_of(FIELDS, model)) as made:
        made.calibrate(*token_batches(2))
        yield made


def divergence(replay: Replay, state: dict[str, str]) -> float:
    batch = token_batches(2)[1]
    return Reference(replay.begin(batch).clone(), None).compare(replay.run(state))["kl_divergence"]


def test_the_divergence_of_the_state_is_that_of_the_replay(replay: Replay) -> None:
    """The backward runs block by block, and its last output has the bits of a whole run."""
    state = {name: SCHEMES[index % 2] for index, name in enumerate(list(replay.sites)[:-1])}
    batch = token_batches(2)[1]
    found, of_none = slopes(replay, batch, state, {})
    assert (found, of_none) == (divergence(replay, state), {})


def test_slopes_and_losses_together_predict_each_change_and_losses_alone_do_not(replay: Replay) -> None:
    names = list(replay.sites)
    state = dict.fromkeys(names, "weights")
    whole, found = slopes(replay, token_batches(2)[1], state, {name: ([name], ["unquantized"]) for name in names})
    losses = [divergence(replay, {name: "weights"}) for name in names]
    measured = [divergence(replay, {other: "weights" for other in names if other != name}) - whole for name in names]
    predicted = [found[name]["unquantized"] + loss for name, loss in zip(names, losses, strict=True)]
    assert math.dist(predicted, measured) < 0.1 * math.hypot(*measured)
    assert math.dist([-loss for loss in losses], measured) > 0.3 * math.hypot(*measured)


def test_in_an_unquantized_model_every_slope_is_zero(replay: Replay) -> None:
    """The divergence has its least there."""
    names = list(replay.sites)
    whole, found = slopes(replay, token_batches(2)[1], {}, {name: ([name], ["weights"]) for name in names})
    assert whole == 0.0 and {value for of_unit in found.values() for value in of_unit.values()} == {0.0}


def test_a_unit_has_the_sum_of_its_ops_and_an_op_that_did_not_run_has_none(replay: Replay) -> None:
    first, second, *_ = replay.sites
    state = dict.fromkeys(replay.sites, "weights")
    wanted = {"a": ([first], ["W8A8"]), "b": ([second], ["W8A8"]), "both": ([first, second], ["W8A8"])}
    _, found = slopes(replay, token_batches(2)[1], state, wanted | {"absent": (["no.op"], ["W8A8"])})
    assert found["both"]["W8A8"] == pytest.approx(found["a"]["W8A8"] + found["b"]["W8A8"])
    assert found["absent"]["W8A8"] == 0.0


def test_errors_of_a_state_are_those_against_the_state(replay: Replay) -> None:
    """An op that keeps its scheme makes no error, and `unquantized` has the opposite error of the scheme."""
    name = list(replay.sites)[0]
    replay.begin(token_batches(2)[1])

    def products(state: dict[str, str], schemes: list[str]) -> torch.Tensor:
        backward = Backward(replay, {name: schemes}, 1, state)
        return backward.run(lambda logits, index: torch.ones_like(logits).cumsum(-1), lambda done, total: None)[name]

    kept, back = products({name: "weights"}, ["weights", "unquantized"])
    assert not kept.any() and back.any()
