"""On another device: the INT8 outputs of every op are the CPU's bits, and captures rank as on the CPU.

The plan is written here instead of by INC, so that a machine without INC can run this file.
"""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from build import ACTIVATION, a_plan, an_op
from scipy.stats import spearmanr

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.machine import choose_device, explained_out_of_memory
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import OpScales
from auto_quantize_model.replay import devices, ops
from auto_quantize_model.replay.devices import check_sites, op_inputs, site_differences
from auto_quantize_model.replay.model import Replay

MAPS = ("isolated", "fallback", "requantize")
KINDS = (torch.nn.Linear, torch.nn.Conv3d, torch.nn.Embedding)
IDS = {"name": "PlaceholderObserver", "dtype": "float32", "compute_dtype": "quint8"}  # of an embedding's input


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


def planned(model, reduced=False):
    """INC's plan of the model: which observers see the input, the output and the weight of each op."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            activation = IDS if isinstance(module, torch.nn.Embedding) else ACTIVATION | {"reduce_range": reduced}
            found.append(an_op(name, type(module).__name__, executions=(1, 1), activation=activation))
    return a_plan(found, maps=MAPS, measured_op="lm_head", reduce_range=reduced)


def captured(model, batches, device, path):
    model = copy.deepcopy(model).to(choose_device(device))
    return capture_sensitivity(model, batches, planned(model), ScoreStore(path))[0]


@pytest.fixture(autouse=True)
def torchs_settings():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not find_spec("neural_compressor"), reason="INC is not installed")
@pytest.mark.slow
def test_the_plan_of_these_tests_is_incs(model, batches):
    from auto_quantize_model.inc.plan import plan_ops
    from auto_quantize_model.inc_pytorch_mse_patching import activations_reduced

    with activations_reduced(True):
        by_inc = plan_ops(model, batches, PlanSpec(confidence_batches=2, maps=MAPS)).ops
    ours = {op.op_name: op for op in planned(model, reduced=True).ops}
    for op in by_inc:
        theirs, mine = op.inc_int8, ours.pop(op.op_name).inc_int8
        assert theirs.pattern == mine.pattern
        assert (theirs.activation.observer, theirs.weight.observer) == (mine.activation.observer, mine.weight.observer)
    assert not ours


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_op_gives_the_same_bits_on_the_device(model, batches, device, reduced):
    plan = planned(model, reduced)
    check_sites(model, batches[0], plan, plan.op_names, torch.device(device))
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())


def test_the_device_is_compared_also_where_torch_was_asked_for_deterministic_algorithms(model, batches):
    """A run on a GPU asks for them, and torch then refuses the CPU's INT8 kernels."""
    torch.use_deterministic_algorithms(True)
    check_sites(model, batches[0], planned(model), ["lm_head"], torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled()


def test_differing_bits_are_counted_for_each_op(model, batches):
    plan, names = planned(model), ["lm_head", "model.language_model.embed_tokens"]
    with Replay(model, plan.ops, plan.measured_op) as replay:
        scales = replay.calibrate(batches[0])
        inputs = op_inputs(replay, batches[0], names)
    wrong: Any = replay.sites[names[1]]
    wrong.scale = wrong.scale * 2
    found = site_differences(replay.sites, scales, inputs, plan.ops, torch.device("cpu"))
    assert found["lm_head"] == (0, batches[0]["input_ids"].numel() * model.lm_head.out_features)
    assert 0 < found[names[1]][0] <= found[names[1]][1]


def test_an_op_whose_bits_differ_is_refused_by_name(model, batches, monkeypatch):
    monkeypatch.setattr(devices, "site_differences", lambda *_: {"a": (0, 9), "lm_head": (2, 9)})
    with pytest.raises(InputError, match="^audit: 2 of 9 INT8 outputs of lm_head differ between cpu and CPU"):
        check_sites(model, batches[0], planned(model), ["lm_head"], torch.device("cpu"))


@pytest.mark.gpu
def test_a_capture_on_the_gpu_ranks_as_on_the_cpu_and_has_the_same_bits_each_time(model, batches, tmp_path):
    on_cpu, first, second = (
        captured(model, batches, device, tmp_path / f"{run}") for run, device in enumerate(("cpu", "cuda", "cuda"))
    )
    assert first == second
    for label in MAPS:
        cpu, gpu = ([score.mse_value for score in side.scores if score.map == label] for side in (on_cpu, first))
        assert spearmanr(cpu, gpu).statistic > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["exact", "saturating"])
@pytest.mark.parametrize("vnni", [True, False])
def test_the_formula_gives_the_same_bits_on_the_gpu_for_the_kernel_of_every_cpu(monkeypatch, kernel, vnni):
    """The inputs reach the highest codes, so pairs of products saturate where the kernel saturates."""
    monkeypatch.setattr(ops, "cpu_kernel", lambda: kernel)
    monkeypatch.setattr(ops, "has_vnni", lambda: vnni)
    torch.manual_seed(0)
    scales = OpScales(0.01, 117, 0.02, 130)
    linear, conv3d = torch.nn.Linear(65, 33), torch.nn.Conv3d(3, 24, (2, 7, 7), stride=(2, 7, 7))
    for module, x in ((linear, torch.randn(40, 65)), (conv3d, torch.randn(10, 3, 4, 14, 7))):
        outputs = []
        for device in ("cpu", "cuda"):
            site: Any = ops.SITES[type(module).__name__][1](module.to(device), an_op("op", type(module).__name__))
            site.set_scales(scales)
            outputs.append(site.by_formula(x.to(device)).cpu())
        assert torch.equal(*outputs)


@pytest.mark.gpu
def test_float32_on_the_gpu_is_float32():
    """TF32 has 10 bits of mantissa, and an error near 3e-4."""
    gpu = choose_device("cuda")
    x, weight = torch.randn(256, 512, device=gpu), torch.randn(128, 512, device=gpu)
    clip, kernel = torch.randn(8, 3, 2, 14, 14, device=gpu), torch.randn(16, 3, 2, 14, 14, device=gpu)
    linear, conv3d = torch.nn.functional.linear, torch.nn.functional.conv3d
    for work, left, right in ((linear, x, weight), (conv3d, clip, kernel)):
        exact = work(left.double(), right.double())
        assert (work(left, right).double() - exact).norm() / exact.norm() < 1e-5


@pytest.mark.gpu
def test_too_little_gpu_memory_is_explained():
    gpu = choose_device("cuda")
    with pytest.raises(InputError, match=r"^out of GPU memory: .* GiB are free \(.*\); lower calibration\.batch_size"):
        with explained_out_of_memory(gpu):
            torch.empty(1 << 46, dtype=torch.uint8, device=gpu)
