"""Estimates by Fisher probes: the directions have the Fisher covariance, and estimates find the divergence."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from build import a_plan, an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.decide.stability import tau
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.probes import estimates, joined, probe
from auto_quantize_model.measure.states import UNITS
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Unit
from auto_quantize_model.replay import served
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay

SCHEMES = ("inc_int8", "W8A8", "FP8_DYNAMIC")


def alone(names):
    """Each op on its own, in all schemes."""
    return {name: ([name], SCHEMES) for name in names}


def test_estimates_come_near_the_exact_divergence_of_every_op_and_scheme():
    model, batches = few_ops_model(), token_batches(2)
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    ops = [an_op(name, schemes=SCHEMES, shape=tuple(modules[name].weight.shape)) for name in names]
    exact, values = {}, []
    with Replay(model, ops, "lm_head", schemes=schemes_of(dict.fromkeys(SCHEMES, {}), model)) as replay:
        for batch in batches:
            replay.set_scales(replay.calibrate(batch))
            reference = Reference(replay.begin(batch).clone(), None)
            for name in names:
                for scheme in SCHEMES:
                    record = reference.compare(replay.run({name: scheme}))
                    exact[scheme, name] = exact.get((scheme, name), 0) + record["divergence"] / len(batches)
            values.append(probe(replay, alone(names), range(64)))
    found = {(made.scheme, made.op_name): made for made in estimates(values)}
    assert found.keys() == exact.keys()
    for key, made in found.items():
        assert abs(made.divergence - exact[key]) < 4 * made.standard_error, key
    total = math.fsum(made.divergence for made in found.values())
    assert math.isclose(total, math.fsum(exact.values()), rel_tol=0.1)
    agreement = tau([exact[key] for key in exact], [found[key].divergence for key in exact])
    assert agreement is not None and agreement > 0.8


@pytest.mark.gpu
def test_the_estimates_of_a_gpu_are_those_of_the_cpu():
    schemes = ("inc_int8", "W8A8", "FP8", "NVFP4")
    found = []
    for device in ("cpu", "cuda"):
        model, batch = few_ops_model().to(device), token_batches(1)[0]
        modules = dict(model.named_modules())
        names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
        ops = [an_op(name, schemes=schemes, shape=tuple(modules[name].weight.shape)) for name in names]
        with Replay(model, ops, "lm_head", schemes=schemes_of(dict.fromkeys(schemes, {}), model)) as replay:
            replay.calibrate(batch)
            values = probe(replay, {name: ([name], schemes) for name in names}, range(8))
        found.append({(made.scheme, made.op_name): made.divergence for made in estimates([values])})
    here, there = found
    assert len(here) == len(schemes) * len(names) and there == pytest.approx(here, rel=1e-2)


def test_a_standard_error_and_a_split_half_are_those_of_the_probes():
    """A single row: the square of the sum is the sum of the squares."""
    of_batch = [[{"W8A8": {"op": [value, value]}} for value in (1.0, 2.0, 3.0, 6.0)]]
    (made,) = estimates(of_batch)
    # Exponentials of logarithms: their last bit differs between processors.
    assert (made.divergence, made.split_half) == pytest.approx((3.0, 2.0), rel=1e-14)
    # The mean ratio of one op has the same error as the op.
    assert math.isclose(made.standard_error, math.sqrt(2) * math.sqrt(14 / 3) / 2)


def test_an_op_counts_on_the_batches_on_which_it_ran():
    first = [{"W8A8": {"a": [1.0, 1.0], "b": [2.0, 2.0]}}, {"W8A8": {"a": [1.0, 1.0], "b": [4.0, 4.0]}}]
    second = [{"W8A8": {"a": [3.0, 3.0]}}, {"W8A8": {"a": [3.0, 3.0]}}]
    found = {made.op_name: made.divergence for made in estimates([first, second])}
    assert found == pytest.approx({"a": 2.0, "b": 3.0})


def drawn(ratios, probes=16, rows=256, draws=40):
    """Squared sums and sums of squares of ops with true divergences and the ratios of the two: (draws, ops, probes)."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.normal(0, 1, len(ratios)))
    shape = (draws, len(ratios), probes)
    whole = (sizes * ratios)[:, None] * generator.normal(0, 1, shape) ** 2
    return sizes * ratios, whole, sizes[:, None] * generator.chisquare(rows, shape) / rows


@pytest.mark.parametrize(("spread", "share"), [(0.0, 0.3), (0.2, 0.6), (1.0, 1.01)])
def test_the_two_values_of_a_probe_together_are_nearer_the_truth_than_the_first(spread, share):
    """Whether the rows of all ops act alike, or each op has a nature of its own."""
    ratios = 1.3 * np.exp(np.random.default_rng(1).normal(0, spread, 60))
    truth, whole, apart = drawn(ratios)

    def off(values):
        return float(np.mean((values.mean(-1) / truth - 1) ** 2) ** 0.5)

    both = [joined(*pair) for pair in zip(whole, apart, strict=True)]
    errors = np.array([np.sqrt(values.var(1, ddof=1) / values.shape[1] + unseen) for values, unseen in both])
    values = np.stack([values for values, _ in both])
    assert off(values) < share * off(whole)
    stated = float(np.mean((errors / truth) ** 2) ** 0.5)
    assert 0.9 * off(values) < stated < 1.7 * off(values)


def test_ops_without_a_gradient_have_no_divergence():
    assert [made.divergence for made in estimates([[{"W8A8": {"a": [0.0, 0.0]}}] * 2])] == [0.0]
    values, unseen = joined(np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert values[0].tolist() == [0.0, 0.0] and unseen[0] == 0.0


def planned():
    model = few_ops_model()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ops = [an_op(name, schemes=SCHEMES, shape=(16, 16), executions=(1, 1)) for name in names]
    return model, token_batches(2), a_plan(ops, schemes=dict.fromkeys(SCHEMES, {}), measured_op="lm_head")


def test_a_capture_measures_the_ops_with_the_largest_estimates_and_estimates_all(tmp_path):
    model, batches, plan = planned()
    said = []
    capture, record = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), exact="top:1", say=said.append)
    assert (capture.effort.exact, capture.effort.probes) == ("top:1", 16) and len(said) == 1
    assert record["resumed_scores"] == 0
    exact, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path))
    assert exact.effort.exact == "all" and exact.estimates == ()
    for scheme in SCHEMES:
        made = capture.estimates_of(scheme)
        assert made.keys() == set(plan.op_names)
        measured, whole = (of.of_map("isolated", scheme) for of in (capture, exact))
        assert max(made, key=lambda name: made[name].divergence) in measured
        assert 1 <= len(measured) <= 2 and measured.items() <= whole.items()
        assert capture.all_in(scheme) == exact.all_in(scheme)


def test_probes_are_resumed_and_do_not_depend_on_their_number(tmp_path):
    model, batches, plan = planned()
    store = ScoreStore(tmp_path)
    first, _ = capture_sensitivity(model, batches, plan, store, exact="none")
    assert not first.of_map("isolated") and first.all_in("inc_int8")
    again, record = capture_sensitivity(model, batches, plan, store, exact="none")
    assert again == first and record["resumed_scores"] == 2 * (16 + len(SCHEMES))
    with Replay(model, plan.ops, "lm_head", schemes=schemes_of(dict.fromkeys(SCHEMES, {}), model)) as replay:
        replay.calibrate(batches[0])
        replay.begin(batches[0])
        one, (_, two) = (probe(replay, alone(plan.op_names), seeds) for seeds in ([7], [3, 7]))
    for scheme, values in one[0].items():
        for name, pair in values.items():
            assert pair == pytest.approx(two[scheme][name], rel=1e-4)


def test_a_measured_op_that_stays_in_fp32_is_no_obstacle(tmp_path):
    model, batches, plan = planned()
    plan = replace(plan, ops=tuple(op for op in plan.ops if op.op_name != "lm_head"))
    forward = vars(model.lm_head).get("forward")
    capture, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), exact="none")
    assert capture.estimates_of("W8A8").keys() == set(plan.op_names)
    assert all(made.divergence > 0 for made in capture.estimates)
    assert vars(model.lm_head).get("forward") is forward


def test_a_plan_of_which_nothing_runs_on_a_batch_is_measured(tmp_path):
    model, batches, plan = planned()
    model.spare = torch.nn.Linear(16, 16)
    plan = replace(plan, ops=(an_op("spare", shape=(16, 16), schemes=SCHEMES, executions=(0, 0)),))
    for exact in ("all", "none"):
        capture, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), exact=exact)
        assert not capture.of_map("isolated") and not capture.estimates


UNIT = "model.blocks.0.up+down"
PAIR = ("model.blocks.0.up", "model.blocks.0.down")


def with_unit(plan):
    """The plan with two ops of a block as a unit, and all others alone."""
    others = [Unit(name, (name,), False, SCHEMES[1:], {}) for name in plan.op_names if name not in PAIR]
    return replace(plan, units=(Unit(UNIT, PAIR, False, SCHEMES[1:], {}), *others))


def test_a_unit_of_several_ops_is_measured_as_one_in_the_candidates(tmp_path):
    model, batches, plan = planned()
    plan = with_unit(plan)
    capture, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), candidates=["W8A8"])
    assert capture.candidates == ("W8A8",) and capture.of_map(UNITS, "W8A8").keys() == {UNIT}
    assert not capture.of_map(UNITS, "FP8_DYNAMIC") and not capture.of_map(UNITS)
    with Replay(model, plan.ops, "lm_head", schemes=schemes_of(dict.fromkeys(SCHEMES, {}), model)) as replay:
        replay.set_scales(replay.calibrate(batches[1]))
        reference = Reference(replay.begin(batches[1]).clone(), None)
        record = reference.compare(replay.run(dict.fromkeys(PAIR, "W8A8")))
    found = capture.of_map(UNITS, "W8A8")[UNIT][1]
    assert {key: getattr(found, key) for key in record} == record
    others, _ = capture_sensitivity(model, batches, plan, ScoreStore(tmp_path))
    assert others.of_map("isolated", "W8A8") == capture.of_map("isolated", "W8A8")


def test_the_estimate_of_a_unit_comes_near_its_divergence_and_is_no_sum_of_its_ops(tmp_path):
    model, batches, plan = planned()
    plan, store = with_unit(plan), ScoreStore(tmp_path)
    exact, _ = capture_sensitivity(model, batches, plan, store, candidates=["FP8_DYNAMIC"])
    with Replay(model, plan.ops, "lm_head", schemes=schemes_of(dict.fromkeys(SCHEMES, {}), model)) as replay:
        values = []
        for batch in batches:
            replay.set_scales(replay.calibrate(batch))
            replay.begin(batch)
            values.append(probe(replay, {**alone(PAIR), UNIT: (PAIR, ["FP8_DYNAMIC"])}, range(64)))
    made = {found.op_name: found for found in estimates(values) if found.scheme == "FP8_DYNAMIC"}
    scores = exact.of_map(UNITS, "FP8_DYNAMIC")[UNIT]
    together = math.fsum(score.divergence for score in scores) / len(scores)
    assert abs(made[UNIT].divergence - together) < 4 * made[UNIT].standard_error
    assert made[UNIT].divergence != sum(made[name].divergence for name in PAIR)


def test_the_top_of_the_units_is_measured_besides_the_top_of_the_ops(tmp_path):
    model, batches, plan = planned()
    plan = with_unit(plan)
    capture, _ = capture_sensitivity(
        model, batches, plan, ScoreStore(tmp_path), exact="top:1", candidates=["W8A8", "FP8_DYNAMIC"]
    )
    for scheme in SCHEMES[1:]:
        assert capture.of_map(UNITS, scheme).keys() == {UNIT}
        assert capture.estimates_of(scheme).keys() == {*plan.op_names, UNIT}
        assert 1 <= len(capture.of_map("isolated", scheme)) <= 2
    assert UNIT not in capture.estimates_of("inc_int8")


def test_an_estimate_that_is_not_finite_is_named(tmp_path, monkeypatch):
    model, batches, plan = planned()
    exact = served.quantized_weight
    monkeypatch.setattr(served, "quantized_weight", lambda *args: exact(*args) * math.nan)
    with pytest.raises(InputError, match=r"^batch 0, map isolated, scheme W8A8: estimated divergence of \S+ is nan"):
        capture_sensitivity(model, batches, plan, ScoreStore(tmp_path), exact="none")


@pytest.mark.parametrize("asked", [{"exact": "none"}, {"exact": "auto", "time_budget": "5m"}])
def test_estimates_are_refused_where_inc_measures_too(tmp_path, asked):
    model, batches, plan = planned()
    with pytest.raises(InputError, match="^the plan's engine is auto, and estimates need the replay alone; set"):
        capture_sensitivity(model, batches, replace(plan, engine="auto"), ScoreStore(tmp_path), **asked)
