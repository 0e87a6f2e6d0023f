"""The page of several runs: a row for each profile and each run, names as data, and no script."""

import json
from pathlib import Path
from typing import Any

import pytest
from build import a_point
from test_compare import decided, report
from test_page import Elements

from auto_quantize_model.commands import compare_models
from auto_quantize_model.documents import write_document
from auto_quantize_model.report.models_page import render_models


def named(found: dict[str, Any], model: str) -> dict[str, Any]:
    return found | {"model": found["model"] | {"model": model}}


def with_uniform(found: dict[str, Any], **divergences: float) -> dict[str, Any]:
    """A report whose controls are these uniform schemes."""
    from dataclasses import asdict

    points = [asdict(a_point([name] * 2, kl, kind="uniform", name=name)) for name, kl in divergences.items()]
    return found | {"frontier": found["frontier"] | {"controls": points}}


def test_profiles_and_uniform_schemes_of_all_runs_stand_in_rows() -> None:
    one = with_uniform(named(decided("W8A8", "unquantized"), "one"), W8A8=0.25)
    other = with_uniform(named(decided("W8A8", "W8A8", name="safest"), "other"), W8A8=0.5, NVFP4=0.75)
    other["profiles"]["missed"]["smallest"] = "no choice reaches the target"
    page = Elements(render_models([one, other], ["a b/one.html", ""]).replace("</t", " </t"))
    text = page.said()
    name = one["calibration"]["name"]
    assert f"one {name} smallest 12.00 124 bytes 0.01 0.005 to 0.02 90.00 %" in text
    assert f"other {name} smallest none, because no choice reaches the target" in text
    assert f"other {name} safest 8.00 116 bytes" in text
    assert f"W8A8 NVFP4 one {name} 0.25 – other {name} 0.5 0.75" in text
    assert f"one on {name} Quantize to 12.00 bits a weight on average: 1 op in W8A8" in text
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"][3:] == ["a%20b/one.html"]
    assert set(page.scripts) == {"style"}


def test_a_run_without_a_decision_says_so_and_a_name_is_no_markup() -> None:
    text = Elements(render_models([named(report(), "<b>x</b>")], ["//host/x"])).said()
    assert "<b>x</b> on " in text and "Nothing is decided." in text
    assert "One scheme for all ops" not in text


def test_the_command_writes_the_page_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.json" for name in ("one", "other")]
    for path in paths:
        body = json.loads(json.dumps(named(decided("W8A8", "W8A8"), path.stem)))
        write_document(path, "report", {key: value for key, value in body.items() if key != "document"})
    words = ["--reports", *map(str, paths), "--html", str(tmp_path / "models.html")]
    assert compare_models.main([*words, "--pages", "x.html"]) == 2
    assert "--pages: 1 for 2 reports; name the page of each report" in capsys.readouterr().err
    assert compare_models.main([*words, "--pages", str(tmp_path / "x.html"), str(tmp_path / "y.html")]) == 0
    assert 'href="y.html"' in (tmp_path / "models.html").read_text()
