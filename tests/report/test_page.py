"""The page stands alone: it loads nothing, takes names as data, and its pictures and tables work in a browser."""

import json
import re
import shutil
from functools import cache
from html.parser import HTMLParser

import jsonschema
import pytest
from build import with_estimates
from test_document import a_decision, of_three_schemes
from test_figures import HOSTILE, choice, from_inc, measured, no_error_at_all, renamed, report_of, without_images

from auto_quantize_model.commands import draw_figures
from auto_quantize_model.commands import render_page as render_page_command
from auto_quantize_model.config import Target
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import read_json, write_text
from auto_quantize_model.report import sentences
from auto_quantize_model.report.document import SCHEMA
from auto_quantize_model.report.page import render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BARE = {"files": {}, "exports": {}}


class Elements(HTMLParser):
    """Tags with their attributes, visible text, and what stands in scripts of each kind."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", {}
        self.kind = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.kind = (dict(attrs).get("id") or "code") if tag == "script" else "style" if tag == "style" else None

    def handle_endtag(self, tag):
        self.kind = None if tag in ("script", "style") else self.kind

    def handle_data(self, data):
        if self.kind is None:
            self.text += data
        else:
            self.scripts[self.kind] = self.scripts.get(self.kind, "") + data

    def said(self):
        return " ".join(self.text.split())


@cache
def html_of(report):
    """The page of a report (JSON) without links. Several tests look at the same page."""
    return render_page(json.loads(report), BARE)


def rendered(report):
    return Elements(html_of(json.dumps(report)))


def test_the_page_is_the_same_bytes_each_time_and_loads_nothing():
    links = {"files": {"report (JSON)": "a b.json"}, "exports": {}}
    html = render_page(report_of(measured()), links)
    assert html == render_page(report_of(measured()), links)
    page = Elements(html)
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "img", "object", "embed", "base", "form")]
    assert {tag: attrs["href"] for tag, attrs in page.tags if attrs.get("href")} == {
        "link": "data:,",
        "a": "a%20b.json",
    }
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert "@import" not in page.scripts["style"] and "url(" not in page.scripts["style"]


def test_names_are_escaped_in_the_markup_and_cannot_end_a_script():
    hostile = f"</script><img src=x onerror=alert(1)>\u2028{HOSTILE}"
    report = renamed(report_of(measured(), Target(max_kl_divergence=1)), "lm_head", hostile)
    export = {hostile: {"files": [hostile], "notes": [hostile]}}
    page = Elements(render_page(report, {"files": {}, "exports": {"smallest": export}}))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert page.text.count(hostile) >= 5
    assert hostile in {row["op_name"] for row in json.loads(page.scripts["maps"])["isolated"]["ops"]}
    assert not re.search("[<>&\u2028]", page.scripts["maps"] + page.scripts["specs"])


def test_a_link_is_never_a_scheme_and_never_a_host():
    links = {"javascript:alert(1)": "javascript%3Aalert%281%29", "//example.org/x": "/example.org/x", "a b": "a%20b"}
    page = Elements(render_page(report_of(), {"files": {path: path for path in links}, "exports": {}}))
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == list(links.values())


def test_the_page_shows_control_characters_and_has_no_empty_columns_of_images():
    report = without_images()
    report["calibration"]["name"] = "set\x1b[2J\u202e"
    page = rendered(report)
    assert "set\\x1b[2J\\u202e" in page.said() and ", with 48 tokens." in page.said()
    assert "image tokens" not in page.said()


def test_the_summary_says_what_is_decided_what_it_costs_and_how_sure_that_is():
    said = rendered(report_of(measured(), Target(max_kl_divergence=0.02))).said()
    assert "Quantize to 10.00 bits a weight on average: 3 ops in W8A8 and 1 unquantized." in said
    assert "No answer is lost: 9 of 10 are right, and 9 without quantization." in said
    assert "reaches the target (max_kl_divergence 0.02)" in said
    assert "safest: none, because the config's profiles block sets no budget" in said
    assert "At equal bytes 1 of 1 random choices loses more than the frontier" in said
    assert "1 value (1 op, maps isolated, batch 0) was measured again" in said
    assert "Activations are quantized to 7 bits of 8: Intel Neural Compressor's choice on a CPU without VNNI." in said
    assert "2 batches agree on the order with a Kendall's tau of" in said


def test_a_profile_that_breaks_the_model_is_said_on_the_page():
    points = [choice(4, 0.08, sqnr_db=4.0), choice(0, 0.0)]
    said = rendered(report_of(measured(points), Target(max_kl_divergence=1))).said()
    assert "The profile smallest breaks the model. The SQNR is 4 dB (limit 10 dB). Choose a stricter target." in said


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (lambda: report_of(), "Nothing is decided."),
        (lambda: report_of(), "decide.heldout_batches is 0"),
        (lambda: report_of(measured(), Target(min_sqnr_db=90)), "no measured choice that quantizes something reaches"),
        (lambda: report_of(measured(), Target(max_weight_bytes=1)), "no choice of schemes fits the budget"),
        (lambda: report_of(measured(), Target(max_kl_divergence=1)), "Quantize to W8A8 every op"),
        (lambda: report_of(measured(), Target(max_bits=15)), "This is the knee"),
        (lambda: report_of(plan={"maps": ("fallback",)}), "The isolated map was not measured, so there is no ranking."),
        (from_inc, "were not measured"),
        (no_error_at_all, "every mse_value is 0"),
        (lambda: report_of(stand_in="made up"), "Warning: This is a stand-in for a published model: made up."),
        (lambda: report_of(rounded="by GGUF"), "Warning: The weights were rounded once before this run: by GGUF."),
    ],
)
def test_what_was_not_measured_or_not_reached_is_said(report, sentence):
    assert sentence in rendered(report()).said()


def test_the_commands_write_pictures_and_the_page_with_relative_links(tmp_path):
    report, table = report_of(measured(), Target(max_kl_divergence=1)), tmp_path / "run" / "ranking.csv"
    write_text(tmp_path / "run" / "report.md", "# Report\n")
    write_text(table, "op_name\n")
    texts = [tmp_path / "run" / "report.md", table]
    document = write_document(tmp_path / "run" / "report.json", "report", report, files=texts)
    jsonschema.validate(json.loads(document.text()), read_json(SCHEMA))
    export = {"inc": {"title": "INC 2.6", "files": ["exports/smallest/inc.json"], "notes": ["Nothing was dropped."]}}
    write_document(tmp_path / "run" / "exports" / "index.json", "exports", {"profiles": {"smallest": export}})
    run = tmp_path / "run"
    common = ["--report", run / "report.json", "--log"]
    draw = [*common, run / "draw.log", "--directory", run / "figures"]
    page = [*common, run / "page.log", "--html", run / "page.html", "--exports", run / "exports" / "index.json"]
    page += ["--markdown", run / "report.md", "--tables", table, "--files", run / "figures" / "heat_map.svg"]
    for command, arguments in ((draw_figures, draw), (render_page_command, page)):
        assert command.main(list(map(str, arguments))) == 0
    names = ("frontier", "heat_map", "modalities", "ranked_ops")
    drawn = sorted(path.name for path in (run / "figures").iterdir())
    assert drawn == sorted(f"{name}{suffix}" for name in names for suffix in (".png", ".svg"))
    elements = Elements((run / "page.html").read_text(encoding="utf-8"))
    links = [attrs["href"] for tag, attrs in elements.tags if tag == "a"]
    assert links == ["exports/smallest/inc.json", "report.json", "report.md", "ranking.csv", "figures/heat_map.svg"]
    assert "INC 2.6: exports/smallest/inc.json" in elements.said()
    assert "Nothing was dropped." in elements.said()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tried out")
    if CHROMIUM is None:
        pytest.skip("no Chromium or Chrome on PATH: the page is not tried out in a browser")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open a report's page at a width; afterwards nothing may have been complained of, nor asked of a network."""
    complaints, asked = [], []

    def at(report, width=1280):
        path = tmp_path / "page.html"
        path.write_text(html_of(json.dumps(report)), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        for name in ("heat_map", "ranked_ops", "frontier", *["modalities"] * sentences.has_images(report)):
            page.wait_for_selector(f"#chart-{name} svg", state="attached")
        return page

    yield at
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    for context in browser.contexts:
        context.close()


def column(page, place):
    """The cells of a column in the rows that are shown."""
    return page.locator(f"#ops tbody tr:not([hidden]) td:nth-child({place})").all_inner_texts()


@pytest.mark.slow
def test_the_table_sorts_by_number_and_by_name_in_both_directions(opened):
    report = report_of(measured())
    values = {"lm_head": 1200.0, "visual.proj": 95.0, "layers.1.mlp": 9.0, "layers.0.mlp": 1e-7}
    for row in report["maps"]["isolated"]["ops"]:
        row |= {"mse_value": values[row["op_name"]], "mse_value_std": None}
    report["maps"]["isolated"]["ops"][-1]["kl_divergence"] = None
    page = opened(report)
    assert column(page, 1) == ["1", "2", "3 =", "4 ="]
    assert column(page, 4) == ["1200", "95", "9", "1.000e-7"]
    mse = page.get_by_role("button", name="mse_value")
    mse.click()
    assert column(page, 4)[0] == "1200"
    mse.focus()
    page.keyboard.press("Enter")
    assert column(page, 4) == ["1.000e-7", "9", "95", "1200"]
    assert page.locator("th[data-key=mse_value]").get_attribute("aria-sort") == "ascending"
    mse.click()
    assert column(page, 4)[0] == "1200"
    name = page.get_by_role("button", name="op_name")
    name.click()
    assert column(page, 2) == sorted(values)
    assert page.locator("th[aria-sort=ascending]").get_attribute("data-key") == "op_name"
    name.click()
    assert column(page, 2) == sorted(values, reverse=True)
    for _ in range(2):  # what has no value stands last both ways
        page.get_by_role("button", name="KL").click()
        assert column(page, 7)[-1] == "–"


@pytest.mark.slow
def test_the_table_filters_by_name_and_type_and_counts(opened):
    report = report_of()
    report["maps"]["isolated"]["ops"][0]["op_type"] = "Embedding"
    page = opened(report)
    count = page.locator("#count")
    assert count.inner_text() == "4 of 4 ops"
    page.get_by_role("searchbox", name="Name contains").fill("mlp LAYERS.")
    assert column(page, 2) == ["layers.1.mlp", "layers.0.mlp"]
    assert count.inner_text() == "2 of 4 ops"
    page.get_by_role("combobox", name="Type").select_option("Embedding")
    assert count.inner_text() == "0 of 4 ops"
    page.get_by_role("searchbox", name="Name contains").fill("")
    assert column(page, 2) == ["lm_head"]
    # What is filtered out is still printed.
    page.emulate_media(media="print")
    assert page.locator("#ops tbody tr").evaluate_all("rows => rows.every((row) => row.offsetHeight > 0)")


@pytest.mark.slow
def test_the_map_can_be_chosen_and_each_starts_at_its_most_sensitive_op(opened):
    report = report_of()
    for label in ("fallback", "requantize"):
        for row, value in zip(report["maps"][label]["ops"], (1.0, 2.0, 3.0, 4.0), strict=True):
            row |= {"mse_value": value, "mse_value_std": None}
    page = opened(report)
    assert column(page, 2)[0] == "lm_head"
    page.get_by_role("combobox", name="Map").select_option("fallback")
    assert column(page, 4) == ["1", "2", "3", "4"]
    assert "the lowest is the most sensitive" in page.locator("#direction").inner_text()
    page.get_by_role("combobox", name="Map").select_option("requantize")
    assert column(page, 1) == ["–"] * 4 and column(page, 4) == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_a_tooltip_names_the_op_under_the_pointer_as_plain_text(opened):
    page = opened(renamed(renamed(report_of(measured()), "lm_head", HOSTILE), "W8A8", HOSTILE))
    for chart in ("heat_map", "ranked_ops", "frontier", "modalities"):
        mark = "rect" if chart == "heat_map" else "symbol"
        # The last cell of the map is the op, the first of the ranking; the scheme is the first control.
        marks = page.locator(f"#chart-{chart} svg g.mark-{mark}.role-mark path[aria-label*='alert']")
        marks.first.hover(force=True)  # a label or another curve may lie on it, of the same op
        page.locator("#vg-tooltip-element.visible").wait_for()
        assert HOSTILE in page.locator("#vg-tooltip-element").text_content()
        assert page.locator("#vg-tooltip-element script").count() == 0
        page.mouse.move(0, 0)
        page.locator("#vg-tooltip-element.visible").wait_for(state="detached")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_body_never_scrolls_sideways_and_every_chart_can_be_reached(opened, width):
    report = renamed(
        report_of(measured(), Target(max_kl_divergence=1)), "lm_head", "model." + "very_long_name." * 12 + "proj"
    )
    page = opened(report, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    hidden = "element => element.scrollWidth > element.clientWidth && getComputedStyle(element).overflowX !== 'auto'"
    assert not any(page.locator(".scroll, #ops-scroll").evaluate_all(f"elements => elements.map({hidden})"))


@pytest.mark.slow
def test_in_print_controls_are_hidden_and_pictures_fit_the_paper(opened):
    page = opened(report_of(measured(), Target(max_kl_divergence=1)), 700)
    page.emulate_media(media="print")
    for hidden in (".controls", "#ops thead button", "p.screen"):
        assert not page.locator(hidden).first.is_visible()
    widths = page.locator(".chart svg").evaluate_all(
        "charts => charts.map((chart) => chart.getBoundingClientRect().width)"
    )
    assert len(widths) == 4 and 0 < max(widths) <= 700
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.slow
def test_a_page_of_every_kind_of_report_opens_without_complaint(opened):
    reports = (
        report_of(plan={"maps": ("fallback",)}),
        from_inc(),
        without_images(),
        no_error_at_all(),
        of_three_schemes(),
        of_three_schemes(with_estimates),
        a_decision(),
    )
    for report in reports:
        opened(report).close()
