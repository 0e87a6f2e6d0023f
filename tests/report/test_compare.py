"""Two reports compared: noise is not a difference, a changed top set is, and a CI job can act on the exit code."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from build import a_frontier, a_plan, a_point, a_profile, profiles_of
from hypothesis import given
from hypothesis import strategies as st
from test_document import parts

from auto_quantize_model.commands import compare_sensitivity
from auto_quantize_model.files import InputError
from auto_quantize_model.report.compare import Limits, compare, standings
from auto_quantize_model.report.compare_text import to_markdown
from auto_quantize_model.report.document import build_report, of_frontier, of_profiles

ROOT = Path(__file__).parents[2]


# A whole report, as the script asks for: what the comparison does not read is the same everywhere.
WHOLE = build_report(*parts())


def row(name: str, value: float, spread: float | None) -> dict[str, Any]:
    return WHOLE["maps"]["isolated"]["ops"][0] | {"op_name": name, "mse_value": value, "mse_value_std": spread}


def report(
    names: Sequence[str] = "abcdefghij", spread: float | None = 0.4, rank_tau: float | None = 0.9, **versions: str
) -> dict[str, Any]:
    """A report of ops one apart in mse_value, the most sensitive first: with 0.4 of spread none is another's noise."""
    found = copy.deepcopy(WHOLE)
    found["versions"] |= versions
    found["stability"]["rank_tau"] = rank_tau
    rows = [row(name, float(value), spread) for value, name in enumerate(reversed(names), start=1)][::-1]
    found["maps"]["isolated"]["ops"] = rows
    found["ops"] = [found["ops"][0] | {"op_name": name, "tower": "language"} for name in names]
    return found


def compared(first: dict[str, Any], second: dict[str, Any], top: int = 3, changes: int = 2) -> dict[str, Any]:
    return compare(first, second, Limits(top, changes=changes))


def names_of(moves: list[dict[str, Any]]) -> list[str]:
    return [move["op_name"] for move in moves]


measured = st.tuples(st.integers(0, 5).map(float), st.none() | st.floats(0, 10))


@given(st.lists(measured, min_size=2), st.integers(1, 99), st.floats(-1, 1), st.integers(0, 9))
def test_a_report_never_differs_from_itself(
    ops: list[tuple[float, float | None]], top: int, least_tau: float, changes: int
) -> None:
    itself = report(rank_tau=None)
    itself["maps"]["isolated"]["ops"] = [row(str(index), *op) for index, op in enumerate(ops)]
    found = compare(itself, itself, Limits(top, least_tau, changes))
    assert (found["differs"], found["reasons"], found["moved"], found["changed"]) == (False, [], [], [])
    assert found["tau"] == pytest.approx(1)


@given(st.lists(measured))
def test_an_ops_range_contains_its_own_rank(ops: list[tuple[float, float | None]]) -> None:
    rows = [row(str(index), value, spread) for index, (value, spread) in enumerate(ops)]
    found = standings(rows)
    assert [standing.rank for standing in found.values()] == list(range(1, len(ops) + 1))
    for index, (_, spread) in enumerate(ops):
        rank, reach = found[str(index)]
        assert (reach is None) == (spread is None)
        assert reach is None or 1 <= reach[0] <= rank <= reach[1] <= len(ops)


def test_tied_ops_share_their_range_without_any_spread() -> None:
    found = standings([row("a", 1.0, 0.0), row("b", 1.0, 0.0), row("c", 2.0, 0.0)])
    assert found == {"c": (1, (1, 1)), "a": (2, (2, 3)), "b": (3, (2, 3))}


def test_a_move_between_disjoint_ranges_is_beyond_the_noise() -> None:
    found = compared(report("abcdefghij"), report("dabcefghij", torch="2.14.0"))
    assert names_of(found["moved"]) == ["d", "a", "b", "c"]
    assert found["moved"][0] == {
        "op_name": "d",
        "first": 4,
        "second": 1,
        "first_range": (4, 4),
        "second_range": (1, 1),
        "beyond_noise": True,
    }
    assert (found["entered"], found["left"]) == ([found["moved"][0]], [found["moved"][3]])
    assert found["changed"] == [{"what": "torch", "first": "2.13.0", "second": "2.14.0"}]
    assert not found["differs"]


def test_noise_covers_a_move_whose_ranges_overlap() -> None:
    found = compared(report("abcdefghij", spread=1.5), report("abdcefghij", spread=1.5), changes=0)
    assert [(move["op_name"], move["beyond_noise"]) for move in found["entered"]] == [("d", False)]
    assert [move["beyond_noise"] for move in found["moved"]] == [False, False]
    assert not found["differs"]
    markdown = to_markdown(found)
    assert "| `d` | entered | 4 (3–5) | 3 (2–4) | no |" in markdown
    assert "0 of 10 common ops moved beyond the noise, 2 within it." in markdown
    assert " up |" not in markdown


def test_ranges_that_share_one_rank_overlap() -> None:
    found = compared(report("abcde", spread=1.0), report("cabde", spread=1.0))
    assert found["moved"][0]["first_range"] == (2, 4)
    assert found["moved"][0]["second_range"] == (1, 2)
    assert found["moved"][0]["beyond_noise"] is False


@pytest.mark.parametrize("spreads", [(None, None), (None, 5.0), (5.0, None)])
def test_a_move_without_a_spread_is_unknown_and_counts_as_beyond(spreads: tuple[float | None, float | None]) -> None:
    found = compared(report("abcdefghij", spreads[0]), report("dabcefghij", spreads[1]), changes=0)
    assert {move["beyond_noise"] for move in found["moved"]} == {None}
    assert found["reasons"] == ["Ops that came into the 3 most sensitive: 1 (1 by unknown noise); at most 0 may."]
    markdown = to_markdown(found)
    assert "4 by unknown noise" in markdown
    assert " | unknown |" in markdown


@pytest.mark.parametrize(("rank_tau", "differs"), [(0.9, True), (0.3, False), (None, True)])
def test_tau_within_the_agreement_of_the_batches_is_no_difference(rank_tau: float | None, differs: bool) -> None:
    reports = report(rank_tau=rank_tau), report("ecbafdihgj", rank_tau=rank_tau)
    found = compared(*reports)
    assert compare(*reports, Limits(3, tau=0.8))["differs"]  # what is asked for is asked for
    assert 0.3 < found["tau"] < 0.8
    assert found["differs"] is bool(found["reasons"]) is differs
    assert all("Kendall's tau is" in reason for reason in found["reasons"])


def test_ten_of_417_ops_that_move_from_the_bottom_to_the_top_differ_though_tau_is_high() -> None:
    names = [f"op{index}" for index in range(417)]
    found = compared(report(names), report(names[-10:] + names[:-10]), top=10)
    assert found["tau"] == pytest.approx(0.906, abs=0.001)
    assert found["reasons"] == ["Ops that came into the 10 most sensitive: 10 (10 beyond the noise); at most 2 may."]
    assert names_of(found["entered"]) == names[-10:]
    assert names_of(found["left"]) == names[:10]
    markdown = to_markdown(found)
    assert "417 of 417 common ops moved beyond the noise, 0 within it. The largest 20:" in markdown
    assert markdown.count(" up |") + markdown.count(" down |") == 20


@pytest.mark.parametrize(("changes", "differs"), [(2, True), (3, False)])
def test_as_many_ops_as_allowed_may_enter_the_top(changes: int, differs: bool) -> None:
    found = compared(report("abcdefghijklmnopqrstuvwxyz"), report("defabcghijklmnopqrstuvwxyz"), changes=changes)
    assert names_of(found["entered"]) == ["d", "e", "f"]
    assert found["differs"] is differs


@pytest.mark.parametrize("place", [0, 5, 417])
def test_one_new_op_moves_nobody(place: int) -> None:
    names = [f"op{index}" for index in range(417)]
    found = compared(report(names), report([*names[:place], "new", *names[place:]]), top=10)
    assert (found["moved"], found["entered"], found["left"], found["differs"]) == ([], [], [], False)
    assert (found["only_second"], found["common"]) == (["new"], 417)
    assert found["new_in_top"] == (["new"] if place < 10 else [])


def test_new_ops_on_top_differ_where_there_are_too_many() -> None:
    found = compared(report("abcdef"), report("xaybzcdef"), top=4, changes=1)
    assert found["new_in_top"] == ["x", "y"]
    assert found["only_second"] == ["x", "y", "z"]
    assert found["moved"] == []
    reason = "Ops that came into the 4 most sensitive: 2 (2 only in the second report); at most 1 may."
    assert found["reasons"] == [reason]
    assert "New in the second report and among its 4: `x`, `y`." in to_markdown(found)


def test_entered_and_new_ops_count_together() -> None:
    found = compared(report("abcdefghij"), report("xdabcefghij"), changes=1)
    counts = "2 (1 beyond the noise, 1 only in the second report)"
    assert found["reasons"] == [f"Ops that came into the 3 most sensitive: {counts}; at most 1 may."]


def test_ops_of_one_report_alone_are_listed() -> None:
    found = compared(report("abcd"), report("bcdx"), 2)
    assert (found["only_first"], found["only_second"], found["common"]) == (["a"], ["x"], 3)
    assert "Only in the first: `a`. Only in the second: `x`." in to_markdown(found)


def test_a_long_list_of_ops_is_cut_with_its_number() -> None:
    found = compared(report([*"ab", *(f"old{index}" for index in range(30))]), report("ab"))
    assert "`old19`, 10 more. Only in the second: none." in to_markdown(found, shown=20)


def test_two_models_can_be_compared_and_their_names_are_listed() -> None:
    other = report()
    other["model"] |= {"model": "small", "digest": "2"}
    found = compared(report(), other)
    assert not found["differs"]
    assert "| model | tiny | small |" in to_markdown(found)


def test_the_markdown_reads_from_the_verdict_to_the_moves() -> None:
    markdown = to_markdown(compared(report("abcdefghij"), report("jihgfedcba", torch="2.14.0")))
    parts = [
        "**The reports differ:**\n\n- Kendall's tau is -1, below the 0.8 usual between runs.",
        "- Ops that came into the 3 most sensitive: 3 (3 beyond the noise); at most 2 may.",
        "## What changed\n\n| changed | first | second |\n|---|---|---|\n| torch | 2.13.0 | 2.14.0 |",
        "## The 3 most sensitive\n\n| op_name |",
        "| `j` | entered | 10 | 1 | yes |",
        "| `a` | left | 1 | 10 | yes |",
        "## Moves\n\n10 of 10 common ops moved beyond the noise, 0 within it.\n\n| op_name |",
        "| `a` | down | 1 | 10 | yes |",
    ]
    found = [markdown.find(part) for part in parts]
    assert -1 not in found, parts[found.index(-1)]
    assert found == sorted(found)


def test_the_verdict_does_not_say_agree_where_an_op_jumped_to_the_top() -> None:
    names = [f"op{index}" for index in range(30)]
    found = compared(report(names), report([names[0], names[22], *names[1:22], *names[23:]]))
    assert not found["differs"] and found["limits"] == {"tau": None, "changes": 2, "sqnr_drop": 3.0}
    markdown = to_markdown(found)
    assert "agree.**" not in markdown
    verdict = (
        "**The reports differ within the limits:** of the 3 most sensitive ops, `op22` went from rank 23 to 2, `op2`"
    )
    assert verdict in markdown


def test_the_markdown_of_equal_reports_of_one_batch_is_short() -> None:
    markdown = to_markdown(compared(report(spread=None, rank_tau=None), report(spread=None, rank_tau=None)))
    for sentence in (
        "**The reports agree.**\n\nThe limits allow 2 ops to join the 3 most sensitive, and all-INT8 to lose 3.00 dB.",
        "Kendall's tau is 1 over 10 common ops; batches of one run were not compared.",
        "Model, calibration set, engine, device, instruction set and versions are the same.",
        "No common op entered or left them.",
        "0 of 10 common ops moved beyond the noise, 0 within it.\n",
    ):
        assert sentence in markdown


def estimated(names: str, measured: str) -> dict[str, Any]:
    """A report in which only some ops were measured; each has the KL divergence that its error would give."""
    found = report(names)
    for each in found["maps"]["isolated"]["ops"]:
        each["divergence"] = each["mse_value"]
        if each["op_name"] not in measured:
            each |= {"measured": False, "mse_value": None, "mse_value_std": None, "standard_error": 0.4}
    found["measurement"] = found["measurement"] | {"effort": {"exact": "top:2", "probes": 16, "reason": "a test"}}
    return found


def test_estimates_are_compared_by_the_kl_divergence() -> None:
    whole = estimated("abcdefghij", "abcdefghij")
    found = compared(whole, estimated("abcdefghij", "ab"))
    assert not found["differs"] and not found["only_first"] and not found["moved"]
    assert found["warnings"] == ["A report has estimates of some ops, so the KL divergence ranks the ops of both."]
    assert compared(whole, estimated("jbcdefghia", "ab"))["moved"]
    for each in whole["maps"]["isolated"]["ops"]:
        each["divergence"] = None
    with pytest.raises(InputError, match="one report has estimates, and the other has no KL divergence"):
        compared(whole, estimated("abcdefghij", "ab"))


def test_reports_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="fewer than two measured ops in common"):
        compared(report("ab"), report("xy"))
    without = report() | {"maps": {}}
    with pytest.raises(InputError, match="no isolated map"):
        compared(report(), without)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"top": 0}, "top: 0 is not a number of ops"),
        ({"tau": 1.1}, "tau: 1.1 is not a Kendall's tau"),
        ({"tau": -1.1}, "tau: -1.1 is not a Kendall's tau"),
        ({"tau": float("nan")}, "tau: nan is not a Kendall's tau"),
        ({"changes": -1}, "top changes: -1 is not a number"),
        ({"sqnr_drop": float("nan")}, "sqnr drop: nan is not a loss"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**limits)


def test_ops_that_vanish_from_the_top_differ_where_there_are_too_many() -> None:
    found = compared(report("abcdefghij"), report("defghij"))
    assert found["gone_from_top"] == ["a", "b", "c"] and found["moved"] == []
    reason = "Of the 3 most sensitive ops of the first report 3 are not in the second; at most 2 may."
    assert found["reasons"] == [reason]
    assert "Of the 3 of the first and not in the second: `a`, `b`, `c`." in to_markdown(found)


@pytest.mark.parametrize(("sqnr_db", "differs"), [(None, False), (17.5, False), (16.5, True)])
def test_a_fall_of_the_sqnr_of_all_ops_differs(sqnr_db: float | None, differs: bool) -> None:
    second = report()
    second["all_ops"]["sqnr_db"] = sqnr_db
    found = compared(report(), second)
    assert found["differs"] is differs
    if differs:
        assert found["reasons"] == [
            "With every op in INT8 the SQNR fell from 20.00 dB to 16.50 dB; the limit is a loss of 3.00 dB."
        ]
    assert "With every op in INT8: 20.00 dB, then " in to_markdown(found)


def test_runs_with_7_and_8_bits_of_activation_are_warned_of_and_do_not_differ_by_that_alone() -> None:
    first, second = report(), report()
    assert compared(first, second)["warnings"] == []
    first["measurement"]["reduce_range"], second["measurement"]["reduce_range"] = True, False
    found = compared(first, second)
    assert found["changed"] == [{"what": "reduce_range", "first": "True", "second": "False"}]
    (warning,) = found["warnings"]
    assert warning.startswith(
        "The first run quantizes activations to 7 bits and the second to 8, so their scores differ"
    )
    assert not found["differs"]
    markdown = to_markdown(found)
    assert f"> **Warning:** {warning}\n\nKendall's tau" in markdown
    assert "| reduce_range | True | False |" in markdown


def decided(*schemes: str, name: str = "smallest") -> dict[str, Any]:
    """The report with a profile whose units a and b have such schemes."""
    found = report()
    point = a_point(schemes)
    frontier = a_frontier("ab", [point, a_point(["unquantized"] * 2, 0.0)])
    profiles = profiles_of({name: a_profile(point)})
    return found | {"frontier": of_frontier(frontier, a_plan()), "profiles": of_profiles(profiles)}


def test_the_units_whose_scheme_differs_in_the_first_common_profile_are_named() -> None:
    found = compared(decided("W8A8", "W8A8"), decided("W8A8", "unquantized"))
    assert found["profile"] == {
        "name": "smallest",
        "bits": [8.0, 12.0],
        "schemes": {"b": ["W8A8", "unquantized"]},
        "only": [[], []],
    }
    assert (
        "The profile smallest has 8.00 bits a weight in the first and 12.00 in the second. Units with another scheme:"
        " `b` from W8A8 to unquantized."
    ) in to_markdown(found)
    same = compared(decided("W8A8", "W8A8", name="safest"), decided("W8A8", "W8A8", name="safest"))
    assert "The profile safest has 8.00 bits a weight in the first and 8.00 in the second. Each unit has the same" in (
        to_markdown(same)
    )


def test_without_a_common_profile_that_is_said() -> None:
    found = compared(decided("W8A8", "W8A8"), decided("W8A8", "W8A8", name="safest"))
    assert found["profile"] is None and "The reports have no profile in common." in to_markdown(found)


def test_a_unit_of_one_report_alone_is_counted_and_a_scheme_of_ones_own_is_escaped() -> None:
    first, second = decided("W8A8", "W8A8"), decided("*own*", "W8A8")
    second["frontier"]["units"][1]["name"] = "c"
    found = compared(first, second)
    assert found["profile"]["schemes"] == {"a": ["W8A8", "*own*"]} and found["profile"]["only"] == [["b"], ["c"]]
    markdown = to_markdown(found)
    assert "`a` from W8A8 to &#42;own&#42;. Units of one report alone: `b`, `c`." in markdown


def run_command(folder: Path, second: Any, *options: str) -> int:
    """Compare `report()` in a.json with `second` in b.json, by the command and into c.md and c.json: the exit code."""
    (folder / "a.json").write_text(json.dumps(report()))
    (folder / "b.json").write_text(json.dumps(second))
    paths = [str(folder / "a.json"), str(folder / "b.json")]
    outputs = ["--markdown", str(folder / "c.md"), "--json", str(folder / "c.json")]
    try:
        return compare_sensitivity.main([*paths, *outputs, *options])
    except SystemExit as ended:  # argparse's
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("second", "options", "code"),
    [
        (report(), [], 0),
        (report("jihgfedcba"), [], 1),
        (report("jihgfedcba"), ["--tau", "-1", "--top-changes", "10"], 0),
        ([], [], 2),
        ({key: value for key, value in report().items() if key != "stability"}, [], 2),
        (report() | {"all_ops": report()["all_ops"] | {"sqnr_db": float("nan")}}, [], 2),
        (report(), ["--top", "0"], 2),
        (report(), ["--top", "many"], 2),
    ],
)
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: Any, options: list[str], code: int
) -> None:
    assert run_command(tmp_path, second, *options) == code
    assert (tmp_path / "c.md").exists() == (tmp_path / "c.json").exists() == (code < 2)
    if code < 2:
        found = json.loads((tmp_path / "c.json").read_text())
        assert (found["differs"], bool(found["reasons"])) == (bool(code), bool(code))
        assert capsys.readouterr().out == (tmp_path / "c.md").read_text() + "\n"


def test_an_unexpected_error_does_not_end_like_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("auto_quantize_model.report.compare.compare", fail)
    (tmp_path / "a.json").write_text(json.dumps(report()))
    assert compare_sensitivity.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 3
    assert "error: RuntimeError: a bug" in capsys.readouterr().err
