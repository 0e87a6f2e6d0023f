"""Rounding to FP4 has the bits of compressed-tensors' own function, which runs wherever this project does not ask."""

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.schemes import fp4
from auto_quantize_model.schemes.fp4 import round_to_fp4, served_fp4

BORDERS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, torch.inf])

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # on a GPU the library has a kernel of its own


def assert_same_bits(x: torch.Tensor, device: str = "cpu") -> None:
    """Both functions give the same bits, the library's on a device; of a NaN, a NaN."""
    theirs, ours = cast_to_fp4(x.clone().to(device)).cpu(), round_to_fp4(x)
    assert torch.equal(theirs.isnan(), ours.isnan())
    numbers = ~x.isnan()
    assert torch.equal(theirs.view(torch.int32)[numbers], ours.view(torch.int32)[numbers])


@pytest.mark.parametrize("device", DEVICES)
def test_every_value_of_bf16(device: str) -> None:
    assert_same_bits((torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32), device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_neighbours_of_each_border(device: str) -> None:
    around = [torch.nextafter(BORDERS, torch.full_like(BORDERS, end)) for end in (-torch.inf, torch.inf)]
    assert_same_bits(torch.cat([sign * side for sign in (1.0, -1.0) for side in (BORDERS, *around)]), device)


@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=64))
def test_any_bits(bits: list[int]) -> None:
    assert_same_bits(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def test_the_input_stays_as_it_is() -> None:
    x = torch.tensor([-0.0, 0.25, -7.0])
    round_to_fp4(x)
    assert x.tolist() == [-0.0, 0.25, -7.0]


def test_the_library_keeps_its_own_function_outside_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp4, "EXPONENT", 0)  # spoils the step, so that the two can be told apart
    with served_fp4():
        assert cast_to_fp4(torch.tensor([4.7])).item() == 4.5
    assert cast_to_fp4(torch.tensor([4.7])).item() == 4.0
