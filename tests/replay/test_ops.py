"""The arithmetic of the sites, bit for bit that of torch's quantized modules, over shapes, scales and zero points."""

from dataclasses import replace

import pytest
import torch
from build import ACTIVATION, EMBEDDING, WEIGHT, an_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import has_vnni
from auto_quantize_model.records import OpScales
from auto_quantize_model.replay.ops import LINEAR_RELU, SITES, ConvSite, LinearSite, refusal
from auto_quantize_model.schemes import inc_int8
from auto_quantize_model.schemes.inc_int8 import (
    check_integer_matmul,
    cpu_kernel,
    integer_matmul,
    quantize,
    quantize_weight,
    require_formula,
    saturation,
)

seeds = st.integers(0, 2**32 - 1)
exponents = st.floats(-6, 6)  # of ten
zero_points = st.one_of(st.sampled_from([0, 255]), st.integers(0, 255))
sizes = st.integers(1, 70)


def op(op_type, **changes):
    return an_op("op", op_type, **changes)


def site_for(module, **changes):
    op_type = type(module).__name__
    return SITES[op_type][1](module, op(op_type, **changes))


def set_qparams(site, in_scale, in_zero, out_scale, out_zero):
    site.set_scales(OpScales(float32(in_scale), in_zero, float32(out_scale), out_zero))


def differing(ours, theirs):
    """Number of elements whose bits differ; -0.0 and 0.0 do."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    return int((ours.contiguous().view(torch.int32) != theirs.contiguous().view(torch.int32)).sum())


def per_channel(module, scale):
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch.quantize_per_channel(module.weight.detach(), scale.double(), zeros, 0, torch.qint8)


def float32(value):
    return float(torch.tensor(value))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])  # as on CPU, as on CUDA
@given(seed=seeds, exponent=exponents, zero_point=zero_points, size=st.integers(1, 5000), spread=st.floats(0.1, 4))
def test_an_input_is_quantized_as_torch_does(wide, seed, exponent, zero_point, size, spread):
    torch.manual_seed(seed)
    scale = float32(10.0**exponent)
    x = torch.randn(size) * scale * 128 * spread
    x[::3] = (torch.randint(-300, 300, x[::3].shape) + 0.5) * scale  # near every tie
    expected = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).int_repr().int() - 128
    assert torch.equal(quantize(x, torch.tensor(scale), zero_point, wide).int(), expected)


@given(seed=seeds, exponent=exponents, rows=sizes, columns=sizes)
def test_a_weight_is_quantized_as_torch_does(seed, exponent, rows, columns):
    torch.manual_seed(seed)
    module = torch.nn.Linear(columns, rows)
    module.weight.data *= 10.0**exponent * 10.0 ** torch.empty(rows, 1).uniform_(-3, 3)
    module.weight.data[0] = 0.0
    site = site_for(module)
    assert torch.equal(site.codes, per_channel(module, site.w_scale).int_repr())
    assert torch.equal(site.codes, quantize_weight(module.weight.detach(), site.w_scale))


@settings(max_examples=300)
@given(
    seed=seeds,
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    sizes=st.tuples(sizes, sizes),
    exponents=st.tuples(exponents, exponents, exponents),
    zeros=st.tuples(zero_points, zero_points),
    bias=st.booleans(),
    relu=st.booleans(),
)
def test_a_linear_is_torchs_quantized_linear_and_so_is_its_formula(seed, shape, sizes, exponents, zeros, bias, relu):
    """With a ReLU that INC fuses, it is torch's quantized LinearReLU."""
    torch.manual_seed(seed)
    (columns, rows), (x_exponent, w_exponent, y_exponent) = sizes, exponents
    module = torch.nn.Linear(columns, rows, bias=bias)
    module.weight.data *= 10.0**w_exponent
    site = site_for(module, pattern=LINEAR_RELU if relu else "Linear")
    in_scale = float32(10.0**x_exponent)
    # From a tenth of the range to ten times it, so that some outputs saturate.
    out_scale = float32(in_scale * float(module.weight.detach().abs().max()) * columns**0.5 * 10.0 ** (y_exponent / 6))
    set_qparams(site, in_scale, zeros[0], out_scale, zeros[1])
    theirs = (nniq.LinearReLU if relu else nnq.Linear)(columns, rows, bias)
    theirs.set_weight_bias(per_channel(module, site.w_scale), module.bias)
    theirs.scale, theirs.zero_point = out_scale, zeros[1]
    x = torch.randn(*shape, columns) * in_scale * 100
    expected = theirs(torch.quantize_per_tensor(x, in_scale, zeros[0], torch.quint8)).dequantize()
    assert differing(site.quantized(x), expected) == 0
    assert differing(site.by_formula(x), expected) == 0
    if relu:  # the model's own ReLU, which follows, changes nothing
        assert differing(site.quantized(x).relu(), expected) == 0


@given(
    seed=seeds,
    images=st.integers(1, 4),
    channels=st.integers(2, 4),  # with one channel, oneDNN's result is wrong for some shapes with a large zero_point
    rows=sizes,
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    patches=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rest=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    exponents=st.tuples(exponents, exponents, exponents),
    zeros=st.tuples(zero_points, zero_points),
    bias=st.booleans(),
)
def test_a_patch_embedding_in_two_dimensions_is_torchs_quantized_convolution_and_so_is_its_formula(
    seed, images, channels, rows, kernel, patches, rest, exponents, zeros, bias
):
    """Also where the image does not divide into patches, and the last rows and columns belong to none."""
    torch.manual_seed(seed)
    x_exponent, w_exponent, y_exponent = exponents
    module = torch.nn.Conv2d(channels, rows, kernel, stride=kernel, bias=bias)
    module.weight.data *= 10.0**w_exponent
    site = site_for(module)
    in_scale = float32(10.0**x_exponent)
    width = (channels * kernel[0] * kernel[1]) ** 0.5
    out_scale = float32(in_scale * float(module.weight.detach().abs().max()) * width * 10.0 ** (y_exponent / 6))
    set_qparams(site, in_scale, zeros[0], out_scale, zeros[1])
    theirs = nnq.Conv2d(channels, rows, kernel, stride=kernel, bias=bias)
    theirs.set_weight_bias(per_channel(module, site.w_scale), module.bias)
    theirs.scale, theirs.zero_point = out_scale, zeros[1]
    height, wide = (count * side + more % side for count, side, more in zip(patches, kernel, rest, strict=True))
    x = torch.randn(images, channels, height, wide) * in_scale * 100
    expected = theirs(torch.quantize_per_tensor(x, in_scale, zeros[0], torch.quint8)).dequantize()
    assert differing(site.quantized(x), expected) == 0
    assert differing(site.by_formula(x), expected) == 0


@given(seed=seeds, patches=st.integers(1, 40), zeros=st.tuples(zero_points, zero_points), bias=st.booleans())
def test_a_patch_embedding_is_torchs_quantized_convolution_and_so_is_its_formula(seed, patches, zeros, bias):
    torch.manual_seed(seed)
    module = torch.nn.Conv3d(3, 24, (2, 7, 7), stride=(2, 7, 7), bias=bias)
    site = site_for(module)
    set_qparams(site, float32(0.031), zeros[0], float32(0.017), zeros[1])
    theirs = nnq.Conv3d(3, 24, (2, 7, 7), stride=(2, 7, 7), bias=bias)
    theirs.set_weight_bias(per_channel(module, site.w_scale), module.bias)
    theirs.scale, theirs.zero_point = site.out_scale.item(), zeros[1]
    x = torch.randn(patches, 3, 4, 14, 7)
    expected = theirs(torch.quantize_per_tensor(x, site.in_scale.item(), zeros[0], torch.quint8)).dequantize()
    assert differing(site.quantized(x), expected) == 0
    assert differing(site.by_formula(x), expected) == 0


@given(seed=seeds, length=st.integers(2, 40), side=st.integers(1, 2), zeros=st.tuples(zero_points, zero_points))
def test_a_convolution_over_positions_is_torchs_quantized_one_and_so_is_its_formula(seed, length, side, zeros):
    torch.manual_seed(seed)
    module = torch.nn.Conv1d(16, 24, side, stride=side)
    site = site_for(module)
    set_qparams(site, float32(0.031), zeros[0], float32(0.017), zeros[1])
    theirs = nnq.Conv1d(16, 24, side, stride=side)
    theirs.set_weight_bias(per_channel(module, site.w_scale), module.bias)
    theirs.scale, theirs.zero_point = site.out_scale.item(), zeros[1]
    x = torch.randn(2, 16, length)
    expected = theirs(torch.quantize_per_tensor(x, site.in_scale.item(), zeros[0], torch.quint8)).dequantize()
    assert differing(site.quantized(x), expected) == 0
    assert differing(site.by_formula(x), expected) == 0


@given(seed=seeds, exponent=exponents, rows=sizes, columns=sizes)
def test_an_embedding_is_torchs_quantized_embedding(seed, exponent, rows, columns):
    torch.manual_seed(seed)
    module = torch.nn.Embedding(rows, columns)
    module.weight.data *= 10.0**exponent
    module.weight.data[0] = 0.25
    site = site_for(module)
    weight = torch.quantize_per_channel(module.weight.detach(), site.scale, site.zero, 0, torch.quint8)
    theirs = nnq.Embedding(rows, columns)
    theirs.set_weight(
        torch.ops.aten.quantize_per_channel(module.weight.detach(), site.scale, site.zero, 0, torch.quint8)
    )
    assert weight.qscheme() == torch.per_channel_affine_float_qparams
    ids = torch.randint(0, rows, (2, 30))
    assert differing(site.quantized(ids), theirs(ids)) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (16, 9, 7), (17, 64, 33), (300, 1000, 130)])
def test_the_integer_product_is_exact_at_odd_shapes(device, shape):
    m, k, n = shape
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    x[0], weight[0] = -128, -128
    product = integer_matmul(x.to(device), weight.to(device)).cpu()
    assert product.dtype == torch.int32
    assert torch.equal(product.double(), x.double() @ weight.double().t())
    check_integer_matmul(torch.device(device))


def test_a_product_that_is_not_exact_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: (x.int() @ weight.int()).clamp(-(2**15), 2**15 - 1))
    with pytest.raises(InputError, match="not exact on this cpu; set sensitivity.device to cpu"):
        check_integer_matmul(torch.device("cpu"))


def test_a_pair_of_products_saturates_at_int16():
    """By hand: the CPU multiplies x + 128. Columns 0 and 1 are one pair, columns 2 and 3 the next, 4 stands alone."""
    x = torch.tensor([[127, 127, 127, -128, 127], [-128, -128, 0, 0, 0], [0, 0, 2, 3, 127]], dtype=torch.int8)
    weight = torch.tensor([[127, 127, 127, 127, 127], [-128, -128, 127, -128, -128]], dtype=torch.int8)
    # Row 0, column pair 0: 255 * 127 * 2 = 64770 becomes 32767; 255 * -128 * 2 = -65280 becomes -32768.
    # Row 1: codes 0 and 128: 128 * 127 * 2 = 32512 fits; row 2: (130 + 131) * 127 = 33147 becomes 32767.
    expected = [[32767 - 64770, -32768 + 65280], [0, 0], [32767 - 33147, 0]]
    assert saturation(x, weight).tolist() == expected


def test_the_kernel_of_this_cpu_is_known_and_tells_how_it_adds():
    """Codes above 127 in both columns of a pair: 255 * 127 * 2 = 64770 where exact, 32767 where the pair saturates."""
    site = site_for(torch.nn.Linear(2, 1, bias=False))
    site.module.weight.data[:] = 1.0
    site = site_for(site.module)
    set_qparams(site, 1.0, 0, float(site.w_scale) * 254.0, 0)
    product = {"exact": 64770, "saturating": 32767}[cpu_kernel()]
    assert site.quantized(torch.tensor([[255.0, 255.0]])).item() == pytest.approx(
        product * float(site.w_scale), rel=1e-2
    )
    assert cpu_kernel() == "exact" or not has_vnni()


def test_a_kernel_that_the_formula_does_not_know_keeps_the_replay_on_the_cpu(monkeypatch):
    monkeypatch.setattr(inc_int8, "cpu_kernel", lambda: "unknown")
    require_formula(torch.device("cpu"))
    with pytest.raises(InputError, match="set sensitivity.device to cpu"):
        require_formula(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 64, 192), (126, 2048, 256), (1, 65, 33)])
def test_a_site_gives_the_same_bits_on_the_gpu(shape):
    tokens, columns, rows = shape
    torch.manual_seed(0)
    module, x = torch.nn.Linear(columns, rows), torch.randn(tokens, columns)
    on_cpu = site_for(module)
    set_qparams(on_cpu, 0.03, 117, 0.02, 130)
    expected = on_cpu.quantized(x)
    on_gpu = site_for(module.cuda())
    set_qparams(on_gpu, 0.03, 117, 0.02, 130)
    assert differing(on_gpu.quantized(x.cuda()).cpu(), expected) == 0


@pytest.mark.parametrize(
    ("module", "entry", "reason"),
    [
        (torch.nn.Linear(2, 2), op("Linear", pattern="LinearBn1d"), "fuses it into a LinearBn1d"),
        (torch.nn.Conv2d(1, 1, 2, stride=2), op("Conv2d", pattern="ConvReLU2d"), "fuses it into a ConvReLU2d"),
        (torch.nn.LSTM(2, 2), op("LSTM"), "no site for op type LSTM"),
        (torch.nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2), op("Linear"), "NonDynamically"),
        (torch.nn.Conv3d(1, 1, 3), op("Conv3d"), "stride is not its kernel"),
        (torch.nn.Conv3d(1, 1, 3, stride=3, padding=1), op("Conv3d"), "has padding"),
        (torch.nn.Conv2d(1, 1, 3, stride=2), op("Conv2d"), "a Conv2d whose stride is not its kernel"),
        (torch.nn.Conv2d(1, 1, 2, stride=2, padding="valid"), op("Conv2d"), "has padding"),
        (torch.nn.Conv2d(2, 2, 2, stride=2, groups=2), op("Conv2d"), "or groups"),
        (torch.nn.Conv2d(1, 1, 2, stride=2, dilation=2), op("Conv2d"), "dilation"),
        (torch.nn.Linear(2, 2), op("Linear", weight=EMBEDDING), "its weight is planned as Per"),
        (torch.nn.Embedding(2, 2), op("Embedding", weight=WEIGHT), "its weight is planned as Per"),
    ],
)
def test_what_a_site_cannot_reproduce_is_named(module, entry, reason):
    assert reason in refusal(module, entry)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(2, 2),
        torch.nn.Embedding(2, 2),
        torch.nn.Conv1d(1, 1, 1),
        torch.nn.Conv2d(1, 1, 2, stride=2),
        torch.nn.Conv3d(1, 1, 2, stride=2),
    ],
)
def test_what_a_site_can_reproduce_is_not_refused(module):
    assert refusal(module, op(type(module).__name__)) == ""
    if isinstance(module, torch.nn.Linear):
        assert refusal(module, op("Linear", pattern=LINEAR_RELU)) == ""


def test_of_the_ops_that_inc_does_not_plan_a_site_takes_a_linear_alone():
    assert refusal(torch.nn.Linear(2, 2), replace(op("Linear"), inc_int8=None)) == ""
    for module in (torch.nn.Embedding(2, 2), torch.nn.Conv2d(1, 1, 2, stride=2)):
        assert refusal(module, replace(op(type(module).__name__), inc_int8=None)) == "INC does not plan it"


def test_where_inc_fuses_a_relu_the_range_of_the_output_is_that_after_it():
    torch.manual_seed(0)
    module, x = torch.nn.Linear(8, 4), torch.randn(50, 8)
    sites = [site_for(module), site_for(module, pattern=LINEAR_RELU)]
    for site in sites:
        site.observe()
        site(x)
    plain, fused = (site.observed() for site in sites)
    assert plain.input == fused.input and plain.output.minimum < 0 == fused.output.minimum
    assert plain.output.maximum == fused.output.maximum
    assert fused.out_zero_point == 0 and fused.out_scale < plain.out_scale


def test_an_op_that_inc_does_not_plan_has_the_ranges_of_its_inputs_and_no_int8():
    torch.manual_seed(0)
    site = LinearSite(torch.nn.Linear(8, 4), replace(op("Linear"), inc_int8=None))
    x = torch.randn(5, 8)
    site.observe()
    assert torch.equal(site(x), site.module(x))
    scales = site.observed()
    assert (scales.input.minimum, scales.input.maximum) == (float(x.min()), float(x.max()))
    assert not hasattr(site, "packed") and not hasattr(site, "w_scale")


def test_a_site_is_calibrated_by_what_it_sees_and_switched_by_its_flag():
    module = torch.nn.Linear(8, 4)
    seven_bits = ACTIVATION | {"reduce_range": True}  # no product saturates, whatever the CPU
    site = LinearSite(module, op("Linear", activation=seven_bits))
    module.forward = site
    x = torch.randn(5, 8)
    site.observe()
    reference = module(x)
    scales = site.observed()
    site.set_scales(scales)
    assert site.executions == 1
    assert (scales.input.minimum, scales.input.maximum) == (float(x.min()), float(x.max()))
    known = list(scales.input.percentiles.values())
    assert known == sorted(known) and scales.input.minimum <= known[0] and known[-1] <= scales.input.maximum + 1e-6
    site.scheme = "inc_int8"
    assert not torch.equal(module(x), reference)
    torch.testing.assert_close(module(x), reference, atol=float(site.out_scale) * 3, rtol=0.0)
    site.scheme = None
    assert torch.equal(module(x), reference)


def test_an_image_is_cut_into_patches_along_both_sides():
    site = ConvSite(torch.nn.Conv2d(3, 4, (2, 3), stride=(2, 3)), op("Conv2d"))
    set_qparams(site, 0.1, 3, 0.1, 4)
    assert site.by_formula(torch.randn(6, 3, 8, 13)).shape == (6, 4, 4, 4)


def test_an_op_that_did_not_run_has_scale_1_and_zero_point_0():
    site = site_for(torch.nn.Linear(8, 4))
    site.observe()
    assert site.observed() == OpScales(1.0, 0, 1.0, 0)


def test_patches_of_a_whole_frame_are_one_row_each():
    site = ConvSite(torch.nn.Conv3d(3, 4, 2, stride=2), op("Conv3d"))
    set_qparams(site, 0.1, 3, 0.1, 4)
    assert site.by_formula(torch.randn(6, 3, 2, 2, 2)).shape == (6, 4, 1, 1, 1)
