"""Every picture is drawn from any report, says why where nothing was measured, and takes op names as plain data."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from build import a_frontier, a_point, two_units, with_estimates
from test_document import NAMES, UNMEASURED, by_inc, of_three_schemes, parts, record

from auto_quantize_model.commands import draw_figures
from auto_quantize_model.config import Target
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError
from auto_quantize_model.models.units import tower_of
from auto_quantize_model.report.document import build_report
from auto_quantize_model.report.figures import figures, frontier_points, of_all, save, strips

HOSTILE = 'layers.0.<script>alert(1)</script>\'"\\datum["x"].{{7*7}}&amp;'
VISION = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LANGUAGE = (*(f"self_attn.{one}_proj" for one in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OPS_417 = [
    *(f"model.visual.blocks.{block}.{op}" for block in range(32) for op in VISION),
    *(f"model.language_model.layers.{block}.{op}" for block in range(36) for op in LANGUAGE),
    *("model.visual.patch_embed.proj", "model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    *("model.language_model.embed_tokens", "lm_head"),
]
FOUR = ["heat_map", "ranked_ops", "frontier", "modalities"]
SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {}  # SVG by specification


def choice(quantized, divergence, **changes):
    """A choice with the first so many of the four ops in W8A8."""
    schemes = ["W8A8"] * quantized + ["unquantized"] * (4 - quantized)
    return a_point(
        schemes,
        divergence,
        **{"accuracy": 0.8 if quantized == 4 else 0.9, "answers_lost": int(quantized == 4), **changes},
    )


def measured(points=None, controls=None, **changes):
    """The frontier of the four ops of `parts`. Ten answers are asked; the unquantized model has nine right."""
    points = points or [choice(*pair) for pair in ((4, 0.08), (3, 0.01), (2, 0.008), (1, 0.004), (0, 0.0))]
    controls = controls or [
        choice(4, 0.08, kind="uniform", name="W8A8"),
        a_point(["unquantized", *["W8A8"] * 3], 0.03, accuracy=0.9, answers_lost=0, kind="random", name="random_0"),
        a_point(
            ["unquantized", "W8A8", "W8A8", "unquantized"],
            0.006,
            accuracy=0.9,
            answers_lost=0,
            kind="edges",
            name="edges",
        ),
    ]
    return a_frontier(NAMES, points, controls, **{"answers": 10, **changes})


def report_of(frontier=UNMEASURED, target=None, **changes):
    """A report with a frontier and its profiles; `changes` are those of `parts`."""
    return build_report(*parts(frontier=frontier, target=target, **changes))


def renamed(report, old, new):
    """The report with one op called otherwise, wherever it stands."""
    return json.loads(json.dumps(report).replace(json.dumps(old), json.dumps(new)))


def from_inc():
    """A report of which INC measured all: it gives no metric but its own."""
    return report_of(scores=by_inc())


def without_images():
    """A report of a language model alone."""
    report = renamed(report_of(), "visual.proj", "model.layers.0.self_attn.q_proj")
    for batch in report["batches"]:
        batch["image_tokens"] = 0
    for row in report["maps"]["isolated"]["ops"]:
        row["image_relative_error"] = None
    return report


def without_error():
    """A report in which one op adds no error, and one never ran."""
    no_error = {"layers.0.mlp": [record(0.0), record(0.0)]}
    maps = ("isolated", "fallback", "requantize")
    return report_of(scores=dict.fromkeys(maps, no_error), executions={"layers.1.mlp": (0, 0)})


def no_error_at_all():
    report = report_of()
    for row in report["maps"]["isolated"]["ops"]:
        row |= {key: 0.0 for key in row if key.endswith(("error", "mse_value", "divergence", "std"))} | {
            "sqnr_db": None
        }
    return report


def svg(figure, directory):
    """A picture's SVG. Many reports differ in one picture alone, so a specification is drawn once."""
    spec = json.dumps(figure.spec)
    if spec not in DRAWN:
        save(figure, directory / "picture.svg")
        DRAWN[spec] = ElementTree.parse(directory / "picture.svg").getroot()
    return DRAWN[spec]


def drawn(figure, directory):
    """The texts of a picture's SVG."""
    return [" ".join(text.itertext()) for text in svg(figure, directory).iter(f"{SVG}text")]


def without_data(spec):
    """A specification without what it draws."""
    if isinstance(spec, list):
        return [without_data(part) for part in spec]
    if isinstance(spec, dict):
        return {key: without_data(part) for key, part in spec.items() if key not in ("data", "datasets")}
    return spec


CASES = {
    "no frontier": (report_of, {"frontier": "decide.heldout_batches is 0", "ranked_ops": "lm_head"}),
    "a frontier": (lambda: report_of(measured()), {"frontier": "random choice"}),
    "profiles": (
        lambda: report_of(measured(), Target(max_divergence=0.02, max_bits=15)),
        {"frontier": "smallest, balanced"},
    ),
    "a frontier without controls": (lambda: report_of(measured(controls=[choice(4, 0.08)])), {"frontier": "best for"}),
    "no loss at all": (
        lambda: report_of(measured([choice(4, 0.0), choice(0, 0.0)], [choice(4, 0.0, kind="uniform", name="W8A8")])),
        {"frontier": "No choice loses anything"},
    ),
    "no isolated map": (
        lambda: report_of(plan={"maps": ("fallback",)}),
        dict.fromkeys(("heat_map", "ranked_ops", "modalities", "strips"), "The isolated map was not measured"),
    ),
    "measured by INC": (from_inc, {"modalities": "were not measured", "heat_map": "layers", "ranked_ops": "lm_head"}),
    "text alone": (without_images, {"modalities": "No batch has image tokens", "heat_map": "lm_head"}),
    "an op without error": (without_error, {"heat_map": "–", "ranked_ops": "All 3 ops"}),
    "no error at all": (
        no_error_at_all,
        {"ranked_ops": "every mse_value is 0", "heat_map": "–", "strips": "No op has a KL divergence"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_picture_is_drawn_and_says_what_was_not_measured(case, tmp_path):
    report, said = CASES[case]
    pictures = figures(report())
    assert list(pictures) == FOUR
    pictures["strips"] = strips(report())
    for name, picture in pictures.items():
        seen = " ".join(drawn(picture, tmp_path))
        assert "tiny" in seen
        assert said.get(name, "") in seen


def test_the_heat_map_has_a_panel_for_repeated_blocks_and_one_for_the_other_ops(tmp_path):
    texts = drawn(figures(report_of())["heat_map"], tmp_path)
    assert {"Language: layers", "Outside the repeated blocks", "mlp", "visual.proj", "lm_head"} <= set(texts)
    assert "22.2" in texts  # lm_head: 12 of 2000


def test_the_frontier_is_drawn_with_intervals_and_without_the_choice_that_loses_nothing():
    report = report_of(measured())
    values = frontier_points(report)
    assert [value["curve"] for value in values].count("best for its bytes") == 4
    first = next(value for value in values if value["curve"] == "best for its bytes")
    assert (first["bits"], first["kl"], first["low"], first["high"]) == (8.0, 0.08, 0.04, 0.16)
    assert (first["units"], first["top1"], first["accuracy"], first["sqnr"]) == (
        "4 W8A8",
        "90.00 %",
        "80.00 %",
        "30.00 dB",
    )
    assert min(value["kl"] for value in values) > 0
    assert "10 tokens" not in figures(report)["frontier"].caption and "48 tokens" in figures(report)["frontier"].caption


def test_a_bar_that_would_reach_zero_ends_a_decade_below_its_point():
    found = measured([choice(4, 0.08, divergence_low=0.0), choice(0, 0.0)])
    assert frontier_points(report_of(found))[-1]["low"] == pytest.approx(0.008)


def test_profiles_of_one_choice_share_one_label(tmp_path):
    texts = drawn(figures(report_of(measured(), Target(max_divergence=0.02)))["frontier"], tmp_path)
    assert "smallest, balanced" in texts and "smallest" not in texts


def test_strips_have_a_panel_for_each_scheme_and_a_row_for_each_projection(tmp_path):
    picture = strips(of_three_schemes(with_estimates))
    texts = drawn(picture, tmp_path)
    panels = [text for text in texts if text in ("inc_int8", "W8A8", "NVFP4")]
    assert panels == ["inc_int8", "W8A8", "NVFP4"] and "≈ 1 ± 0.2 nats" in json.dumps(picture.spec, ensure_ascii=False)
    assert "mlp" in drawn(strips(report_of()), tmp_path)  # one row for both blocks


def test_only_the_ten_most_sensitive_of_many_ops_are_labelled_and_all_are_in_the_data(tmp_path):
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(417)]
    report = report_of()
    (row,) = (row for row in report["maps"]["isolated"]["ops"] if row["op_name"] == "lm_head")
    rows = [row | {"op_name": name, "mse_value": 500.0 - i, "rank": i + 1} for i, name in enumerate(names)]
    report["maps"]["isolated"]["ops"] = rows
    report["ops"] = [report["ops"][0] | {"op_name": name} for name in names]
    picture = figures(report)["ranked_ops"]
    assert [text for text in drawn(picture, tmp_path) if text in names] == names[:10]
    spec = json.dumps(picture.spec)
    assert all(json.dumps(name) in spec for name in names)


def test_both_panels_of_the_ranking_have_the_colours_of_all_towers():
    report = report_of()
    row = report["maps"]["isolated"]["ops"][0]
    names = [*(f"visual.blocks.{index}.proj" for index in range(10)), "lm_head"]
    rows = [row | {"op_name": name, "mse_value": 20.0 - i, "rank": i + 1} for i, name in enumerate(names)]
    report["maps"]["isolated"]["ops"] = rows
    report["ops"] = [report["ops"][0] | {"op_name": name, "tower": tower_of(name)} for name in names]
    spec = json.dumps(figures(report)["ranked_ops"].spec)
    assert '"domain": ["vision", "language"]' in spec and '"domain": ["vision"]' not in spec


def test_no_label_lies_on_another_at_417_ops(tmp_path):
    report = report_of(measured(), Target(max_divergence=0.02, max_bits=15))
    row = report["maps"]["isolated"]["ops"][0]
    rows = [row | {"op_name": name, "mse_value": 500.0 - i, "rank": i + 1} for i, name in enumerate(OPS_417)]
    report["maps"]["isolated"]["ops"] = rows
    report["ops"] = [report["ops"][0] | {"op_name": name} for name in OPS_417]
    assert len(OPS_417) == 417
    for name, picture in (figures(report) | {"strips": strips(report)}).items():
        boxes = label_boxes(svg(picture, tmp_path))
        assert len(boxes) > 5
        clashes = [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if overlap(a[1], b[1])]
        assert not clashes, (name, clashes[:5])


def label_boxes(node, x=0.0, y=0.0):
    """The labels below a node of an SVG with their boxes (left, top, right, bottom), by an average letter's width."""
    found = re.match(r"translate\(([-\d.]+),([-\d.]+)\)", node.get("transform", ""))
    x, y = (x + float(found[1]), y + float(found[2])) if found else (x, y)
    boxes = [box for child in node for box in label_boxes(child, x, y)]
    words = " ".join(node.itertext()).strip()
    if node.tag.endswith("text") and words and "rotate" not in node.get("transform", ""):
        size = float(node.get("font-size", "11").removesuffix("px"))
        width = 0.5 * size * len(words)
        left = x - width * {"end": 1, "middle": 0.5}.get(node.get("text-anchor"), 0)
        boxes.append((words, (left, y - 0.7 * size, left + width, y)))
    return boxes


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_a_stand_in_says_so_in_every_picture(tmp_path):
    report = report_of(stand_in="weights from seed 0")
    for picture in figures(report).values():
        assert "STAND-IN" in " ".join(drawn(picture, tmp_path))


@pytest.fixture(scope="module")
def twice():
    """The pictures of a report, made twice."""
    return {copy_name: figures(report_of(measured())) for copy_name in ("a", "b")}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("name", FOUR)
def test_a_picture_is_the_same_bytes_each_time(twice, name, suffix, tmp_path):
    for copy_name, pictures in twice.items():
        save(pictures[name], tmp_path / f"{copy_name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_a_name_full_of_markup_and_quotes_is_drawn_as_it_is(tmp_path):
    pictures = figures(renamed(report_of(measured()), "lm_head", HOSTILE))
    assert HOSTILE in drawn(pictures["ranked_ops"], tmp_path)
    assert HOSTILE.removeprefix("layers.0.") in drawn(pictures["heat_map"], tmp_path)
    hostile = renamed(renamed(of_three_schemes(frontier=two_units()), "W8A8", HOSTILE), "a", HOSTILE)
    pictures |= {"own scheme": figures(hostile)["frontier"], "strips": strips(hostile)}
    for picture in pictures.values():
        assert "alert" not in json.dumps(without_data(picture.spec))  # no expression and no field holds a name
        assert not list(svg(picture, tmp_path).iter(f"{SVG}script"))


def test_a_control_character_in_a_name_leaves_the_picture_readable(tmp_path):
    report = renamed(report_of(measured()), "lm_head", "lm\x1b[2J\u202ehead")
    report["model"]["model"] = "tiny\x00"
    pictures = figures(report)
    assert "lm\\x1b[2J\\u202ehead" in drawn(pictures["ranked_ops"], tmp_path)
    assert "tiny\\x00" in drawn(pictures["frontier"], tmp_path)


def test_a_failed_drawing_and_another_suffix_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="as .svg or .png"):
        save(figures(report_of())["heat_map"], tmp_path / "map.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_not_drawn_where_a_folder_lies(tmp_path):
    write_document(tmp_path / "report.json", "report", report_of())
    (tmp_path / "frontier.png").mkdir()
    arguments = ["--report", str(tmp_path / "report.json"), "--directory", str(tmp_path)]
    with pytest.raises(InputError, match=r"frontier\.png: a folder, where a file is to be written; name a file"):
        draw_figures.draw_figures(draw_figures.parser().parse_args(arguments))
    assert not list(tmp_path.glob("*.svg"))


def test_a_panel_of_all_ops_says_how_many_were_measured():
    assert [of_all(*counts) for counts in ((1, 1), (53, 53), (211, 29))] == [
        "The only op",
        "All 53 ops",
        "The 29 measured of 211 ops",
    ]
