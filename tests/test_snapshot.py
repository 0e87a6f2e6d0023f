"""A snapshot that cannot be measured is refused before it is loaded, by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from auto_quantize_model.files import InputError
from auto_quantize_model.snapshot import build_manifest, check_snapshot, load_model, verify_manifest


@pytest.fixture
def snapshot(tiny_snapshot: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_snapshot, tmp_path / "snapshot"))


def edit_config(snapshot: Path, **changes: object) -> None:
    path = snapshot / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_directory(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such snapshot directory"):
        check_snapshot(tmp_path / "nowhere")


def test_missing_config(snapshot):
    (snapshot / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        check_snapshot(snapshot)


def test_remote_code(snapshot):
    edit_config(snapshot, auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(InputError, match="trust_remote_code"):
        check_snapshot(snapshot)


def test_unsupported_architecture(snapshot):
    edit_config(snapshot, architectures=["BertModel"])
    with pytest.raises(InputError, match="BertModel is not supported; supported: Qwen2_5_VL"):
        check_snapshot(snapshot)


def test_missing_weights(snapshot):
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        check_snapshot(snapshot)


def test_missing_shard(snapshot):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names model-00001-of-00002\.safetensors, not there"):
        check_snapshot(snapshot)


def test_pickle_weights(snapshot):
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickle files \(pytorch_model\.bin\)"):
        check_snapshot(snapshot)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(snapshot, keep):
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: (not a safetensors file|.*truncated)"):
        check_snapshot(snapshot)


def test_weights_that_do_not_fill_the_model(snapshot):
    config = json.loads((snapshot / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"].pop("layer_types", None)
    edit_config(snapshot, text_config=config["text_config"])
    with pytest.raises(InputError, match="missing keys"):
        load_model(snapshot)


def test_model_is_loaded_in_fp32_and_eval_mode(snapshot):
    model = load_model(snapshot)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_manifest_is_verified_file_by_file(snapshot):
    manifest = build_manifest(snapshot, "tiny", "local", {})
    assert verify_manifest(manifest) == snapshot
    (snapshot / "config.json").write_text((snapshot / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json: differs from the sha256"):
        verify_manifest(manifest)


def test_digest_does_not_depend_on_the_place(snapshot, tmp_path):
    elsewhere = Path(shutil.copytree(snapshot, tmp_path / "elsewhere"))
    digests = {build_manifest(place, "tiny", "local", {})["digest"] for place in (snapshot, elsewhere)}
    assert len(digests) == 1
