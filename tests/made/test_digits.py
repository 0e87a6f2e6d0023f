"""The embedded default trains on digits of its own and is refused, whole, where it reads too badly."""

from pathlib import Path

import pytest

from auto_quantize_model.files import InputError
from auto_quantize_model.folders import require_own_folder
from auto_quantize_model.made import digits
from auto_quantize_model.made.digits import train_snapshot
from auto_quantize_model.models.snapshot import build_manifest

pytestmark = pytest.mark.slow


def test_one_epoch_makes_a_snapshot_with_its_split_in_the_record(tmp_path):
    details = train_snapshot(tmp_path / "reader", split_seed=0, seed=0, epochs=1, min_accuracy=0.0)
    # Whoever may read the folder may read the weights, and the folder may be trained again.
    modes = {path.stat().st_mode for path in (tmp_path / "reader").rglob("*") if path.is_file()}
    (tmp_path / "any").touch()
    assert modes == {(tmp_path / "any").stat().st_mode}
    require_own_folder(tmp_path / "reader", "")
    split = details["training"]["split"]
    assert not set(split["train"]) & set(split["calibration"] + split["heldout"])
    assert 0 < details["training"]["heldout_accuracy"] < 1
    names = {entry["name"] for entry in build_manifest(tmp_path / "reader", "reader", "digits", details)["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert "chat_template.jinja" in names


def test_a_reader_below_the_accuracy_asked_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_train", lambda *args: None)  # an untrained reader is below as well
    with pytest.raises(InputError, match=r"below model\.training\.min_accuracy 1\.0"):
        train_snapshot(tmp_path / "reader", split_seed=0, seed=0, epochs=1, min_accuracy=1.0)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_the_users_own_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("weeks of work")

    def began(epochs: range) -> list[int]:
        pytest.fail("training began")

    (tmp_path / "link").symlink_to("mine", target_is_directory=True)
    for name in ("mine", "link"):
        with pytest.raises(InputError, match=rf"{name}: .*set model\.source: local"):
            train_snapshot(tmp_path / name, split_seed=0, seed=0, epochs=1, min_accuracy=0.0, progress=began)
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "weeks of work"
    assert (tmp_path / "link").is_symlink()
