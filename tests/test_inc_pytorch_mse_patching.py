"""The patch captures what INC computes, changes nothing that INC returns, and leaves nothing behind."""

import builtins
import copy

import neural_compressor.adaptor.torch_utils.util as nc_util
import pytest
import torch
from neural_compressor.config import options
from quick_inc import few_ops_model, token_batches
from torch.ao.quantization.fx.utils import assert_and_get_unique_device

from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import quant_config
from auto_quantize_model.inc_pytorch_mse_patching import (
    activations_reduced,
    build_strategy,
    capture_mse_v2_sensitivity,
    run_single_mse_v2_sensitivity_pass,
    with_measured_op_last,
    with_ops_in_fp32,
)
from auto_quantize_model.models.snapshot import load_model

OPS = ["model.embed_tokens", "model.blocks.1.up", "lm_head"]


@pytest.fixture(scope="module")
def model():
    return few_ops_model()


@pytest.fixture(scope="module")
def loader():
    return CalibrationLoader(token_batches(1))


@pytest.fixture(scope="module")
def scored(model, loader):
    maps = ["fallback", "requantize", "isolated", "all_int8"]
    return run_single_mse_v2_sensitivity_pass(model, quant_config(1), loader, measured_op="lm_head", maps=maps)


def process_state(model):
    """Everything that a pass touches, with the weights last."""
    names = ("get_mse_order_per_fp32", "get_mse_order_per_int8", "sorted", "tqdm")
    return (
        {name: vars(nc_util).get(name) for name in names},
        dict(nc_util.op_cfg_mapping),
        torch.nn.Parameter.__deepcopy__,
        options.workspace,
        assert_and_get_unique_device.cache_info().currsize,  # each entry would keep a quantized copy of the model
        [len(module._forward_hooks) for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same_state(before, after):
    assert before[:-1] == after[:-1]
    assert before[-1].keys() == after[-1].keys()
    assert all(torch.equal(before[-1][name], after[-1][name]) for name in before[-1])


def test_every_op_of_the_plan_is_scored_in_all_maps(scored, model):
    planned = scored["fallback"].scores.keys()
    kinds = (torch.nn.Embedding, torch.nn.Linear)
    assert {name.removesuffix(".module") for name, _ in planned} == {
        name for name, module in model.named_modules() if isinstance(module, kinds)
    }
    assert scored["requantize"].scores.keys() == scored["isolated"].scores.keys() == planned
    assert len(set(scored["isolated"].scores.values())) == len(planned)


def test_first_requantized_op_equals_its_isolated_score_and_the_last_is_all_int8(scored):
    first, *_, last = scored["requantize"].scores
    assert scored["requantize"].scores[first] == scored["isolated"].scores[first]
    assert scored["requantize"].scores[last] == scored["all_int8"].scores[last]


def test_helpers_return_incs_ascending_order(scored):
    for helper in ("fallback", "requantize"):
        call = scored[helper]
        expected = call.second_pass or call.scores
        assert call.order == sorted(expected, key=expected.get)


@pytest.mark.parametrize(("kept", "falls_back"), [([], 1), (["model.blocks.1.up", "model.project"], 5)])
def test_patched_and_unpatched_helpers_return_the_same_order(model, loader, kept, falls_back):
    """The second helper scores what is in FP32 and in `op_cfg_mapping`, which the first one fills.

    With every op in INT8 the first helper makes its second pass, on one op. With fewer it returns all of them early.
    """
    strategy, tune_cfg = build_strategy(model, quant_config(1, kept), loader)
    name = next(name for name, _ in tune_cfg["op"] if name.startswith("lm_head"))
    tune_cfg = with_measured_op_last(tune_cfg, name)

    def orders():
        score = strategy.adaptor.calculate_op_sensitivity
        return [
            score(strategy.model, loader, copy.deepcopy(tune_cfg), None, 1, fallback=True),
            score(strategy.model, loader, with_ops_in_fp32(tune_cfg), None, 1, fallback=False),
        ]

    with activations_reduced(True), capture_mse_v2_sensitivity() as capture:
        patched = orders()
    hooks = {module: dict(module._forward_hooks) for module in model.modules()}
    mapping = dict(nc_util.op_cfg_mapping)
    try:
        with activations_reduced(True):
            unpatched = orders()
    finally:  # unpatched, INC leaves its hooks, its qconfigs and torch's cache behind
        assert_and_get_unique_device.cache_clear()
        for module, before in hooks.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(before)
        nc_util.op_cfg_mapping.clear()
        nc_util.op_cfg_mapping.update(mapping)
    assert patched == unpatched
    assert [call.order for call in capture.calls] == unpatched
    assert [len(order) for order in unpatched] == [falls_back, 7]
    first = capture.calls[0]
    expected = first.second_pass or first.scores
    assert first.order == sorted(expected, key=expected.get)


def test_nothing_is_left_behind_by_a_pass(model, loader):
    before = process_state(model)
    run_single_mse_v2_sensitivity_pass(model, quant_config(1), loader, measured_op="lm_head", only=OPS[:2])
    assert_same_state(before, process_state(model))


def test_hooks_that_a_model_adds_in_its_first_forward_stay(model, loader):
    def add(module, args):
        if not module.up._forward_hooks:  # as transformers does to record hidden states
            module.up.register_forward_hook(lambda module, args, output: None)

    handle = model.model.blocks[0].register_forward_pre_hook(add)
    run_single_mse_v2_sensitivity_pass(model, quant_config(1), loader, measured_op="lm_head", only=OPS[:1])
    handle.remove()
    assert len(model.model.blocks[0].up._forward_hooks) == 1 and not model.lm_head._forward_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_when_scoring_breaks_off(model, loader, error):
    before = process_state(model)

    def fail(label, name):
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        run_single_mse_v2_sensitivity_pass(model, quant_config(1), loader, measured_op="lm_head", on_op=fail)
    assert_same_state(before, process_state(model))


def test_nested_and_repeated_captures_restore_in_turn():
    original = nc_util.get_mse_order_per_fp32
    for _ in range(2):
        with capture_mse_v2_sensitivity():
            outer = nc_util.get_mse_order_per_fp32
            with capture_mse_v2_sensitivity():
                assert nc_util.get_mse_order_per_fp32 not in (outer, original)
            assert nc_util.get_mse_order_per_fp32 is outer
        assert nc_util.get_mse_order_per_fp32 is original
    assert not hasattr(nc_util, "sorted") or nc_util.sorted is builtins.sorted


def test_a_nested_capture_and_the_outer_one_both_see_the_call(model, loader):
    with capture_mse_v2_sensitivity() as outer:
        inner = run_single_mse_v2_sensitivity_pass(
            model, quant_config(1), loader, measured_op="lm_head", maps=["isolated"], only=["lm_head"]
        )
    assert outer.last("requantize").scores == inner["isolated"].scores != {}


def test_a_bounded_pass_gives_the_same_scores_as_the_whole(model, loader, scored):
    bounded = run_single_mse_v2_sensitivity_pass(
        model, quant_config(1), loader, measured_op="lm_head", maps=["fallback", "isolated"], only=OPS
    )
    for label, call in bounded.items():
        assert len(call.scores) == len(OPS)
        assert call.scores == {key: scored[label].scores[key] for key in call.scores}


def test_an_op_kept_in_fp32_is_not_scored_and_the_output_op_stays_the_measured_one(model, loader):
    kept = quant_config(1, ["model.embed_tokens"])
    maps = ["isolated", "requantize"]
    result = run_single_mse_v2_sensitivity_pass(model, kept, loader, measured_op="lm_head", maps=maps, only=OPS)
    assert {name for name, _ in result["isolated"].scores} == {name for name, _ in result["requantize"].scores}
    assert "model.embed_tokens" not in {name for name, _ in result["isolated"].scores}
    assert all(value > 0 for value in result["isolated"].scores.values())


def test_measuring_at_an_op_that_inc_does_not_plan_is_refused(model, loader):
    with pytest.raises(LookupError, match="cannot measure there"):
        run_single_mse_v2_sensitivity_pass(model, quant_config(1), loader, measured_op="model.blocks", only=OPS)


def test_fx_safe_patch_embedding_changes_no_bit(tiny_snapshot, batches):
    patch_embed = load_model(tiny_snapshot).model.visual.patch_embed
    original = copy.deepcopy(patch_embed)
    original.__class__ = type(patch_embed).__mro__[1]
    pixels = batches[0]["pixel_values"]
    assert torch.equal(original(pixels), patch_embed(pixels))
