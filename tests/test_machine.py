"""The device is chosen, and the memory is checked, before long work begins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from auto_quantize_model import machine
from auto_quantize_model.files import InputError
from auto_quantize_model.free_memory import Free
from auto_quantize_model.machine import (
    Limits,
    Need,
    choose_device,
    explained_out_of_memory,
    require_free,
    require_memory,
    stays_mapped,
    usage,
)
from auto_quantize_model.needs import COPIES, KEPT_BYTES, LEAST_WORKING_BYTES, LIBRARIES, WORKING_BYTES


@pytest.fixture(autouse=True)
def torchs_settings():
    yield
    torch.use_deterministic_algorithms(False)


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_threads_are_set_before_work_and_none_leaves_them():
    before = torch.get_num_threads()
    try:
        choose_device("cpu", threads=before + 1)
        choose_device("cpu")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(InputError, match="--threads: 0 is out of range; write a whole number of at least 1"):
        choose_device("cpu", threads=0)


def test_algorithms_on_a_gpu_are_deterministic_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_device("cuda")
    assert torch.are_deterministic_algorithms_enabled()
    choose_device("cuda", deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gpu_that_is_not_there_is_refused_with_the_next_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU .* set sensitivity.device to cpu, pass --resources gpu=0"):
        choose_device("cuda")


def test_a_model_that_does_not_fit_is_refused_with_both_figures():
    with pytest.raises(
        InputError, match=r"1000000\.00 billion weights need 4656\d+\.\d GiB, and this machine has \d+\.\d"
    ):
        require_memory(10**15, torch.device("cpu"))
    require_memory(10**6, torch.device("cpu"))
    with pytest.raises(InputError, match="need 3725290.3 GiB"):  # loaded only: 4 bytes a weight
        require_memory(10**15)


def test_quantized_weights_that_a_replay_keeps_are_counted(monkeypatch):
    free = SimpleNamespace(available=5 * 10**9 + WORKING_BYTES)
    monkeypatch.setattr(machine, "free_memory", lambda: Free(free.available, "this machine"))
    require_memory(10**9, torch.device("cpu"))
    with pytest.raises(InputError, match="1.00 billion weights need"):
        require_memory(10**9, torch.device("cpu"), schemes=2)
    free.available += KEPT_BYTES
    require_memory(10**9, torch.device("cpu"), schemes=5)


def test_the_copies_of_the_logits_are_counted(monkeypatch):
    free = SimpleNamespace(available=5 * 10**9 + WORKING_BYTES + KEPT_BYTES)
    monkeypatch.setattr(machine, "free_memory", lambda: Free(free.available, "this machine"))
    with pytest.raises(InputError, match="1.00 billion weights need"):
        require_memory(10**9, torch.device("cpu"), schemes=5, logits=10**8)
    free.available += (5 + COPIES) * 10**8
    require_memory(10**9, torch.device("cpu"), schemes=5, logits=10**8)


NEED = Need(weights=7 * 10**9, merged=0, largest=5 * 10**8, has_codes=False, schemes=3, logits=10**8)
LEAST = 8 * 5 * 10**8 + LEAST_WORKING_BYTES + (3 + COPIES) * 10**8


@pytest.fixture
def limits(monkeypatch):
    found = Limits()
    monkeypatch.setattr(machine, "LIMITS", found)
    return found


def test_weights_stay_in_their_files_only_where_fp32_does_not_fit(monkeypatch, limits):
    free = SimpleNamespace(available=5 * 7 * 10**9 + WORKING_BYTES + KEPT_BYTES + (3 + COPIES) * 10**8)
    monkeypatch.setattr(machine, "free_memory", lambda: Free(free.available, "this machine"))
    assert not stays_mapped(NEED) and limits == Limits()
    free.available -= 1
    assert stays_mapped(NEED) and limits == Limits()  # 24 GB for 7 billion weights leave room to keep all


def test_a_seven_billion_model_fits_a_machine_of_24_gib_and_keeps_less_where_less_is_left(monkeypatch, limits):
    free = SimpleNamespace(available=20 * 2**30)
    monkeypatch.setattr(machine, "free_memory", lambda: Free(free.available, "this machine"))
    assert stays_mapped(NEED) and limits == Limits()
    assert stays_mapped(NEED, LIBRARIES + LEAST + 2**30)
    assert limits == Limits(weights=2**29, outputs=2**29)
    with pytest.raises(
        InputError,
        match=r"7\.00 billion weights need 5\.5 GiB while they stay in their files, and machine\.memory leaves 5\.0 GiB"
        " for the model; raise machine.memory, or lower calibration",
    ):
        stays_mapped(NEED, 7 * 2**30)
    free.available = 2**30
    with pytest.raises(InputError, match=r"need 12\.0 GiB .*, and this machine has 1\.0 GiB free; lower calibration"):
        stays_mapped(replace(NEED, has_codes=True))


def test_a_step_that_needs_the_fp32_model_is_refused_where_the_limit_is_below(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: Free(2**40, "this machine"))
    require_memory(10**9, torch.device("cpu"), memory=LIBRARIES + 5 * 10**9 + WORKING_BYTES)
    with pytest.raises(InputError, match=r"need 6\.7 GiB, and a step with this machine\.memory has 6\.0 GiB free"):
        require_memory(10**9, torch.device("cpu"), memory=8 * 2**30)


def test_running_out_of_memory_says_what_there_was_and_what_to_lower(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 32 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 30 << 30)
    with pytest.raises(
        InputError, match=r"30\.0 GiB were in use, 1\.0 of 32\.0 GiB .*tried 5.*lower calibration\.batch_size"
    ):
        with explained_out_of_memory(torch.device("cuda")):
            raise torch.OutOfMemoryError("tried 5 GiB\nmore")


def test_the_run_record_has_memory_and_host():
    assert usage(torch.device("cpu"))["peak_memory_bytes"] > 10**7


def test_work_that_does_not_fit_is_refused_with_both_numbers():
    require_free(0, "nothing")
    with pytest.raises(
        InputError, match=r"^counting needs 1048576.0 GiB, and this machine has [\d.]+ GiB free; use a machine"
    ):
        require_free(2**50, "counting")
