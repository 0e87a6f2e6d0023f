"""The statistics of stability: agreement between batches and metrics, ties, and the sum of errors."""

import pytest
from build import a_score
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.decide.stability import assess, tau
from auto_quantize_model.records import Score


def records(*batches: list[float]) -> dict[str, list[Score | None]]:
    columns = zip(*batches, strict=True)
    return {f"op{row}": [a_score(value) for value in values] for row, values in enumerate(columns)}


def test_batches_that_agree() -> None:
    found = assess(records([1, 2, 3, 4], [10, 20, 30, 40]), [a_score(10), a_score(100)])
    assert (found["rank_tau"], found["rank_tau_lowest"], found["top_shared"]) == (1, 1, 1)
    assert (found["ties"], found["additivity"], found["metric_tau"]) == (0, 1, None)


def test_batches_that_contradict_each_other() -> None:
    rising, falling = [float(value) for value in range(30)], [float(30 - value) for value in range(30)]
    found = assess(records(rising, falling, rising), [a_score(1.0)] * 3)
    assert found["rank_tau"] == pytest.approx(-1 / 3) and found["rank_tau_lowest"] == -1
    assert (found["top"], found["top_shared"]) == (8, 0)


def test_one_batch_says_nothing_of_stability() -> None:
    found = assess(records([1, 1, 2]), [a_score(8)])
    assert found["rank_tau"] is None and found["top_shared"] is None
    assert (found["ties"], found["additivity"]) == (2, 0.5)


def test_ties_are_those_of_the_means_that_rank() -> None:
    assert assess(records([1, 1], [1, 3]), [a_score(1)] * 2)["ties"] == 0
    assert assess(records([1, 3, 9], [3, 1, 9]), [a_score(1)] * 2)["ties"] == 2


def test_errors_that_add_up_do_so_where_an_op_skips_a_batch_too() -> None:
    isolated = records([1, 2], [1, 2]) | {"vision": [None, a_score(9.0)]}
    assert assess(isolated, [a_score(3), a_score(12)])["additivity"] == 1


def test_the_squared_error_is_compared_with_the_divergence() -> None:
    isolated = {
        f"op{row}": [a_score(error, divergence=divergence)]
        for row, (error, divergence) in enumerate([(1.0, 0.1), (2.0, 0.3), (3.0, 0.2)])
    }
    assert assess(isolated, [a_score(6.0)])["metric_tau"] == pytest.approx(1 / 3)


def test_an_op_that_did_not_run_in_a_batch_is_left_out() -> None:
    isolated = records([1, 2, 3], [1, 2, 3]) | {"vision": [None, a_score(9.0)]}
    assert assess(isolated, [a_score(6), a_score(6)])["rank_tau"] == 1


@given(st.lists(st.floats(0, 1e6), max_size=8))
def test_tau_of_a_ranking_with_itself_is_one_or_unknown(values: list[float]) -> None:
    found = tau(values, values)
    assert found is None if len(set(values)) < 2 else found == pytest.approx(1)
