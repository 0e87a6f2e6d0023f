"""The page of a comparison says what the Markdown says, takes names as data, and works in a browser."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from test_compare import decided, report
from test_figures import HOSTILE, renamed
from test_page import Elements, browser  # noqa: F401  a fixture

from auto_quantize_model.commands import compare_sensitivity
from auto_quantize_model.report.compare import Limits, compare
from auto_quantize_model.report.compare_page import labels, render_comparison
from auto_quantize_model.report.compare_text import to_markdown

THIRTY = [f"op{index}" for index in range(30)]
JUMPED = [THIRTY[0], THIRTY[22], *THIRTY[1:22], *THIRTY[23:]]


def html_of(first: dict[str, Any], second: dict[str, Any]) -> str:
    return render_comparison(compare(first, second, Limits(3)), first, second)


def said(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The visible text, with a space after each cell of a table."""
    text: str = Elements(html_of(first, second).replace("</t", " </t")).said()
    return text


def test_the_page_begins_with_the_verdict_of_the_markdown() -> None:
    first, second = report(THIRTY), report(JUMPED)
    markdown = to_markdown(compare(first, second, Limits(3)))
    verdict = markdown.split("\n\n")[1].replace("*", "").replace("`", "")
    assert verdict.startswith(
        "The reports differ within the limits: of the 3 most sensitive ops, op22 went from rank 23"
    )
    text = said(first, second)
    assert f"The verdict {verdict} The limits allow 2 ops to join" in text and "agree." not in text
    assert "The verdict The reports agree." in said(first, first)
    assert "The verdict The reports differ: Kendall's tau is -1, below" in said(first, report(THIRTY[::-1]))


def test_what_is_in_one_run_alone_is_listed_as_such() -> None:
    first, second = decided("W8A8", "W8A8"), decided("FP8", "unquantized")
    second["frontier"]["candidates"] = ["FP8"]
    second["frontier"]["units"][1]["name"] = "c"
    second["maps"]["isolated"]["ops"] = second["maps"]["isolated"]["ops"][1:]
    second["profiles"]["profiles"]["safest"] = second["profiles"]["profiles"]["smallest"]
    first["profiles"]["missed"]["safest"] = "no budget is set"
    text = said(first, second)
    assert "The first run chose from W8A8. The second run chose from FP8." in text
    assert "Candidates of the first run alone: W8A8. Candidates of the second run alone: FP8." in text
    assert "3 of 3 units differ in a profile" in text and "safest first none, because no budget is set" in text
    assert " a W8A8 FP8 – FP8 b W8A8 not in this run – not in this run c not in this run " in text
    assert "a language – – – only in the first run" in text
    assert "The second run decided nothing." in said(first, report()) and "Neither run has" in said(report(), report())


def test_names_are_escaped_and_the_page_loads_nothing() -> None:
    first, second = (renamed(found, "op22", f"</script>{HOSTILE}") for found in (report(THIRTY), report(JUMPED)))
    html = html_of(first, second)
    assert html == html_of(first, second)
    page = Elements(html)
    assert [tag for tag, _ in page.tags].count("script") == 3 and f"</script>{HOSTILE} went from" in page.text
    assert not [attrs for _, attrs in page.tags if "src" in attrs] and "alert(1)</script>" not in html


def test_names_of_neighbours_do_not_lie_on_each_other() -> None:
    placed = labels([{"op": name, "first": 20, "second": rank} for rank, name in enumerate("abcd", start=10)], 30)
    heights = [label["log"] for label in placed]
    assert all(after - before > 0.09 for before, after in zip(heights, heights[1:], strict=False))


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    for name, found in (("a", report(THIRTY)), ("b", report(JUMPED))):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    page = tmp_path / "moves.html"
    ended = compare_sensitivity.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--html", str(page)])
    assert ended == 0 and "op22 went from rank 23 to 2" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_sorts_filters_copies_and_draws(browser: Any, tmp_path: Path, width: int) -> None:  # noqa: F811
    path, complaints = tmp_path / "page.html", []
    first, second = (
        found | {key: chosen[key] for key in ("frontier", "profiles")}
        for found, chosen in (
            (report(THIRTY), decided("W8A8", "W8A8")),
            (report(JUMPED), decided("W8A8", "unquantized")),
        )
    )
    path.write_text(html_of(first, second), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    shown = page.locator("#units tbody tr:not([hidden])")
    assert shown.all_inner_texts() == ["b\tW8A8\tunquantized"]  # units that differ come first
    page.locator("#decisions .only").select_option("")
    assert shown.count() == 2

    def column(index: int) -> list[str]:
        found: list[str] = page.locator(f"#ops tr:not([hidden]) td:nth-child({index})").all_inner_texts()
        return found

    assert column(1)[:3] == ["op0", "op22", "op1"] and page.locator("#all-ops .count").inner_text() == "30 of 30"
    up = page.locator("#ops").get_by_role("button", name="places up")
    up.click()
    assert column(5)[:2] == ["-1", "-1"]
    up.click()
    assert (column(1)[0], column(5)[0]) == ("op22", "+21")
    page.get_by_label("Beyond the noise").select_option("yes")
    page.locator("#all-ops .filter").fill("OP22")
    with page.expect_download() as caught:
        page.locator("#all-ops .tools").get_by_role("button", name="CSV").click()
    head, row = csv.reader(caught.value.path().read_text().splitlines())
    assert head[0] == "op_name" and row == ["op22", "language", "23", "2", "+21", "yes"]
    page.locator("#chart-ranks").scroll_into_view_if_needed()
    page.locator("#chart-ranks svg text[fill='#E8E8E8']", has_text="op22").wait_for()
    page.close()
    assert complaints == []
