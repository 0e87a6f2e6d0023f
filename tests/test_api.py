"""The public functions on a model and batches in memory, and the names that the package hands out."""

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from build import ACTIVATION, COVERAGE, a_capture, a_plan, an_op
from transformers import AutoModelForImageTextToText

import auto_quantize_model as aq
from auto_quantize_model import api
from auto_quantize_model.config import Config
from auto_quantize_model.decide.ranking import most_sensitive_first
from auto_quantize_model.made.digits import LIMITS, digit_samples
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.replay.model import Batch

ROOT = Path(__file__).parents[1]
FAST = ACTIVATION | {"name": "MinMaxObserver"}
PLAN = a_plan(
    [an_op(name, shape=(8, 8), weight_bytes=256, executions=(1, 1), activation=FAST) for name in ("body", "head")],
    coverage=COVERAGE | {"weights_total": 200, "weights_planned": 128},
)


class Small(torch.nn.Module):
    """Two planned ops behind an embedding that stays in FP32; `sign` is Python state that no digest of weights sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 8)
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 8)
        self.sign = 1.0

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.sign * self.body(self.embed(input_ids)).relu()))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def ids(*rows: int) -> Batch:
    return {"input_ids": torch.tensor([[row, row + 1, row + 2] for row in rows])}


BATCHES = [ids(0, 1), ids(2, 3)]
HELDOUT = [ids(4, 5)]


@pytest.mark.slow
def test_the_lines_of_the_documentation_do_it_all(
    tiny_snapshot: Path, batches: list[Batch], processor: Any, tmp_path: Path
) -> None:
    """On a model as transformers loads it: with gradients, and with the patch embedding that FX cannot convert."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_snapshot, dtype=torch.float32).eval()
    kinds = [type(module) for module in model.modules()]
    heldout = [collate([encode(sample, processor, LIMITS)]) for sample in digit_samples([2])]
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/notebook.md").read_text(), re.S)
    names: dict[str, Any] = {"model": model, "loader": iter(batches), "heldout": heldout}
    exec(block, names)
    plan, capture = names["plan"], names["capture"]
    assert plan.inc_check["status"] == "reproduces_fp32"
    assert [type(module) for module in model.modules()] == kinds
    loaded = load_model(tiny_snapshot)
    by_batch, _ = capture_sensitivity(loaded, batches, plan, ScoreStore(tmp_path))
    for label in ("isolated", "all"):
        assert by_batch.of_map(label) == capture.of_map(label)
    assert list(names["ranking"].op_name) == most_sensitive_first(plan, capture)
    assert names["ranking"].index[0] == 1 and names["ranking"].mse_value.is_monotonic_decreasing
    best = names["best"]
    assert best.point.divergence <= 0.01 and set(names["assignment"].values()) <= {"NVFP4", "FP8_DYNAMIC"}
    assert set(names["assignment"]) == set(plan.op_names) - set(best.kept)


def test_a_stored_plan_is_measured_where_inc_is_not_installed(
    model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    with pytest.raises(
        aq.InputError, match=r"neural_compressor is not installed; run pip install auto-quantize-model\[inc\]"
    ):
        aq.plan(model, BATCHES)
    aq.save(PLAN, tmp_path / "plan.json")
    plan = aq.load(tmp_path / "plan.json")
    capture = aq.capture(model, BATCHES, plan)
    aq.save(capture, tmp_path / "capture.json")
    assert plan == PLAN and aq.load(tmp_path / "capture.json") == capture
    table = aq.ranking(plan, capture)
    assert list(table.index) == [1, 2] and list(table.op_name) == most_sensitive_first(plan, capture)
    frontier = aq.frontier(model, BATCHES, HELDOUT, plan, capture, answers=[[range(1, 3), None]])
    assert frontier.answers == 1 and frontier.candidates == ("inc_int8",)
    best = aq.profiles(frontier, plan, max_divergence=100).profiles["smallest"]
    assert best.assignment.keys() | set(best.kept) == set(plan.op_names)
    with pytest.raises(aq.InputError, match=r"^capture: measured by another plan"):
        aq.ranking(replace(plan, measured_op="body"), capture)


def test_a_store_keeps_scores_and_gives_those_of_no_other_model(model: Small, tmp_path: Path) -> None:
    plan = replace(PLAN, confidence_batches=1)
    first = aq.capture(model, BATCHES, plan, store=tmp_path)
    shelves = set(tmp_path.iterdir())
    assert aq.capture(model, BATCHES, plan, store=tmp_path) == first and set(tmp_path.iterdir()) == shelves
    model.sign = -1.0
    changed = [aq.capture(model, BATCHES, plan, store=tmp_path)]
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    changed.append(aq.capture(model, BATCHES, plan, store=tmp_path))
    assert len(set(tmp_path.iterdir())) == 3 * len(shelves)
    assert all(capture.scores != first.scores for capture in changed)
    assert changed[-1] == aq.capture(model, BATCHES, plan)


def half(model: Small) -> Small:
    model.head.half()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: "digits", r"^model: a str; give a torch\.nn\.Module"),
        (lambda model: model.train(), r"^model: the model is in train mode; call model\.eval\(\)"),
        (half, r"^model: head\.weight is torch\.float16; .* model\.float\(\)"),
        (lambda model: model.to("meta"), r"^model: on meta, where INC's arithmetic cannot be repeated"),
        (lambda model: torch.nn.ReLU().eval(), r"^model: its parameters are on 0 devices"),
        (lambda model: torch.nn.Sequential(model).eval(), r"^plan: the model has no module body; make a plan"),
    ],
)
def test_a_model_that_cannot_be_measured_is_named(model: Small, change: Any, message: str) -> None:
    with pytest.raises(aq.InputError, match=message):
        aq.capture(change(model), BATCHES, PLAN)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter(BATCHES), r"^batches: a list_iterator, which may give other batches each time; give a list"),
        ([], r"^batches: an empty list"),
        ([BATCHES[0]["input_ids"]], r"^batches\[0\]: a Tensor; give a dict"),
        ([BATCHES[0], {"input_ids": [[1]]}], r"^batches\[1\]\['input_ids'\]: a list; give a tensor"),
        ([BATCHES[0], {"x": torch.ones(2)}], r"^batches\[1\]: no input_ids of shape \(samples, tokens\)"),
        ([{"input_ids": torch.ones(1, 2, device="meta")}], r"^batches\[0\]\['input_ids'\]: on meta, .* on cpu"),
        (BATCHES[:1], r"^the plan asks for 2 batches"),
    ],
)
def test_a_batch_that_cannot_be_measured_is_named(model: Small, batches: Any, message: str) -> None:
    with pytest.raises(aq.InputError, match=message):
        aq.capture(model, batches, PLAN)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"confidence_batches": 3}, r"^batches: 2, and confidence_batches is 3; give more batches$"),
        ({"confidence_batches": 0}, r"^sensitivity\.confidence_batches: 0"),
        ({"maps": ["isolated", "all"]}, r"^sensitivity\.maps.*all"),
    ],
)
def test_a_plan_that_nothing_can_follow_is_refused(model: Small, asked: Any, message: str) -> None:
    with pytest.raises(aq.InputError, match=message):
        aq.plan(model, BATCHES, **asked)


@pytest.mark.slow
def test_a_model_of_ones_own_is_planned_and_inc_measures_the_same_bits(model: Small) -> None:
    plan = aq.plan(model, BATCHES, op_type_dict={"Embedding": "fp32"}, engine="inc")
    assert plan.op_names == ["body", "head"] and plan.inc_check["status"] == "reproduces_fp32"
    by_inc, replayed = (aq.capture(model, BATCHES, replace(plan, engine=engine)) for engine in ("inc", "replay"))
    assert [score.mse_value for score in by_inc.scores] == [score.mse_value for score in replayed.scores]
    model.forward = lambda input_ids: torch.zeros(1)
    with pytest.raises(aq.InputError, match=r"^model: returns a Tensor; return an object with the tensor logits$"):
        aq.plan(model, BATCHES)


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_measured_there(model: Small) -> None:
    capture = aq.capture(model.cuda(), [{"input_ids": batch["input_ids"].cuda()} for batch in BATCHES], PLAN)
    assert capture.arithmetic.device == "cuda" and not capture.tf32
    with pytest.raises(aq.InputError, match=r"^batches\[0\]\['input_ids'\]: on cpu, and the model is on cuda:0"):
        aq.capture(model, BATCHES, PLAN)


@pytest.mark.parametrize(
    ("heldout", "asked", "message"),
    [
        ([], {}, r"^heldout: an empty list"),
        ([ids(6), BATCHES[1]], {}, r"^heldout\[1\]: the same as batches\[1\]"),
        (HELDOUT, {"points": 1}, r"^decide\.points: 1"),
        (HELDOUT, {"candidates": ["NVFP4"]}, r"^candidates: NVFP4 is not in the plan; its schemes are inc_int8"),
        (HELDOUT, {"refine_batches": 9}, r"^refine_batches \(9\) is more than the 2 batches"),
        (
            HELDOUT,
            {"refine_batches": 1},
            r"^refine_batches: no choice of inc_int8 can be refined; set refine_batches to 0",
        ),
        (HELDOUT, {"answers": []}, r"^answers: 0 entries for 1 held-out batches"),
        (HELDOUT, {"answers": [[None]]}, r"^answers\[0\]: 1 entries for 2 samples"),
        (HELDOUT, {"answers": [[None, range(0, 1)]]}, r"^answers\[0\]: range\(0, 1\); name positions from 1 to 2"),
        (HELDOUT, {"answers": [[None, range(1, 4)]]}, r"^answers\[0\]: range\(1, 4\)"),
    ],
)
def test_held_out_batches_that_prove_nothing_are_refused(model: Small, heldout: Any, asked: Any, message: str) -> None:
    with pytest.raises(aq.InputError, match=message):
        aq.frontier(model, BATCHES, heldout, PLAN, a_capture(PLAN, {}, []), **asked)


def test_torchs_switches_are_as_before_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_all(name: str) -> None:
        torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True)

    monkeypatch.setattr(api, "choose_device", set_all)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(aq.InputError), api._exact(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32 and not torch.is_grad_enabled()
        raise aq.InputError
    assert torch.backends.cudnn.allow_tf32 and not torch.are_deterministic_algorithms_enabled()


def test_defaults_are_those_of_the_config() -> None:
    config = Config()
    for function, block in ((aq.plan, config.sensitivity), (aq.frontier, config.decide)):
        for name, parameter in inspect.signature(function).parameters.items():
            # A notebook measures one map in one scheme unless it asks for more.
            if name in type(block).model_fields and name not in ("maps", "schemes"):
                value = getattr(block, name)
                assert parameter.default in (value, value or None), name


def test_the_package_hands_out_each_name_and_no_module_hides_one() -> None:
    assert all(callable(getattr(aq, name)) for name in aq.__all__)
    assert set(aq.__all__) <= set(dir(aq))
    # An imported module becomes an attribute of the package, under its own name.
    assert not {path.stem for path in Path(aq.__file__).parent.iterdir()} & set(aq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aq.nothing  # noqa: B018
