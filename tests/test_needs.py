"""What a scheduler is asked for follows from the size of the run, and is what the steps check."""

import subprocess
import sys
from dataclasses import replace

import pytest

from auto_quantize_model import needs
from auto_quantize_model.needs import Size, megabytes, minutes

STEPS = ("plan_quantization", "calibrate_scales", "capture_sensitivity", "audit_capture", "measure_frontier")
# The shape of Qwen2.5-VL-3B in five schemes, with batches of 300 tokens.
LARGE = Size(
    weights=3_750_000_000,
    logits=4 * 300 * 151_936,
    multiply_adds=3_750_000_000 * 300,
    ops=417,
    schemes=5,
    maps=3,
    batches=2,
    all_batches=16,
    heldout=8,
    audit_ops=4,
    points=12,
    refine_batches=0,
    top=40,
    budget=None,
)


def test_a_replay_on_the_cpu_asks_for_the_memory_that_the_step_checks_and_for_the_libraries() -> None:
    replayed = 5 * LARGE.weights + needs.WORKING_BYTES + needs.KEPT_BYTES + 10 * LARGE.logits
    assert needs.bytes_of_replay(LARGE.weights, 5, LARGE.logits) == replayed
    assert megabytes("capture_sensitivity", LARGE, "cpu") == -(-(replayed + needs.LIBRARIES) // 10**6)
    # INC plans without the schemes, and 23 GB is above the 21.4 GiB that the shape of the 3B took.
    assert 21.4 * needs.GIB / 1e6 < megabytes("plan_quantization", LARGE, "cpu") < 24_000


def test_a_replay_on_a_gpu_asks_the_host_for_the_weights_alone_and_inc_asks_for_as_much_as_before() -> None:
    assert megabytes("capture_sensitivity", LARGE, "cuda") == -(-(15_000_000_000 + 2 * needs.LIBRARIES) // 10**6)
    assert megabytes("audit_capture", LARGE, "cuda") == megabytes("audit_capture", LARGE, "cpu")


def test_no_step_asks_for_more_than_the_limit_at_any_attempt() -> None:
    limited = replace(LARGE, memory=needs.in_bytes("10GiB"))
    for step in STEPS:
        assert [megabytes(step, limited, "cpu", attempt) for attempt in (1, 2)] == [10738, 10738]
    small = replace(LARGE, weights=10**6, logits=0)
    assert megabytes(STEPS[1], replace(small, memory=limited.memory), "cpu") == megabytes(STEPS[1], small, "cpu")
    assert needs.in_bytes("9000MiB") == 9000 << 20


def test_the_3b_with_its_weights_in_their_files_fits_into_ten_gib() -> None:
    least = needs.bytes_of_mapped(LARGE.weights, 0, 151_936 * 2048, LARGE.schemes, 4 * 97 * 151_936)
    assert 7 * needs.GIB < least < 8 * needs.GIB  # with INT8 codes; the libraries take 2 GiB
    assert least - needs.bytes_of_mapped(0, 0, 151_936 * 2048, LARGE.schemes, 4 * 97 * 151_936) == LARGE.weights


@pytest.mark.parametrize("step", STEPS)
def test_time_doubles_with_each_attempt_and_memory_grows_by_half(step: str) -> None:
    first = minutes(step, LARGE, "cpu", 8)
    assert [minutes(step, LARGE, "cpu", 8, attempt) for attempt in (2, 3)] == [2 * first, 4 * first]
    assert megabytes(step, LARGE, "cpu", 3) == pytest.approx(2 * megabytes(step, LARGE, "cpu"), abs=2)


@pytest.mark.parametrize("step", STEPS)
def test_more_threads_and_a_share_of_the_work_take_less_time_down_to_what_a_start_takes(step: str) -> None:
    assert minutes(step, LARGE, "cpu", 16) < minutes(step, LARGE, "cpu", 1)
    shares = [minutes(step, LARGE, "cpu", 1, share=share) for share in (1, 0.5, 0)]
    assert shares == sorted(shares, reverse=True)
    loading = 2 * LARGE.weights * needs.SECONDS_OF_WEIGHT / 60
    assert shares[-1] == pytest.approx(needs.AT_LEAST + loading, abs=1)


def test_a_time_budget_is_the_time_of_the_capture() -> None:
    bounded = replace(LARGE, budget=20.0)
    loading = LARGE.weights * needs.SECONDS_OF_WEIGHT / 60
    assert minutes("capture_sensitivity", bounded, "cpu", 1) == pytest.approx(10 + 2 * (loading + 20), abs=1)
    assert minutes("measure_frontier", bounded, "cpu", 1) == minutes("measure_frontier", LARGE, "cpu", 1)


def test_the_functions_of_the_rules_import_no_torch() -> None:
    code = "import sys, auto_quantize_model.needs, auto_quantize_model.models.size; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
