"""A replayed model in any assignment of schemes has the bits of the model that compressed-tensors quantizes."""

import copy
import weakref

import numpy as np
import pytest
import torch
from build import a_plan, an_op

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.models.units import unit_of
from auto_quantize_model.records import ObservedRange, Op, OpScales
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.replay.served import Kept, LastInput, Served
from auto_quantize_model.schemes.compressed import PRESETS, refusal, scheme_of
from auto_quantize_model.schemes.scheme import assigned

GROUPS = {"weights": {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": False}}
SCHEMES = {name: scheme_of(name) for name in ("W8A8", "FP8", "FP8_DYNAMIC", "W4A16", "NVFP4", "MXFP4", "MXFP8A16")}
SCHEMES["INT4_16"] = scheme_of("INT4_16", GROUPS)


def planned(model: torch.nn.Module) -> list[Op]:
    """The model's Linears with the schemes that each can have."""
    modules = dict(model.named_modules())
    ops = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            shape = tuple(module.weight.shape)
            able = tuple(key for key, scheme in SCHEMES.items() if not refusal(scheme, "Linear", shape))
            ops.append(an_op(name, shape=shape, schemes=("inc_int8", *able), unit=unit_of(name, modules)))
    return ops


@pytest.fixture(scope="module")
def model(tiny_snapshot):
    return load_model(tiny_snapshot)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_scheme_and_mixed_assignments_have_the_bits_of_compressed_tensors(model, batches, device):
    model = copy.deepcopy(model).to(device)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    ops = planned(model)
    names = {scheme: [op.op_name for op in ops if scheme in op.schemes] for scheme in SCHEMES}
    assert all(names.values()) and len(names["W4A16"]) == 2  # of the merger, whose columns 128 divides
    generator = np.random.default_rng(0)
    states = [assigned(able, scheme) for scheme, able in names.items()]
    for _ in range(3):
        drawn = {op.op_name: str(generator.choice([*op.schemes[1:], ""])) for op in ops}
        states.append({name: scheme for name, scheme in drawn.items() if scheme})
    states += [{able[-1]: scheme} for scheme, able in names.items()]
    with Replay(model, ops, "lm_head") as replay:
        seen = replay.calibrate(*batches)
    library = Library(model, a_plan(ops), SCHEMES, seen)
    expected = [[library.logits(batch, state) for state in states] for batch in batches]
    with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
        replay.set_scales(seen)
        for batch, of_batch in zip(batches, expected, strict=True):
            fp32 = replay.begin(batch).clone()
            for state, output in zip(states, of_batch, strict=True):
                assert torch.equal(replay.run(state), output) and not torch.equal(output, fp32), state
            assert torch.equal(replay.run({}), fp32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_a_gpu_rounds_weights_and_inputs_to_the_bits_of_the_cpu(name):
    torch.manual_seed(0)
    module, x = torch.nn.Linear(256, 64).requires_grad_(False), torch.randn(2, 24, 256)
    module.weight *= torch.logspace(-8, 8, 64, base=2)[:, None]
    x *= torch.logspace(-8, 8, 48, base=2).reshape(2, 24, 1)
    scales = OpScales(input=ObservedRange(float(x.min()) / 2, float(x.max()) / 2))
    found = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(module).to(device)
        served = Served(there, scheme_of(name), [there.weight], Kept(), LastInput())
        served.set_range(scales)
        found.append((served.weight().cpu(), served.served_input(x.to(device)).cpu(), served(x.to(device)).cpu()))
    (weight, inputs, output), (weight_there, inputs_there, output_there) = found
    assert torch.equal(weight, weight_there) and torch.equal(inputs, inputs_there)
    assert not torch.equal(weight, module.weight)
    assert (output_there - output).norm() < 1e-5 * output.norm()  # sums of float32 have another order


def test_an_op_without_the_scheme_is_refused_by_name(model):
    ops = planned(model)
    with (
        Replay(model, ops, "lm_head", schemes=SCHEMES) as replay,
        pytest.raises(
            InputError, match=r"^lm_head has no scheme W4A16; its schemes are inc_int8, W8A8, FP8, FP8_DYNAMIC, NVFP4, "
        ),
    ):
        replay.run({"lm_head": "W4A16"})


def test_weights_are_made_once_while_they_fit():
    made: list[int] = []

    def make(key: int) -> torch.Tensor:
        made.append(key)
        return torch.full((4,), float(key))

    kept = Kept(limit=32)
    for key in (1, 2, 1, 3, 1, 2):
        assert kept.get(key, lambda key=key: make(key)).tolist() == [key] * 4
    assert made == [1, 2, 3, 2] and kept.bytes == 32


def test_an_input_is_quantized_once_for_the_ops_that_share_it_and_again_when_it_changed():
    last, made = LastInput(), []
    x, other = torch.zeros(2), torch.zeros(2)

    def get(x: torch.Tensor, ends: tuple[float, float] | None = None) -> torch.Tensor:
        return last.get(x, ends, lambda: made.append(x) or x + len(made))

    assert get(x).tolist() == get(x).tolist() == [1, 1] and len(made) == 1
    assert get(other).tolist() == [2, 2] and get(x).tolist() == [3, 3]  # equal values, but other tensors
    x += 1
    assert get(x).tolist() == [5, 5]
    assert get(x, (0, 1)).tolist() == [6, 6] and get(x, (0, 1)).tolist() == [6, 6] and get(x, (0, 2)).tolist() == [7, 7]
    with torch.inference_mode():
        untracked = torch.zeros(2)
        assert [get(untracked).tolist(), get(untracked).tolist()] == [[7, 7], [8, 8]]


def test_the_last_input_does_not_stay_in_memory():
    last, x = LastInput(), torch.zeros(2)
    last.get(x, None, lambda: torch.ones(2))
    seen = weakref.ref(x)
    del x
    assert seen() is None
