"""The replay gives INC's numbers, runs no more than it has to, and leaves the model as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from build import IDENTITY, an_op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quick_inc import few_ops_model, plans_unchecked, token_batches
from safetensors.torch import save_file
from transformers import DynamicCache

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.data.digits import LIMITS
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.engine import measure_by_inc
from auto_quantize_model.inc.plan import build_plan, identify
from auto_quantize_model.made.digits import build_snapshot
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.states import ALL, states
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.sample import Sample
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.replay import model as replay_module
from auto_quantize_model.replay.forward import bytes_held_by
from auto_quantize_model.replay.model import AROUND, Replay, block_of
from auto_quantize_model.replay.scales import name_of_batch, read_scales, write_scales
from auto_quantize_model.schemes.scheme import assigned

MAPS = ("isolated", "fallback", "requantize")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small") / "snapshot"
    build_snapshot(directory, depth=2, hidden=32, seed=0)
    return load_model(directory)


@pytest.fixture(scope="module")
def plan(model, batches):
    with plans_unchecked():
        return identify(build_plan(model, batches, PlanSpec(confidence_batches=2, maps=MAPS)), *IDENTITY)


def start(model, plan, **options):
    return Replay(model, plan.ops, plan.measured_op, **options)


def captured(model, batches, plan, path):
    return capture_sensitivity(model, batches, plan, ScoreStore(path), by_inc=measure_by_inc)[0]


def mse_values(capture):
    return {(score.map, score.op_name, score.batch): score.mse_value for score in capture.scores}


@pytest.fixture(scope="module")
def tiny(tiny_snapshot, batches):
    """A model small enough for INC to measure all of it, and its plan for one batch."""
    model = load_model(tiny_snapshot)
    with plans_unchecked():
        return model, identify(build_plan(model, batches, PlanSpec(confidence_batches=1, maps=MAPS)), *IDENTITY)


@pytest.mark.slow
def test_every_value_of_every_map_is_incs_bit_for_bit(tiny, batches, tmp_path):
    model, plan = tiny
    replayed = captured(model, batches, plan, tmp_path / "a")
    by_inc = captured(model, batches, replace(plan, engine="inc"), tmp_path / "b")
    assert mse_values(replayed) == mse_values(by_inc)
    assert len(mse_values(replayed)) == 3 * len(plan.ops) + 1
    assert replayed.batches == by_inc.batches


@pytest.mark.slow
def test_with_auto_inc_measures_what_no_site_covers_and_the_values_are_the_same(tmp_path, monkeypatch):
    model, batches, uncovered = few_ops_model(), token_batches(1), "model.blocks.0.up"
    plan = identify(build_plan(model, batches, PlanSpec(confidence_batches=1, maps=MAPS[:2])), *IDENTITY)
    expected = mse_values(captured(model, batches, plan, tmp_path / "a"))
    monkeypatch.setattr(replay_module, "refusal", lambda module, op: "a test" if op.op_name == uncovered else "")
    with pytest.raises(InputError, match=r"1 of 7 ops cannot be replayed exactly, first .*\.up: a test; set sens"):
        start(model, plan)
    mixed = captured(model, batches, replace(plan, engine="auto"), tmp_path / "b")
    assert mse_values(mixed) == expected
    by_inc = {score.op_name for score in mixed.scores if score.map == "isolated" and score.divergence is None}
    assert by_inc == {uncovered}


@pytest.fixture(scope="module")
def scales(model, batches, plan):
    with start(model, plan) as replay:
        return replay.calibrate(batches[0])


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_ran_before_a_state_gives_the_same_bits(model, batches, plan, scales, data):
    """Kept outputs never change a result: any sequence of states equals runs that keep nothing."""
    names = plan.op_names
    subsets = data.draw(st.lists(st.sets(st.sampled_from(names)), min_size=2, max_size=5))
    outputs = []
    for cache_bytes in (0, 20_000, 1 << 30):
        with start(model, plan, cache_bytes=cache_bytes) as replay:
            replay.set_scales(scales)
            replay.begin(batches[0])
            outputs.append([replay.run(assigned(subset)).clone() for subset in subsets])
            assert replay.cached_bytes <= cache_bytes
    for other in outputs[1:]:
        assert all(torch.equal(left, right) for left, right in zip(outputs[0], other, strict=True))


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_states_that_advance_together_have_the_bits_that_each_has_alone(model, batches, plan, scales, data):
    """Also where some are left behind: they change nothing of the states after them."""
    subsets = data.draw(st.lists(st.sets(st.sampled_from(plan.op_names)), min_size=1, max_size=7))
    taken = data.draw(st.integers(0, len(subsets)))
    states = [assigned(subset) for subset in subsets]
    with start(model, plan) as replay:
        replay.set_scales(scales)
        replay.begin(batches[0])
        alone = [replay.run(state).clone() for state in states]
        replay.together = data.draw(st.integers(2, 5))
        begun = replay.run_each(states)
        assert all(torch.equal(next(begun), expected) for expected in alone[:taken])
        begun.close()
        found = list(replay.run_each(states[::-1]))
        assert torch.equal(replay.run({}), replay.measured)
    assert all(torch.equal(left, right) for left, right in zip(found, alone[::-1], strict=True))


@pytest.mark.slow
def test_fewer_states_advance_together_where_the_memory_for_kept_outputs_is_short(model, batches, plan, scales):
    states = [assigned([name]) for name in plan.op_names[-6:]]
    waiting = []
    for room in (0, 2, 100):
        with start(model, plan) as replay:
            replay.set_scales(scales)
            replay.begin(batches[0])
            replay.together, replay.cache_bytes = 4, replay.cached_bytes + room * AROUND * replay.waiting_bytes
            together = replay._together
            replay._together = lambda states, together=together: waiting.append(len(states)) or together(states)
            assert len(list(replay.run_each(states))) == 6
    assert waiting == [1] * 6 + [2] * 3 + [4, 2]


def test_what_a_waiting_block_gets_counts_with_the_cache_of_keys_and_values_and_without_weights_and_views():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), layer)
    hidden, mask = torch.zeros(5, 8), torch.zeros(5, dtype=torch.bool)
    given = {"past_key_values": cache, "mask": mask, "again": hidden[:3], "norm": torch.nn.Linear(8, 8)}
    assert bytes_held_by(((hidden, torch.nn.Parameter(hidden.clone())), given)) == 3 * 2 * 160 + 160 + 5


@pytest.mark.slow
def test_only_what_follows_a_change_runs_again(model, batches, plan):
    ran = []
    layers = [*model.model.visual.blocks, *model.model.language_model.layers]
    with start(model, plan) as replay:
        for number, layer in enumerate(layers):
            attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
            attention.register_forward_hook(lambda *_, number=number: ran.append(number))
        replay.calibrate(batches[0])
        assert ran == [0, 1, 2, 3]
        for op, expected in (
            ("lm_head", []),
            ("model.language_model.layers.1.mlp.up_proj", [3]),
            ("model.language_model.layers.0.mlp.up_proj", [2, 3]),
            ("model.visual.blocks.1.mlp.up_proj", [1, 2, 3]),
        ):
            ran.clear()
            replay.run(assigned([op]))
            assert ran == expected, op
    for layer in layers:
        (layer.attn if hasattr(layer, "attn") else layer.self_attn)._forward_hooks.clear()


@pytest.mark.slow
def test_the_model_is_as_before_also_after_an_error(model, batches, plan):
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(**batches[0]).logits
    with pytest.raises(RuntimeError), start(model, plan) as replay:
        replay.calibrate(batches[0])
        replay.run(assigned(["lm_head"]))
        with torch.no_grad():  # between runs it is its FP32 self as well
            assert torch.equal(model(**batches[0]).logits, expected)
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, expected)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_an_op_that_text_does_not_reach_has_no_record(model, processor, plan, tmp_path):
    texts = [collate([encode(Sample("text", "Which digit is this?"), processor, LIMITS)])]
    ran = [(0,) if op.op_name.startswith("model.visual.") else (1,) for op in plan.ops]
    ops = tuple(replace(op, executions=executions) for op, executions in zip(plan.ops, ran, strict=True))
    of_text = replace(plan, confidence_batches=1, ops=ops)
    capture = captured(model, texts, of_text, tmp_path / "a")
    scored = {score.op_name for score in capture.scores if score.op_name}
    assert scored == {name for name in plan.op_names if not name.startswith("model.visual.")}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


class Stack(torch.nn.Module):
    """Blocks that are run by `route`, and code between them that writes into what they return."""

    def __init__(self, route=lambda x: (0, 1, 2)):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(8, 5)
        self.route = route

    def forward(self, x):
        for index in self.route(x):
            x = self.blocks[index](x)
            x += 1  # in place, on purpose
        return self.head(x)


def stack_of(route=lambda x: (0, 1, 2)):
    torch.manual_seed(0)
    model = Stack(route).eval().requires_grad_(False)
    return model, [an_op(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def test_code_that_writes_into_a_blocks_output_does_not_reach_what_is_kept():
    model, ops = stack_of()
    names = [op.op_name for op in ops]
    results = []
    for cache_bytes in (0, 1 << 20):
        with Replay(model, ops, "head", cache_bytes=cache_bytes) as replay:
            replay.calibrate({"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1))})
            results.append([replay.run(state).clone() for _, _, state in states(replay.order, names, MAPS)])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_a_block_that_runs_twice_is_switched_in_both_and_kept_for_each():
    model, ops = stack_of(lambda x: (0, 1, 0, 2))
    x = torch.randn(4, 8)
    outputs = []
    for cache_bytes in (0, 1 << 20):
        with Replay(model, ops, "head", cache_bytes=cache_bytes) as replay:
            replay.calibrate({"x": x})
            assert replay.sequence == ["blocks.0", "blocks.1", "blocks.0", "blocks.2", "head"]
            assert replay.executions["blocks.0.linear"] == 2
            chosen = [{"head"}, {"blocks.2.linear"}, {"blocks.0.linear"}, {"blocks.1.linear", "head"}]
            outputs.append([replay.run(assigned(names)).clone() for names in chosen])
    assert all(torch.equal(left, right) for left, right in zip(*outputs, strict=True))


def test_a_model_that_chooses_its_way_by_values_is_refused():
    model, ops = stack_of()
    turns = iter([(0, 1, 2), (0, 2, 1)])
    model.route = lambda x: next(turns)
    with Replay(model, ops, "head") as replay:
        replay.calibrate({"x": torch.randn(4, 8)})
        with pytest.raises(InputError, match=r"blocks\.2 ran, unlike in the calibration"):
            replay.run(assigned(["blocks.0.linear"]))


def test_an_op_whose_input_is_not_finite_is_named():
    model, ops = stack_of()
    model.blocks[1].linear.weight[0, 0] = torch.inf
    with Replay(model, ops, "head") as replay, pytest.raises(InputError, match=r"blocks\.1\.linear: .* not finite"):
        replay.calibrate({"x": torch.randn(4, 8)})


def test_scales_of_a_file_give_the_bits_of_the_calibration_that_found_them(tmp_path):
    model, ops = stack_of()
    first, second = ({"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2))
    state = assigned(op.op_name for op in ops)
    with Replay(model, ops, "head") as replay:
        found = {name_of_batch(index): replay.calibrate(batch) for index, batch in enumerate((first, second))}
        replay.set_scales(found["batch_0"])
        replay.begin(first)
        expected = replay.run(state).clone()
        replay.set_scales(found["batch_1"])
        assert not torch.equal(replay.run(state), expected)
    write_scales(tmp_path / "scales.safetensors", found)
    stored = read_scales(tmp_path / "scales.safetensors")
    with Replay(model, ops, "head") as replay:
        replay.set_scales(stored["batch_0"])
        replay.begin(first)
        assert torch.equal(replay.run(state), expected)
        replay.set_scales({})
        assert torch.equal(replay.run(state), replay.begin(first))  # an op without scales stays in FP32


def test_a_file_that_holds_no_scales_or_half_of_an_ops_scales_is_refused_by_name(tmp_path):
    path = tmp_path / "scales.safetensors"
    save_file({"batch_0/head/in_scale": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"scales\.safetensors: batch_0/head has not exactly in_scale, in_zero_point"):
        read_scales(path)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match=r"scales\.safetensors: not a safetensors file .*--forcerun calibrate_scales"):
        read_scales(path)


def test_a_scheme_that_the_replay_does_not_know_is_refused():
    model, ops = stack_of()
    with Replay(model, ops, "head") as replay:
        replay.calibrate({"x": torch.randn(4, 8)})
        with pytest.raises(InputError, match="^head has no scheme fp4; its schemes are inc_int8$"):
            replay.run({"head": "fp4"})


@pytest.mark.parametrize(
    ("op", "block"), [("blocks.1.linear", "blocks.1"), ("head", "head"), ("blocks.2.linear", "blocks.2")]
)
def test_a_block_is_an_element_of_a_list_or_the_op_itself(op, block):
    assert block_of(stack_of()[0], op) == block


def test_an_element_of_a_list_that_is_itself_not_called_is_no_block():
    model, _ = stack_of()
    model.blocks[1] = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 8)})
    assert block_of(model, "blocks.1.linear") == "blocks.1.linear"


def test_an_op_that_runs_outside_of_its_block_is_refused():
    model, ops = stack_of()
    model.route = lambda x: model.blocks[1].linear(x) is x or (0, 1, 2)
    with (
        Replay(model, ops, "head") as replay,
        pytest.raises(
            InputError,
            match=r"^blocks\.1\.linear runs outside of blocks\.1, .*; set sensitivity.engine to inc",
        ),
    ):
        replay.calibrate({"x": torch.randn(4, 8)})


def test_states_run_from_the_last_op_to_the_first_and_requantize_as_planned():
    found = list(states(["a", "b"], ["b", "a", "never"], (*MAPS, ALL)))
    assert [(label, name) for label, name, _ in found] == [
        ("isolated", "b"),
        ("isolated", "a"),
        ("requantize", "b"),
        ("requantize", "a"),
        ("all", ""),
        ("fallback", "b"),
        ("fallback", "a"),
    ]
    assert [sorted(state) for _, _, state in found] == [["b"], ["a"], ["b"], ["a", "b"], ["a", "b"], ["a"], ["b"]]


@pytest.mark.gpu
def test_a_capture_on_the_gpu_ranks_as_on_the_cpu(model, batches, plan, tmp_path):
    from scipy.stats import spearmanr

    on_cpu = mse_values(captured(model, batches, plan, tmp_path / "a"))
    on_gpu = mse_values(captured(copy.deepcopy(model).cuda(), batches, plan, tmp_path / "b"))
    for label in MAPS:
        pairs = [(on_cpu[key], on_gpu[key]) for key in on_cpu if key[0] == label]
        assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.95
