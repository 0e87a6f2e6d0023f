"""A refined choice has the least divergence of those that were tried, and keeps to the budget and the options."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from build import options
from hypothesis import given
from hypothesis import strategies as st

from auto_quantize_model.decide.allocate import Choice, bytes_of, seconds_of
from auto_quantize_model.decide.refine import CHANGES, ROUNDS, Budget, Refinement, changed
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.around import Around
from auto_quantize_model.measure.store import ScoreStore

N, W, U = "NVFP4", "W8A8", "unquantized"
UNITS = [options(name, NVFP4=(4, 0.2), W8A8=(8, 0.1)) for name in "abcd"]
FIRST, SECOND, THIRD = (W, N, N, N), (N, W, N, N), (N, N, W, N)


def near(divergence: float, slopes: dict[int, float], curvature: Any = None) -> Around:
    """Around a choice of four units with two changes each."""
    values = np.array([slopes.get(index, 0.0) for index in range(8)])
    matrix = np.eye(8) * 1e-6 if curvature is None else curvature
    return Around(divergence, values, matrix, matrix.diagonal())


class Table(Refinement):
    """A refinement that measures by a table; around a choice, two units change places."""

    def __init__(self, divergences: dict[Choice, float], store: Path | None = None) -> None:
        plan = SimpleNamespace(schemes={})
        heldout: Any = SimpleNamespace(base={}, plan=plan, store=ScoreStore(store) if store else None)
        super().__init__(UNITS, heldout, [{"input_ids": torch.zeros(1, 1)}])
        self.divergences, self.looks = divergences, 0

    def around(self, choice: Choice) -> Around:
        self.looks += 1
        up = (choice.index(W) + 1) % 4
        columns = [(unit, scheme) for unit in range(4) for scheme in (N, W, U) if scheme != choice[unit]]
        gains = {columns.index((choice.index(W), N)): 0.1, columns.index((up, W)): -1.0}
        return near(self.divergence(choice), gains)

    def divergence(self, choice: Choice) -> float:
        return self.divergences.get(choice, 1.0)


def test_the_choice_with_the_least_divergence_is_kept_and_rounds_are_limited(tmp_path: Path) -> None:
    assert ROUNDS == 2
    for table, best in (((0.9, 0.5, 0.7), SECOND), ((0.5, 0.9, 0.7), FIRST), ((0.9, 0.7, 0.5), THIRD)):
        found = Table(dict(zip((FIRST, SECOND, THIRD), table, strict=True)))
        tried = found.tried(FIRST, Budget(20))
        assert [choice for choice, _ in tried] == [FIRST, SECOND, THIRD] and found.looks == ROUNDS
        assert Table(found.divergences, tmp_path / str(table)).refined(FIRST, Budget(20)) == best


def test_a_refined_choice_is_kept_in_the_store(tmp_path: Path) -> None:
    table = {FIRST: 0.9, SECOND: 0.5}
    first, second = Table(table, tmp_path), Table(table, tmp_path)
    assert first.refined(FIRST, Budget(20)) == second.refined(FIRST, Budget(20)) == SECOND
    assert (first.looks, second.looks) == (ROUNDS, 0)
    assert second.refined(FIRST, Budget(21)) == SECOND and second.looks == ROUNDS  # another budget


def test_a_number_that_is_not_finite_is_refused_and_the_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = near(float("nan"), {})
    monkeypatch.setattr("auto_quantize_model.decide.refine.around", lambda *given: broken)
    made = Refinement(UNITS, SimpleNamespace(replay=None), [{}])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"calibration batch 0.*divergence"):
        made.around(FIRST)


def test_a_choice_that_nothing_makes_better_stays() -> None:
    assert changed(UNITS, FIRST, near(0.5, {}), Budget(20)) == FIRST
    assert changed(UNITS, FIRST, near(0.5, {2: 0.5, 3: 0.5}), Budget(99)) == FIRST


def test_what_two_changes_do_together_counts() -> None:
    """Columns of (N, N, N, N): W8A8 and unquantized of each unit."""
    curvature = np.eye(8) * 0.2
    choice = (N, N, N, N)
    slopes = {0: -0.5, 2: -0.4, 4: -0.3}
    assert changed(UNITS, choice, near(1.0, slopes, curvature), Budget(24)) == (W, W, N, N)
    curvature[0, 2] = curvature[2, 0] = 0.5  # the errors of a and b cancel, so both changes together gain less
    assert changed(UNITS, choice, near(1.0, slopes, curvature), Budget(24)) == (W, N, W, N)


def test_changes_are_few() -> None:
    units = [options(str(index), NVFP4=(4, 0.2), W8A8=(8, 0.1)) for index in range(9)]
    gains = Around(1.0, np.full(18, -0.1), np.eye(18) * 1e-6, np.full(18, 1e-6))
    made = changed(units, (N,) * 9, gains, Budget(1000))
    assert sum(scheme != N for scheme in made) == CHANGES


def test_a_limit_of_the_time_is_kept() -> None:
    units = [replace(unit, seconds={N: 1.0, W: 2.0, U: 9.0}) for unit in UNITS]
    slopes = {index: -1.0 - index for index in range(8)}
    made = changed(units, (N, N, N, N), near(9.0, slopes), Budget(1000, 6.0))
    assert made == (N, N, W, W) and seconds_of(made, units) == 6.0


@given(st.integers(16, 64), st.lists(st.floats(-1, 1), min_size=8, max_size=8), st.integers(0, 2**32 - 1))
def test_each_choice_fits_and_gains_by_the_second_order(budget: int, slopes: list[float], seed: int) -> None:
    factors = np.random.default_rng(seed).normal(size=(8, 3))
    curvature = factors @ factors.T / 3
    around = Around(1.0, np.array(slopes), curvature, curvature.diagonal())
    made = changed(UNITS, (N, N, N, N), around, Budget(budget))
    taken = np.array([scheme == own for own in made for scheme in (W, U)])
    assert bytes_of(made, UNITS) <= budget
    assert around.slopes @ taken + taken @ around.curvature @ taken / 2 <= 0


def test_without_options_nothing_changes() -> None:
    nothing = Around(0.1, np.zeros(0), np.zeros((0, 0)), np.zeros(0))
    fixed = [replace(unit, bytes={N: 4}) for unit in UNITS]
    assert changed(fixed, (N, N, N, N), nothing, Budget(16)) == (N, N, N, N)
