"""INC's own tuning on the replay: the same helpers' results, the same configurations in the same order."""

import copy
import logging
from contextlib import nullcontext

import neural_compressor.adaptor.pytorch as nc_pytorch
import neural_compressor.adaptor.torch_utils.util as nc_util
import pytest
import torch
from neural_compressor.adaptor.pytorch import PyTorch_FXAdaptor
from neural_compressor.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion
from neural_compressor.quantization import fit
from quick_inc import few_ops_model, token_batches
from torch.utils.data import DataLoader, TensorDataset
from transformers import Qwen2Config, Qwen2ForCausalLM

from auto_quantize_model.inc.accelerate import accelerated_mse_v2
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.inc.plan import quant_config
from auto_quantize_model.inc_pytorch_mse_patching import (
    HELPERS,
    activations_reduced,
    build_strategy,
    temporary_workspace,
    with_ops_in_fp32,
)


def text_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def incs_own_state():
    """INC keeps qconfigs in a global."""
    nc_util.op_cfg_mapping.clear()
    yield
    nc_util.op_cfg_mapping.clear()


@pytest.fixture
def prepared(monkeypatch):
    """The models that INC prepared for scoring: with the replay none, as its loops over ops are not entered."""
    calls = []
    deepcopy = copy.deepcopy
    monkeypatch.setattr(
        nc_util, "copy", type("copy", (), {"deepcopy": lambda model: calls.append(1) or deepcopy(model)})
    )
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("make", "falls_back"), [(text_model, 9), (few_ops_model, 1)])
def test_the_helpers_return_the_same_orders_and_leave_the_same_qconfigs(make, falls_back, prepared):
    """One after the other, as in a fit: the requantize helper reads the qconfigs that the fallback helper leaves.

    The fallback helper returns every op of the one model early. For the other it makes a second pass, on one op of ten.
    """
    model, batches = make(), CalibrationLoader(token_batches(1))
    strategy, tune_cfg = build_strategy(model, quant_config(1), batches)
    two_in_int8 = with_ops_in_fp32(tune_cfg, [name for name, _ in list(tune_cfg["op"])[2:]])
    results, copies = [], []
    for context in (nullcontext, accelerated_mse_v2):
        nc_util.op_cfg_mapping.clear()
        prepared.clear()
        found = []
        with activations_reduced(True), context():
            for start, fallback in ((copy.deepcopy(tune_cfg), True), (two_in_int8, False)):
                order = strategy.adaptor.calculate_op_sensitivity(
                    strategy.model, batches, start, None, 1, fallback=fallback
                )
                found.append((order, {name: bool(qconfig) for name, qconfig in nc_util.op_cfg_mapping.items()}))
        results.append(found)
        copies.append(len(prepared))
    assert results[0] == results[1]
    assert [len(order) for order, _ in results[0]] == [falls_back, len(tune_cfg["op"]) - 2]
    assert copies[0] > 10 and copies[1] == 0


def visited(accelerated):
    """The configurations that a whole fit quantizes, in order, and those of INC's names that it leaves replaced."""
    seen = []
    quantize = PyTorch_FXAdaptor.quantize
    # FP32, three configurations and one fallback below the goal, then above it: INC goes on to requantize.
    accuracies = iter([1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, *[0.5] * 20])

    def recording(self, tune_cfg, *args, **kwargs):
        seen.append({key: copy.deepcopy(value) for key, value in tune_cfg["op"].items()})
        return quantize(self, tune_cfg, *args, **kwargs)

    conf = PostTrainingQuantConfig(
        approach="static",
        quant_level=1,
        excluded_precisions=["bf16"],
        tuning_criterion=TuningCriterion(strategy="mse_v2", strategy_kwargs={"confidence_batches": 2}, max_trials=7),
        accuracy_criterion=AccuracyCriterion(tolerable_loss=0.0001),
    )
    batches = CalibrationLoader(token_batches(2))
    before = {name: getattr(nc_util, name) for name in HELPERS.values()}
    PyTorch_FXAdaptor.quantize = recording
    try:
        with temporary_workspace():
            if accelerated:
                with accelerated_mse_v2():
                    fit(few_ops_model(), conf, calib_dataloader=batches, eval_func=lambda model: next(accuracies))
            else:
                fit(few_ops_model(), conf, calib_dataloader=batches, eval_func=lambda model: next(accuracies))
    finally:
        PyTorch_FXAdaptor.quantize = quantize
    assert before == {name: getattr(nc_util, name) for name in HELPERS.values()}
    assert "sorted" not in vars(nc_util)
    return seen


@pytest.fixture
def orders(monkeypatch):
    """What INC's strategy gets from each request for an order of ops."""
    found = []
    ask = PyTorch_FXAdaptor.calculate_op_sensitivity
    monkeypatch.setattr(
        PyTorch_FXAdaptor,
        "calculate_op_sensitivity",
        lambda *args, **kwargs: found.append(list(ask(*args, **kwargs))) or list(found[-1]),
    )
    return found


@pytest.mark.slow
def test_a_whole_fit_visits_the_same_configurations_in_the_same_order(orders):
    by_inc = visited(accelerated=False)
    orders_by_inc = list(orders)
    orders.clear()
    by_replay = visited(accelerated=True)
    assert len(by_inc) > 4
    assert by_inc == by_replay
    assert len(orders) > 2
    assert orders == orders_by_inc


@pytest.mark.slow
def test_an_op_that_no_site_covers_goes_to_incs_own_helper_by_name(caplog):
    layers = torch.nn.Conv1d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(24, 4)
    model = torch.nn.Sequential(*layers).eval().requires_grad_(False)
    batches = DataLoader(TensorDataset(torch.randn(3, 1, 8), torch.zeros(3)), batch_size=3)
    strategy, tune_cfg = build_strategy(model, quant_config(1), batches)
    orders = []
    for context in (nullcontext, accelerated_mse_v2):
        with context(), caplog.at_level(logging.WARNING):
            orders.append(
                strategy.adaptor.calculate_op_sensitivity(
                    strategy.model, batches, copy.deepcopy(tune_cfg), None, 1, fallback=True
                )
            )
    assert orders[0] == orders[1]
    assert "mse_v2 is not accelerated: 0: a Conv1d whose stride is not its kernel" in caplog.text


def test_everything_is_restored_after_an_exception():
    before = {name: getattr(nc_util, name) for name in HELPERS.values()}
    with pytest.raises(RuntimeError), accelerated_mse_v2():
        raise RuntimeError
    assert before == {name: getattr(nc_util, name) for name in HELPERS.values()}


def test_reduce_range_is_that_of_the_argument_and_put_back():
    before = nc_pytorch.REDUCE_RANGE
    for wanted in (True, False):
        with pytest.raises(RuntimeError), accelerated_mse_v2(reduce_range=wanted):
            assert nc_pytorch.REDUCE_RANGE is wanted
            raise RuntimeError
    with accelerated_mse_v2():
        assert nc_pytorch.REDUCE_RANGE is before
    assert nc_pytorch.REDUCE_RANGE is before
