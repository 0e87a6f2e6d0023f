"""The shipped snapshot is the one that the repository lists and reads digits; training it again is compared with it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from auto_quantize_model.commands import train_digits
from auto_quantize_model.data.digits import shipped_training
from auto_quantize_model.files import InputError
from auto_quantize_model.folders import atomic_folder, require_unchanged
from auto_quantize_model.made import digits
from auto_quantize_model.models.snapshot import build_manifest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "resources" / "models" / "digits_vlm"


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A copy of the shipped snapshot."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "digits_vlm"))


def test_the_shipped_snapshot_reads_digits_that_its_training_left_aside() -> None:
    record = shipped_training(SHIPPED)
    split = record["split"]
    assert not set(split["train"]) & set(split["calibration"] + split["heldout"])
    assert record["heldout_accuracy"] >= 0.95
    assert digits.heldout_accuracy(SHIPPED, record["split_seed"]) >= 0.95
    names = {file.name for file in build_manifest(SHIPPED, "digits_vlm", "digits", {"training": record}).files}
    assert names == {path.name for path in SHIPPED.iterdir() if not path.name.startswith(".")}


def test_a_shipped_snapshot_of_other_files_is_refused_by_name(shipped: Path) -> None:
    advice = "restore the shipped files .* or set model.source: local"
    with (shipped / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=rf"config\.json: differs from the sha256 in .*; {advice}"):
        shipped_training(shipped)
    shutil.copy(SHIPPED / "config.json", shipped)
    (shipped / "mine.json").touch()
    with pytest.raises(InputError, match=rf"mine\.json: .* does not list this file; {advice}"):
        shipped_training(shipped)
    (shipped / "mine.json").unlink()
    (shipped / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"model\.safetensors: missing, .*; {advice}"):
        shipped_training(shipped)
    (shipped / ".auto-quantize-model.json").unlink()
    with pytest.raises(InputError, match=rf"digits_vlm: the folder has no list of its files .*; {advice}"):
        shipped_training(shipped)
    with pytest.raises(InputError, match=rf"nowhere: no such folder; {advice}"):
        shipped_training(shipped / "nowhere")


def test_training_changes_the_weights_alone_and_records_how(
    tiny_snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"train": list(range(64)), "calibration": [], "heldout": list(range(64, 80))}
    monkeypatch.setattr(digits, "digits_split", lambda seed: few)
    monkeypatch.setattr(digits, "VARIANTS", 1)
    record = digits.train_snapshot(tmp_path / "trained", split_seed=3, seed=0, epochs=1)
    assert json.loads((tmp_path / "trained" / ".training.json").read_text()) == record
    assert (record["split_seed"], record["seed"], record["epochs"]) == (3, 0, 1)
    assert 0 <= record["heldout_accuracy"] < 1
    digits.build_snapshot(tmp_path / "untrained", seed=0)
    assert digits.differing_files(tmp_path / "trained", SHIPPED) == []
    differing = digits.differing_tensors(tmp_path / "trained", tmp_path / "untrained")
    assert "lm_head.weight" in differing and all(0 < value < 1 for value in differing.values())
    assert list(differing.values()) == sorted(differing.values(), reverse=True)
    assert digits.differing_files(tmp_path / "trained", tiny_snapshot) == ["config.json"]
    assert math.inf in digits.differing_tensors(tmp_path / "trained", tiny_snapshot).values()
    assert digits.differing_tensors(tiny_snapshot, tiny_snapshot) == {}


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training copies the shipped snapshot."""
    monkeypatch.setattr(digits, "train_snapshot", copied)
    monkeypatch.setattr(digits, "heldout_accuracy", lambda directory, split_seed: 0.99)


def copied(directory: Path, **options: Any) -> dict[str, Any]:
    """Stands for the training: the shipped snapshot with another tokenizer where the seed is 1."""
    shutil.copytree(SHIPPED, directory, ignore=shutil.ignore_patterns(".auto*"))
    if options["seed"] == 1:
        (directory / "tokenizer.json").write_text("{}")
    return json.loads((SHIPPED / ".training.json").read_text())


@pytest.mark.usefixtures("without_training")
def test_the_same_snapshot_again_ends_with_0_and_says_so(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_digits.main(["--shipped", str(shipped)]) == 0
    said = capsys.readouterr().out
    assert "weights: the same bits" in said and "trained 99.0%, shipped 99.0%" in said


@pytest.mark.usefixtures("without_training")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "1"], "tokenizer.json differ from the files of the new snapshot; install the locked packages"),
        (["--min-accuracy", "0.999"], "held-out accuracy 0.990 is below --min-accuracy 0.999; raise --epochs"),
        (["--min-accuracy", "95"], "--min-accuracy 95.0: write a share from 0 to 1"),
        (["--epochs", "0"], "--epochs 0: write a number of at least 1"),
    ],
)
def test_a_worse_model_other_files_and_wrong_options_end_with_2(
    shipped: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert train_digits.main(["--shipped", str(shipped), *arguments]) == 2
    assert said in capsys.readouterr().err
    require_unchanged(shipped, "")


@pytest.mark.usefixtures("without_training")
def test_a_new_snapshot_is_written_where_the_shipped_one_lies_and_nowhere_else(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_digits.main(["--shipped", str(shipped), "--seed", "1", "--write"]) == 0
    assert (shipped / "tokenizer.json").read_text() == "{}"
    require_unchanged(shipped, "")
    with atomic_folder(shipped.with_name("other")) as folder:
        (folder / "config.json").write_text("weeks of work")
    monkeypatch.setattr(digits, "train_snapshot", lambda *args, **options: pytest.fail("training began"))
    assert train_digits.main(["--shipped", str(shipped.with_name("other")), "--write"]) == 2
    assert "training.json: no such file" in capsys.readouterr().err
