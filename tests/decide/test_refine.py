"""A refined choice never has more divergence on its batches, and keeps to the budget and the options."""

import pytest
from build import options

from auto_quantize_model.decide import refine
from auto_quantize_model.decide.allocate import Choice, bytes_of
from auto_quantize_model.decide.refine import ROUNDS, Refinement

# Of all choices within 20 bytes, W8A8 for the first unit has the least sum.
UNITS = [options(name, NVFP4=(4, 0.2), W8A8=(8, 0.05 if name == "a" else 0.1)) for name in "abcd"]


def refined(
    monkeypatch: pytest.MonkeyPatch, divergences: dict[Choice, float], toward: dict[Choice, str]
) -> tuple[Refinement, list[Choice]]:
    """A refinement whose measurement is a table; around a choice, one unit gains by more bytes."""
    asked: list[Choice] = []

    def measured(heldout: object, batch: object, index: int, state: dict[str, str], wanted: dict[str, object]):  # type: ignore[no-untyped-def]
        choice = tuple(state.get(unit.name, "unquantized") for unit in UNITS)
        asked.append(choice)
        slopes = {unit.name: {scheme: 0.0 for scheme in unit.bytes} for unit in UNITS}
        if choice in toward:
            slopes[toward[choice]]["W8A8"] = -5.0
        return divergences.get(choice, 1.0), slopes

    monkeypatch.setattr(refine, "kept_slopes", measured)
    return Refinement(UNITS, None, [{}]), asked  # type: ignore[arg-type]


N, W = "NVFP4", "W8A8"
FIRST, SECOND, THIRD = (W, N, N, N), (N, W, N, N), (N, N, W, N)


def test_the_choice_with_the_least_divergence_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = refined(monkeypatch, {FIRST: 0.9, SECOND: 0.5, THIRD: 0.7}, {FIRST: "b", SECOND: "c"})
    assert found.best(20) == SECOND and asked == [FIRST, SECOND, THIRD]
    assert bytes_of(SECOND, UNITS) <= 20


def test_a_choice_that_nothing_makes_better_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = refined(monkeypatch, {FIRST: 0.5, SECOND: 0.9}, {FIRST: "b"})
    assert found.best(20) == FIRST and asked == [FIRST, SECOND]


def test_rounds_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [tuple(W if index == number else N for index in range(4)) for number in range(4)]
    better = {choice: 1.0 - 0.1 * number for number, choice in enumerate(chain)}
    found, asked = refined(monkeypatch, better, dict(zip(chain, "bcda", strict=True)))
    assert found.best(20) == chain[ROUNDS - 1] and len(asked) == ROUNDS


def test_losses_around_a_choice_have_the_slope_and_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = refined(monkeypatch, {}, {})
    slopes = {unit.name: {"NVFP4": 0.0, "W8A8": -0.25, "unquantized": -0.35} for unit in UNITS}
    (first, *_) = found.around((N, N, N, N), slopes)
    # Changes: 0 to stay, -0.25 + 0.2 + 0.05 to W8A8, and -0.35 + 0.2 + 0 to unquantized, which is the least.
    assert first.loss == pytest.approx({"NVFP4": 0.15, "W8A8": 0.15, "unquantized": 0.0})


def test_without_batches_a_choice_stays_as_it_is() -> None:
    assert Refinement(UNITS, None, []).best(20) == FIRST  # type: ignore[arg-type]
