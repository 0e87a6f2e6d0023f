"""Every picture is drawn from any report, says why where nothing was measured, and takes op names as plain data."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from build import a_point, a_tradeoff
from test_document import NAMES, UNMEASURED, by_inc, parts, record

from auto_quantize_model.commands import draw_figures
from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError
from auto_quantize_model.measure.heldout import keep_sizes
from auto_quantize_model.report.document import build_report
from auto_quantize_model.report.figures import figures, of_all, save

HOSTILE = 'layers.0.<script>alert(1)</script>\'"\\datum["x"].{{7*7}}&amp;'
VISION = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LANGUAGE = (*(f"self_attn.{one}_proj" for one in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
AVERAGED = ("weight_bytes", "sqnr_db", "kl_divergence", "top1_agreement", "accuracy")
FOUR = ["heat_map", "ranked_ops", "tradeoff", "modalities"]
SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {}  # SVG by specification


def point(keep, sqnr_db, added=()):
    """A keep-list of the trade-off."""
    return a_point(keep, sqnr_db, added, weight_bytes=1000 * (keep + 1), accuracy=0.9 if keep else 0.8)


def tradeoff(curve=None, **changes):
    """A measured trade-off, of four ops where no curve is given; with all of them kept there is no error."""
    order = NAMES[::-1]
    curve = curve or [point(0, 20.0), point(1, 25.0, order[:1]), point(2, 31.0, order[1:2]), point(4, None, order[2:])]
    chance = [{"keep": step.keep} | {key: getattr(step, key) for key in AVERAGED} for step in curve]
    for step in chance:
        step |= {f"{key}_std": 1.0 for key in AVERAGED}
        step["sqnr_db_std"] = None if step["sqnr_db"] is None else 1.0
    orders = ("ranking", "inverse", "weight_bytes", *(f"random_{seed}" for seed in range(5)))
    gains = {"random": 1.5, "inverse": 2.5, "weight_bytes": -0.5}
    losses = {"random": [], "inverse": [], "weight_bytes": [1, 2]}
    found = {"random": chance, "gains_db": gains, "losses": losses} | changes
    return a_tradeoff(found.pop("curves", dict.fromkeys(orders, curve)), curve[-1].keep, **found)


def with_greedy(found, curve):
    """A trade-off whose ranking was refined, with that curve."""
    return replace(found, curves=found.curves | {"greedy": curve})


def report_of(measured=UNMEASURED, target=None, **changes):
    """A report with a trade-off and its profiles; `changes` are those of `parts`."""
    return build_report(*parts(tradeoff=measured, profiles=build_profiles(measured, target or Target()), **changes))


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
    "unmeasured trade-off": (report_of, {"tradeoff": "tradeoff.heldout_batches is 0", "ranked_ops": "lm_head"}),
    "measured trade-off": (lambda: report_of(tradeoff()), {"tradeoff": "largest weights first"}),
    "greedy as well": (
        lambda: report_of(with_greedy(tradeoff(), tradeoff().curves["ranking"][:2])),
        {"tradeoff": "greedy"},
    ),
    "recommended": (lambda: report_of(tradeoff(), Target(min_sqnr_db=30)), {"tradeoff": "recommended: 2"}),
    "target missed": (lambda: report_of(tradeoff(), Target(max_weight_bytes=1)), {"tradeoff": "ranking"}),
    "no isolated map": (
        lambda: report_of(plan={"maps": ("fallback",)}),
        dict.fromkeys(("heat_map", "ranked_ops", "modalities"), "The isolated map was not measured"),
    ),
    "measured by INC": (from_inc, {"modalities": "were not measured", "heat_map": "layers", "ranked_ops": "lm_head"}),
    "text alone": (without_images, {"modalities": "No batch has image tokens", "heat_map": "lm_head"}),
    "an op without error": (without_error, {"heat_map": "–", "ranked_ops": "All 3 ops"}),
    "no error at all": (no_error_at_all, {"ranked_ops": "every mse_value is 0", "heat_map": "–"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_picture_is_drawn_and_says_what_was_not_measured(case, tmp_path):
    report, said = CASES[case]
    pictures = figures(report())
    assert list(pictures) == FOUR
    for name, picture in pictures.items():
        seen = " ".join(drawn(picture, tmp_path))
        assert "tiny" in seen
        assert said.get(name, "") in seen


def test_the_heat_map_has_a_panel_for_repeated_blocks_and_one_for_the_other_ops(tmp_path):
    texts = drawn(figures(report_of())["heat_map"], tmp_path)
    assert {"Language: layers", "Outside the repeated blocks", "mlp", "visual.proj", "lm_head"} <= set(texts)
    assert "22.2" in texts  # lm_head: 12 of 2000


def test_the_axis_of_kept_ops_starts_at_zero_and_the_state_without_error_is_not_drawn():
    spec = json.dumps(figures(report_of(tradeoff()))["tradeoff"].spec)
    assert '"type": "symlog"' in spec and '"domain": [0, 4]' in spec
    assert '"keep": 2' in spec and '"keep": 4' not in spec


def test_only_the_ten_most_sensitive_of_many_ops_are_labelled_and_all_are_in_the_data(tmp_path):
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(417)]
    report = report_of()
    (row,) = (row for row in report["maps"]["isolated"]["ops"] if row["op_name"] == "lm_head")
    rows = [row | {"op_name": name, "mse_value": 500.0 - i, "rank": i + 1} for i, name in enumerate(names)]
    report["maps"]["isolated"]["ops"] = rows
    picture = figures(report)["ranked_ops"]
    assert [text for text in drawn(picture, tmp_path) if text in names] == names[:10]
    spec = json.dumps(picture.spec)
    assert all(json.dumps(name) in spec for name in names)


def test_no_label_lies_on_another_at_417_ops(tmp_path):
    blocks = [
        *(f"model.visual.blocks.{block}.{op}" for block in range(32) for op in VISION),
        *(f"model.language_model.layers.{block}.{op}" for block in range(36) for op in LANGUAGE),
        *("model.visual.patch_embed.proj", "model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
        *("model.language_model.embed_tokens", "lm_head"),
    ]
    curve = [point(size, 20 + size / 20 if size < len(blocks) else None) for size in keep_sizes(len(blocks))]
    report = report_of(tradeoff(curve), Target(min_sqnr_db=30))
    row = report["maps"]["isolated"]["ops"][0]
    rows = [row | {"op_name": name, "mse_value": 500.0 - i, "rank": i + 1} for i, name in enumerate(blocks)]
    report["maps"]["isolated"]["ops"] = rows
    report["ops"] = [report["ops"][0] | {"op_name": name} for name in blocks]
    assert len(blocks) == 417
    for name, picture in figures(report).items():
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
    return {copy_name: figures(report_of(tradeoff())) for copy_name in ("a", "b")}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("name", FOUR)
def test_a_picture_is_the_same_bytes_each_time(twice, name, suffix, tmp_path):
    for copy_name, pictures in twice.items():
        save(pictures[name], tmp_path / f"{copy_name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_a_name_full_of_markup_and_quotes_is_drawn_as_it_is(tmp_path):
    pictures = figures(renamed(report_of(tradeoff()), "lm_head", HOSTILE))
    assert HOSTILE in drawn(pictures["ranked_ops"], tmp_path)
    assert HOSTILE.removeprefix("layers.0.") in drawn(pictures["heat_map"], tmp_path)
    for picture in pictures.values():
        assert "alert" not in json.dumps(without_data(picture.spec))  # no expression and no field holds a name
        assert not list(svg(picture, tmp_path).iter(f"{SVG}script"))


def test_a_control_character_in_a_name_leaves_the_picture_readable(tmp_path):
    report = renamed(report_of(tradeoff()), "lm_head", "lm\x1b[2J\u202ehead")
    report["model"]["model"] = "tiny\x00"
    pictures = figures(report)
    assert "lm\\x1b[2J\\u202ehead" in drawn(pictures["ranked_ops"], tmp_path)
    assert "tiny\\x00" in drawn(pictures["tradeoff"], tmp_path)


def test_a_failed_drawing_and_another_suffix_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="as .svg or .png"):
        save(figures(report_of())["heat_map"], tmp_path / "map.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_not_drawn_where_a_folder_lies(tmp_path):
    write_document(tmp_path / "report.json", "report", report_of())
    (tmp_path / "tradeoff.png").mkdir()
    arguments = ["--report", str(tmp_path / "report.json"), "--directory", str(tmp_path)]
    with pytest.raises(InputError, match=r"tradeoff\.png: a folder, where a file is to be written; name a file"):
        draw_figures.draw_figures(draw_figures.parser().parse_args(arguments))
    assert not list(tmp_path.glob("*.svg"))


def test_a_panel_of_all_ops_says_how_many_were_measured():
    assert [of_all(*counts) for counts in ((1, 1), (53, 53), (211, 29))] == [
        "The only op",
        "All 53 ops",
        "The 29 measured of 211 ops",
    ]
