"""Two reports compared: noise is no difference, and a CI job can act on the exit code."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auto_quantize_model.compare import compare, to_markdown
from auto_quantize_model.files import InputError

ROOT = Path(__file__).parents[1]


def report(names: str = "abcdefghij", rank_tau: float | None = 0.9, **versions: str) -> dict[str, Any]:
    """A report whose ops are letters, the most sensitive first."""
    return {
        "schema_version": 4,
        "model": {"model": "tiny", "digest": "0"},
        "calibration": {"name": "set", "digest": "1"},
        "measurement": {"engine": "replay", "device": "cpu"},
        "versions": {"torch": "2.13.0"} | versions,
        "trust": {"rank_tau": rank_tau},
        "maps": {"isolated": {"ops": [{"op_name": name} for name in reversed(names)]}},
    }


def test_a_report_agrees_with_itself() -> None:
    found = compare(report(), report(), 3, 0.8)
    assert (found["differs"], found["moved"], found["changed"]) == (False, [], [])
    assert found["tau"] == pytest.approx(1)


def test_moves_and_the_top_set_are_named() -> None:
    found = compare(report("abcdefghij"), report("dabcefghij", torch="2.14.0"), 3, 0.8)
    assert (found["entered"], found["left"]) == (["d"], ["c"])
    assert found["moved"][0] == {"op_name": "d", "first": 4, "second": 1}
    assert found["changed"] == [{"what": "torch", "first": "2.13.0", "second": "2.14.0"}]
    assert not found["differs"]


@pytest.mark.parametrize(("rank_tau", "differs"), [(0.9, True), (0.3, False), (None, True)])
def test_a_move_within_the_noise_of_the_batches_is_no_difference(rank_tau: float | None, differs: bool) -> None:
    shuffled = report("ecbafdihgj", rank_tau=rank_tau)
    found = compare(report(rank_tau=rank_tau), shuffled, 3, 0.8)
    assert 0.3 < found["tau"] < 0.8
    assert found["differs"] is differs


def test_ops_of_one_report_alone_are_listed() -> None:
    found = compare(report("abcd"), report("bcdx"), 2, 0.8)
    assert (found["only_first"], found["only_second"], found["common"]) == (["a"], ["x"], 3)
    assert "Only in the first: `a`. Only in the second: `x`." in to_markdown(found)


def test_reports_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="fewer than two measured ops in common"):
        compare(report("ab"), report("xy"), 2, 0.8)
    without = copy.deepcopy(report())
    without["maps"] = {}
    with pytest.raises(InputError, match="no isolated map"):
        compare(report(), without, 2, 0.8)


@pytest.mark.parametrize(("second", "code"), [("abcdefghij", 0), ("jihgfedcba", 1), ("", 2)])
def test_the_exit_code_says_whether_the_rankings_differ(tmp_path: Path, second: str, code: int) -> None:
    (tmp_path / "a.json").write_text(json.dumps(report()))
    (tmp_path / "b.json").write_text(json.dumps(report(second) if second else []))
    command = [sys.executable, "scripts/compare_sensitivity.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    command += ["--markdown", str(tmp_path / "c.md"), "--json", str(tmp_path / "c.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "c.md").exists() == (tmp_path / "c.json").exists() == (code < 2)
