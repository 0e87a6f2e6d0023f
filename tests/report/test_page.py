"""The page stands alone: it loads nothing, takes names as data, and its pictures and tables work in a browser."""

import csv
import json
import random
import re
import shutil
from dataclasses import asdict
from functools import cache
from html.parser import HTMLParser

import jsonschema
import pytest
import yaml
from build import a_point, options, with_estimates
from test_document import a_decision, of_three_schemes
from test_figures import (
    HOSTILE,
    OPS_417,
    choice,
    from_inc,
    measured,
    no_error_at_all,
    renamed,
    report_of,
    without_images,
)

from auto_quantize_model.commands import draw_figures
from auto_quantize_model.commands import render_page as render_page_command
from auto_quantize_model.config import Target
from auto_quantize_model.decide.allocate import allocate, budgets, bytes_of, loss_of, smallest
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import read_json, write_text
from auto_quantize_model.records import body_of
from auto_quantize_model.report import sentences
from auto_quantize_model.report.document import SCHEMA
from auto_quantize_model.report.page import ALLOCATE, render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BARE = {"files": {}, "exports": {}, "texts": {}}


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
    links = {"files": {"report (JSON)": "a b.json"}, "exports": {}, "texts": {}}
    html = render_page(report_of(measured()), links)
    assert html == render_page(report_of(measured()), links)
    page = Elements(html)
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "img", "object", "embed", "base", "form")]
    targets = [attrs["href"] for _, attrs in page.tags if attrs.get("href")]
    names = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert [target for target in targets if target[0] != "#"] == ["data:,", "a%20b.json"]
    assert {target[1:] for target in targets if target[0] == "#"} <= names
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert "@import" not in page.scripts["style"] and "url(" not in page.scripts["style"]


def test_names_are_escaped_in_the_markup_and_cannot_end_a_script():
    hostile = f"</script><img src=x onerror=alert(1)>\u2028{HOSTILE}"
    report = renamed(report_of(measured(), Target(max_divergence=1)), "lm_head", hostile)
    export = {hostile: {"files": [hostile], "notes": [hostile]}}
    page = Elements(render_page(report, {"files": {}, "exports": {"smallest": export}, "texts": {hostile: hostile}}))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert page.text.count(hostile) >= 5
    assert hostile in {row["op_name"] for row in json.loads(page.scripts["data"])["maps"]["isolated"]["ops"]}
    assert not re.search("[<>&\u2028]", page.scripts["data"] + page.scripts["specs"])


def test_a_link_is_never_a_scheme_and_never_a_host():
    links = {"javascript:alert(1)": "javascript%3Aalert%281%29", "//example.org/x": "/example.org/x", "a b": "a%20b"}
    page = Elements(render_page(report_of(), {"files": {path: path for path in links}, "exports": {}, "texts": {}}))
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert [target for target in targets if target[0] != "#"] == list(links.values())


def test_the_page_shows_control_characters_and_has_no_empty_columns_of_images():
    report = without_images()
    report["calibration"]["name"] = "set\x1b[2J\u202e"
    page = rendered(report)
    assert "set\\x1b[2J\\u202e" in page.said() and ", with 48 tokens." in page.said()
    assert "image tokens" not in page.said()


def test_the_summary_says_what_is_decided_what_it_costs_and_how_sure_that_is():
    said = rendered(report_of(measured(), Target(max_divergence=0.02))).said()
    assert "Quantize to 10.00 bits a weight on average: 3 ops in W8A8 and 1 unquantized." in said
    assert "Of 9 answers that are right without quantization, none is lost (95 % interval 0 to" in said
    assert "reaches the target (max_divergence 0.02)" in said
    assert "safest: none, because the config's profiles block sets no budget" in said
    assert "At equal bytes 1 of 1 random choices loses more than the frontier" in said
    assert "1 value (1 op, maps isolated, batch 0) was measured again" in said
    assert "Activations are quantized to 7 bits of 8: Intel Neural Compressor's choice on a CPU without VNNI." in said
    assert "2 batches agree on the order with a Kendall's tau of" in said


def test_a_profile_that_breaks_the_model_is_said_on_the_page():
    points = [choice(4, 0.08, sqnr_db=4.0), choice(0, 0.0)]
    said = rendered(report_of(measured(points), Target(max_divergence=1))).said()
    assert "The profile smallest breaks the model. The SQNR is 4 dB (limit 10 dB). Choose a stricter target." in said


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (lambda: report_of(), "Nothing is decided."),
        (lambda: report_of(), "decide.heldout_batches is 0"),
        (lambda: report_of(measured(), Target(min_sqnr_db=90)), "no measured choice reaches"),
        (lambda: report_of(measured(), Target(max_weight_bytes=1)), "no choice of schemes fits the budget"),
        (lambda: report_of(measured(), Target(max_divergence=1)), "Quantize to W8A8 every op"),
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
    report, table = report_of(measured(), Target(max_divergence=1)), tmp_path / "run" / "ranking.csv"
    write_text(tmp_path / "run" / "report.md", "# Report\n")
    write_text(table, "op_name\n")
    texts = [tmp_path / "run" / "report.md", table]
    document = write_document(tmp_path / "run" / "report.json", "report", report, files=texts)
    jsonschema.validate(json.loads(document.text()), read_json(SCHEMA))
    export = {
        "inc": {
            "title": "INC 2.6",
            "files": ["exports/smallest/inc.json", "exports/smallest/large.json"],
            "notes": ["Nothing was dropped."],
        }
    }
    run = tmp_path / "run"
    exported = [run / "exports" / "smallest" / name for name in ("inc.json", "large.json")]
    for path, text in zip(exported, ('{"an": "export"}', "x" * 300_000), strict=True):
        write_text(path, text)
    write_document(run / "exports" / "index.json", "exports", {"profiles": {"smallest": export}}, files=exported)
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
    links = [attrs["href"] for tag, attrs in elements.tags if tag == "a" and attrs["href"][0] != "#"]
    assert links[:2] == ["exports/smallest/inc.json", "exports/smallest/large.json"]
    assert links[2:] == ["report.json", "report.md", "ranking.csv", "figures/heat_map.svg"]
    assert "INC 2.6: exports/smallest/inc.json" in elements.said()
    assert '{"an": "export"}' in elements.text and "xxx" not in elements.text
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
        pictures = ("frontier", "strips", "heat_map", "ranked_ops", *["modalities"] * sentences.has_images(report))
        for name in pictures:  # a picture is drawn when it comes near the view
            page.locator(f"#chart-{name}").scroll_into_view_if_needed()
            page.wait_for_selector(f"#chart-{name} svg", state="attached")
        page.evaluate("scrollTo(0, 0)")
        return page

    yield at
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    for context in browser.contexts:
        context.close()


def column(page, key):
    """The cells of a column in the rows that are shown."""
    keys = page.locator("#ops thead th").evaluate_all("heads => heads.map((head) => head.dataset.key)")
    return page.locator(f"#ops tbody tr:not([hidden]) td:nth-child({keys.index(key) + 1})").all_inner_texts()


@pytest.mark.slow
def test_the_table_sorts_by_number_and_by_name_in_both_directions(opened):
    report = report_of(measured())
    values = {"lm_head": 1200.0, "visual.proj": 95.0, "layers.1.mlp": 9.0, "layers.0.mlp": 1e-7}
    for row in report["maps"]["isolated"]["ops"]:
        row |= {"mse_value": values[row["op_name"]], "mse_value_std": None}
    report["maps"]["isolated"]["ops"][-1]["divergence"] = None
    page = opened(report)
    assert column(page, "rank") == ["1", "2", "3 =", "4 ="]
    assert column(page, "mse_value") == ["1200", "95", "9", "1.000e-7"]
    mse = page.get_by_role("button", name="mse_value")
    mse.click()
    assert column(page, "mse_value")[0] == "1200"
    mse.focus()
    page.keyboard.press("Enter")
    assert column(page, "mse_value") == ["1.000e-7", "9", "95", "1200"]
    assert page.locator("th[data-key=mse_value]").get_attribute("aria-sort") == "ascending"
    mse.click()
    assert column(page, "mse_value")[0] == "1200"
    name = page.get_by_role("button", name="op_name")
    name.click()
    assert column(page, "op_name") == sorted(values)
    assert page.locator("th[aria-sort=ascending]").get_attribute("data-key") == "op_name"
    name.click()
    assert column(page, "op_name") == sorted(values, reverse=True)
    for _ in range(2):  # what has no value stands last both ways
        page.get_by_role("button", name="KL").click()
        assert column(page, "divergence")[-1] == "–"


@pytest.mark.slow
def test_the_table_filters_by_name_and_type_and_counts(opened):
    report = report_of()
    report["maps"]["isolated"]["ops"][0]["op_type"] = "Embedding"
    page = opened(report)
    count = page.locator("#count")
    assert count.inner_text() == "4 of 4 ops"
    page.get_by_role("searchbox", name="Name contains").fill("mlp LAYERS.")
    assert column(page, "op_name") == ["layers.1.mlp", "layers.0.mlp"]
    assert count.inner_text() == "2 of 4 ops"
    page.get_by_role("combobox", name="Type").select_option("Embedding")
    assert count.inner_text() == "0 of 4 ops"
    page.get_by_role("searchbox", name="Name contains").fill("")
    assert column(page, "op_name") == ["lm_head"]
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
    assert column(page, "op_name")[0] == "lm_head"
    page.get_by_role("combobox", name="Map").select_option("fallback")
    assert column(page, "mse_value") == ["1", "2", "3", "4"]
    assert "the lowest is the most sensitive" in page.locator("#direction").inner_text()
    page.get_by_role("combobox", name="Map").select_option("requantize")
    assert column(page, "rank") == ["–"] * 4 and column(page, "mse_value") == ["1", "2", "3", "4"]


def decided():
    """A report whose smallest profile leaves lm_head alone, the unit with the largest loss."""
    report = report_of(measured(), Target(max_divergence=0.02))
    report["frontier"]["units"][-1]["loss"]["W8A8"] = 0.05
    return report


def of_budget(page):
    """The facts of the slider's choice: {title: text}."""
    titles, texts = (page.locator(f"#budget-facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(titles, texts, strict=True))


@pytest.mark.slow
def test_the_slider_chooses_for_its_budget_and_shows_the_nearest_measured_choice(opened):
    page = opened(decided())
    facts = of_budget(page)  # it starts at the decided profile
    assert facts["Size"] == "10.00 bits a weight; all weights take 140 bytes, 85.37 % of those without quantization"
    assert (
        facts["Predicted"] == "KL divergence 0.03 nats per token, the least for these bytes"
        and facts["Units"] == "3 in W8A8, 1 unquantized"
    )
    assert facts["Nearest measured choice"].startswith("10.00 bits a weight, 140 bytes: KL divergence 0.01 nats (95 %")
    assert "90.00 % of the positions; 90.00 % of the answers are right" in facts["Nearest measured choice"]
    assert page.locator("#units tbody td:nth-child(2)").all_inner_texts().count("W8A8") == 3
    page.locator("#bits").fill("8")
    assert of_budget(page)["Units"] == "4 in W8A8" and page.locator("#bits-number").input_value() == "8.00"
    assert page.locator("#bits").get_attribute("aria-valuetext") == "8.00 bits a weight, 132 bytes"
    page.locator("#bits-number").fill("16")
    page.locator("#bits-number").press("Enter")
    assert of_budget(page)["Units"] == "4 unquantized" and of_budget(page)["Predicted"].startswith(
        "KL divergence 0 nats"
    )
    page.get_by_role("button", name="smallest").click()
    assert of_budget(page)["Units"] == "3 in W8A8, 1 unquantized"
    page.locator("#chart-frontier svg g.mark-symbol.role-mark path[aria-label*='random']").first.click(force=True)
    assert page.locator("#bits").input_value() == "10"


@pytest.mark.slow
def test_a_refined_profile_is_shown_as_it_is_and_no_choice_of_the_slider_is_near_it(opened):
    made = a_point(["unquantized", *["W8A8"] * 3], 0.009, accuracy=0.9, answers_lost=0, name="refined")
    report = report_of(measured([choice(4, 0.08), choice(3, 0.01), made, choice(0, 0.0)]), Target(max_divergence=0.02))
    report["frontier"]["units"][-1]["loss"]["W8A8"] = 0.05
    page = opened(report)
    facts = of_budget(page)
    assert facts["Predicted"] == "KL divergence 0.07 nats per token, a larger sum than the least for these bytes"
    assert facts["Nearest measured choice"].startswith("10.00 bits a weight (refined), 140 bytes: KL divergence 0.009 ")
    assert page.locator("#units tbody td:nth-child(2)").all_inner_texts() == ["unquantized", *["W8A8"] * 3]
    page.locator("#bits-number").fill("10.1")
    page.locator("#bits-number").press("Enter")
    facts = of_budget(page)
    assert facts["Predicted"] == "KL divergence 0.03 nats per token, the least for these bytes"
    assert facts["Nearest measured choice"].startswith("10.00 bits a weight, 140 bytes: KL divergence 0.01 ")
    page.get_by_role("button", name="smallest").click()
    assert "(refined)" in of_budget(page)["Nearest measured choice"]


def in_browser(browser, units, sizes):
    """What the page's script chooses for each budget, null where nothing fits."""
    asked = {"units": [asdict(unit) for unit in units], "sizes": sizes}
    call = f"(asked) => {{ {ALLOCATE.read_text()}; return asked.sizes.map((size) => allocate(asked.units, size)); }}"
    page = browser.new_page()
    found = page.evaluate(call, asked)
    page.close()
    return found


@pytest.mark.slow
def test_the_browser_chooses_as_well_as_the_solver(browser):
    draw = random.Random(0)
    coarse = [
        options(f"u{index}", **{name: (draw.randint(4, 12), 10 ** draw.uniform(-6, -2)) for name in ("a", "b", "c")})
        for index in range(40)
    ]
    fine = [
        options(f"u{index}", **{name: (draw.randint(100, 10**6), 10 ** draw.uniform(-6, -2)) for name in "abcd"})
        for index in range(60)
    ]
    for unit in fine:
        unit.bytes["unquantized"] = 10**6
    for units in (coarse, fine):
        sizes = [*budgets(units, 9), bytes_of(smallest(units), units) - 1]
        *found, none = in_browser(browser, units, sizes)
        assert none is None
        for size, made in zip(sizes, found, strict=False):
            assert bytes_of(made["choice"], units) <= size and made["above"] == 0
            assert loss_of(made["choice"], units)[0] == pytest.approx(loss_of(allocate(units, size), units)[0], 1e-12)


@pytest.mark.slow
def test_where_the_browser_cannot_compare_all_choices_it_says_how_far_the_best_may_be(browser):
    draw = random.Random(0)
    units = [options(f"u{index}", **dict.fromkeys("ab", (0, 0.0))) for index in range(120)]
    for unit in units:
        unit.bytes.update({"a": draw.randint(10**6, 10**8), "b": draw.randint(10**6, 10**8), "unquantized": 10**8})
        # Each byte saves the same, so the best choice is the one that fills the budget most.
        unit.loss.update({name: (10**8 - size) * 1e-9 for name, size in unit.bytes.items()})
    budget = budgets(units, 3)[1]
    (made,) = in_browser(browser, units, [budget])
    loss = loss_of(made["choice"], units)[0]
    assert bytes_of(made["choice"], units) <= budget and 0 < made["above"] < 1e-5 * loss
    least = (120 * 10**8 - budget) * 1e-9  # if a choice filled the budget to the last byte
    assert loss - made["above"] == pytest.approx(least)


@pytest.mark.slow
def test_the_recipe_names_each_op_once_and_ignores_the_other_linears(opened):
    report = decided()
    fields = {"weights": {"num_bits": 8, "dynamic": False, "actorder": None, "type": "int"}, "input_activations": None}
    report["frontier"]["fields"] = {"W8A8": fields}
    page = opened(report)
    recipe = yaml.safe_load(page.locator("#recipe").text_content())
    assert recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"] == {
        "config_groups": {
            "W8A8": {
                "targets": [
                    rf"re:(.*\.)?{re.escape(name)}$" for name in ("visual.proj", "layers.0.mlp", "layers.1.mlp")
                ],
                "weights": {"num_bits": 8, "dynamic": False, "type": "int"},
            }
        },
        "ignore": [r"re:(.*\.)?lm_head$"],
    }


@pytest.mark.slow
def test_a_recipe_of_hostile_names_is_yaml_and_an_ambiguous_name_stands_whole(opened):
    report = renamed(renamed(decided(), "W8A8", HOSTILE), "lm_head", HOSTILE)
    report = renamed(report, "visual.proj", "visual.layers.0.mlp")
    modifier = yaml.safe_load(opened(report).locator("#recipe").text_content())["quant_stage"]["quant_modifiers"]
    groups = modifier["QuantizationModifier"]["config_groups"]
    assert list(groups) == [HOSTILE]
    assert groups[HOSTILE]["targets"][:2] == [r"re:(.*\.)?visual\.layers\.0\.mlp$", r"re:layers\.0\.mlp$"]
    assert re.fullmatch(modifier["QuantizationModifier"]["ignore"][0][3:], f"model.{HOSTILE}")


@pytest.mark.slow
def test_tables_and_recipes_can_be_copied_and_saved(opened):
    report = decided()
    report["maps"]["isolated"]["ops"][0]["op_type"] = "=1+1"
    page = opened(report)
    page.get_by_role("searchbox", name="Name contains").fill("lm_head")
    tools = page.locator("#all-ops .tools")
    with page.expect_download() as caught:
        tools.get_by_role("button", name="CSV").click()
    assert caught.value.suggested_filename == "all_ops.csv"
    head, row = csv.reader(caught.value.path().read_text().splitlines())
    assert head[:4] == ["rank", "op_name", "op_type", "kept as"]
    assert row[:4] == ["1", "lm_head", "'=1+1", "unquantized"]
    page.evaluate("document.oncopy = (event) => { window.copied = getSelection().toString(); }")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    tools.get_by_role("button", name="Copy").click()
    assert page.evaluate("window.copied").splitlines()[1].split("\t")[:2] == ["1", "lm_head"]
    page.get_by_text("Recipe for llm-compressor").click()
    with page.expect_download() as caught:
        page.locator("#budget").get_by_role("button", name="Save").click()
    assert caught.value.suggested_filename == "llm_compressor_recipe.yaml"
    assert "W8A8" in caught.value.path().read_text()


@pytest.mark.slow
def test_a_row_and_a_mark_open_the_op_with_its_schemes_and_profiles(opened):
    page = opened(a_decision())
    panel = page.locator("dialog#op")
    page.locator("#ops tbody tr").filter(has_text="b").first.click()
    assert panel.get_by_role("heading", name="b", exact=True).is_visible()
    rows = panel.locator("table").first.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [
        ["inc_int8", "2"],
        ["W8A8", "2"],
        ["NVFP4", "its 8 columns do not divide"],
    ]
    choices = panel.locator("table").last.locator("tbody tr").all_inner_texts()
    assert choices[:2] == ["smallest\tunquantized", "safest\tunquantized"] and choices[2].startswith("your budget")
    page.keyboard.press("Escape")
    assert not panel.is_visible()
    page.locator("#chart-strips svg g.mark-symbol.role-mark path[aria-label*='op: c']").first.click(force=True)
    assert panel.get_by_role("heading", name="c", exact=True).is_visible()
    assert "part of no decision" in panel.inner_text()


@pytest.mark.slow
def test_the_table_filters_by_scheme_and_tower_and_says_what_each_op_is_kept_as(opened):
    page = opened(a_decision())
    assert column(page, "kept_as") == ["unquantized", "unquantized", "W8A8"]
    page.get_by_role("combobox", name="Scheme").select_option("NVFP4")
    assert column(page, "op_name") == ["a", "c"] and column(page, "divergence") == ["5", "1"]
    assert "Only this op is in NVFP4." in page.locator("#direction").inner_text()
    page = opened(report_of(measured()))
    page.get_by_role("combobox", name="Tower").select_option("vision")
    assert column(page, "op_name") == ["visual.proj"]
    assert page.get_by_role("combobox", name="Scheme").is_disabled()


@pytest.mark.slow
def test_a_dark_screen_gets_a_dark_page_and_dark_pictures(opened):
    page = opened(report_of(measured()))
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#chart-frontier svg text').getAttribute('fill')"
    assert (page.evaluate(paper), page.evaluate(ink)) == ("rgb(255, 255, 255)", "#1B1B1B")
    page.emulate_media(color_scheme="dark")
    page.locator("#chart-frontier svg text[fill='#E8E8E8']").first.wait_for()
    assert page.evaluate(paper) == "rgb(20, 23, 27)"


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


def of_417_ops():
    """A report of the 3B shape: 417 ops in five schemes, with a frontier of as many units."""
    report = a_decision()
    row = report["maps"]["isolated"]["ops"][0]
    rows = [
        row | {"op_name": name, "mse_value": 500.0 - i, "divergence": 10 ** (-1 - i / 100), "rank": i + 1}
        for i, name in enumerate(OPS_417)
    ]
    report["maps"]["isolated"]["ops"] = rows
    report["ops"] = [report["ops"][0] | {"op_name": name} for name in OPS_417]
    names = ("inc_int8", "W8A8", "FP8_DYNAMIC", "W4A16", "NVFP4")
    report["schemes"] = {name: report["schemes"]["W8A8"] | {"ops": rows} for name in names}
    costs = {
        name: (size, loss) for name, size, loss in zip(names[1:], (9, 9, 5, 4), (1e-5, 2e-5, 1e-3, 2e-3), strict=True)
    }
    report["frontier"]["units"] = [body_of(options(name, **costs)) for name in OPS_417]
    report["frontier"] |= {"candidates": list(costs), "fields": dict.fromkeys(costs, {})}
    points = [report["frontier"]["points"][0] | {"schemes": ["NVFP4"] * 417}] * 15
    report["frontier"] |= {
        "points": points,
        "controls": [point | {"kind": "random", "name": "r"} for point in points] * 2,
    }
    for profile in report["profiles"]["profiles"].values():
        profile["point"] = points[0]
    return report


def test_a_page_of_417_ops_in_five_schemes_stays_below_8_megabytes():
    export = {f"tool{index}": {"files": [f"{index}.py"], "notes": []} for index in range(5)}
    texts = {f"{index}.py": "".join(f"re:(.*\\.)?{name}$\n" for name in OPS_417) for index in range(5)}
    links = {"files": {}, "exports": {"smallest": export, "safest": export}, "texts": texts}
    report = of_417_ops()
    jsonschema.validate(report, read_json(SCHEMA))
    assert len(render_page(report, links).encode()) < 8e6


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_body_never_scrolls_sideways_and_every_chart_can_be_reached(opened, width):
    report = renamed(
        report_of(measured(), Target(max_divergence=1)), "lm_head", "model." + "very_long_name." * 12 + "proj"
    )
    page = opened(report, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    hidden = "element => element.scrollWidth > element.clientWidth && getComputedStyle(element).overflowX !== 'auto'"
    assert not any(page.locator(".scroll, .tall, #ops-scroll").evaluate_all(f"elements => elements.map({hidden})"))


@pytest.mark.slow
def test_in_print_controls_are_hidden_and_pictures_fit_the_paper(opened):
    page = opened(report_of(measured(), Target(max_divergence=1)), 700)
    page.emulate_media(media="print")
    for hidden in (".controls", "#ops thead button", "p.screen", "nav", ".tools"):
        assert not page.locator(hidden).first.is_visible()
    widths = page.locator(".chart svg").evaluate_all(
        "charts => charts.map((chart) => chart.getBoundingClientRect().width)"
    )
    assert len(widths) == 5 and 0 < max(widths) <= 700
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
