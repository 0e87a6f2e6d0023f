"""A snapshot that cannot be measured is refused before it is loaded, by name."""

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import find_output_op
from auto_quantize_model.made.tiny_text import write_tiny_text
from auto_quantize_model.models.architecture import check_architecture
from auto_quantize_model.models.families.causal import UNFIT
from auto_quantize_model.models.snapshot import (
    build_manifest,
    check_snapshot,
    empty_model,
    load_model,
    load_processor,
    verify_manifest,
)
from auto_quantize_model.models.weights import read_headers, require_filled


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


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("tokenizer_config.json", None),
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
        ("generation_config.json", None),
        ("config.json", "vision_config"),
    ],
)
def test_remote_code_of_another_file_or_in_a_block(snapshot, name, block):
    path = snapshot / name
    document = json.loads(path.read_text()) if path.exists() else {}
    where = document.setdefault(block, {}) if block else document
    where["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"{name}: auto_map names code of the repository, .* is never run"):
        check_snapshot(snapshot)
    where["auto_map"] = None
    path.write_text(json.dumps(document))
    check_snapshot(snapshot)


def test_unsupported_architecture(snapshot):
    edit_config(snapshot, architectures=["WhisperForAudioClassification"])
    with pytest.raises(InputError, match="WhisperForAudioClassification is not supported; supported: the classes of"):
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


def test_digest_does_not_depend_on_the_place_nor_on_what_other_tools_hide_there(snapshot, tmp_path):
    elsewhere = Path(shutil.copytree(snapshot, tmp_path / "elsewhere"))
    (elsewhere / ".git").mkdir()
    (elsewhere / ".git" / "index").touch()
    digests = {build_manifest(place, "tiny", "local", {}).digest for place in (snapshot, elsewhere)}
    assert len(digests) == 1


def write_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, whose data stays as it is."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def edit_weights(snapshot: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    path = snapshot / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: first(header).update(shape=["a"]),
        lambda header: first(header).update(shape=[-1]),
        lambda header: first(header).update(shape=[1.0]),
        lambda header: first(header).update(shape=[True]),
        lambda header: first(header).update(shape="64"),
        lambda header: first(header).update(shape=[2**62, 2**62]),
        lambda header: first(header).update(shape=[1]),
        lambda header: first(header).update(dtype="F31"),
        lambda header: first(header).update(data_offsets=[0, 4]),
        lambda header: first(header).update(data_offsets=[4, 0]),
        lambda header: first(header).pop("data_offsets"),
        lambda header: header.pop(next(name for name in header if name != "__metadata__")),
        lambda header: header.update(other=first(header)),
        lambda header: "[]",
        lambda header: '{"a": 1}',
        lambda header: "[" * 100_000,
        lambda header: json.dumps(header)[:-1] + ', "__metadata__": {}, "__metadata__": {}}',
        lambda header: json.dumps(header)[:-1] + f', "lm_head.weight": {json.dumps(header["lm_head.weight"])}}}',
    ],
)
def test_a_header_that_is_not_what_its_format_says(snapshot, change):
    write_header(snapshot / "model.safetensors", change)
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file, or truncated"):
        check_snapshot(snapshot)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 3])
def test_a_header_of_absurd_length(snapshot, length):
    path = snapshot / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file, or truncated"):
        check_snapshot(snapshot)


def sharded(snapshot: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """The weights as two files under an index, whose weight_map is changed, or replaced by what comes back."""
    tensors = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"{'ab'[place % 2]}.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, snapshot / file)
    changed = change(weight_map)
    index = {"metadata": {}, "weight_map": weight_map if changed is None else changed}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_two_files_under_an_index_are_those_of_one(snapshot, tmp_path):
    whole = load_model(Path(shutil.copytree(snapshot, tmp_path / "whole"))).state_dict()
    sharded(snapshot, lambda weight_map: None)
    build_manifest(snapshot, "tiny", "local", {})
    assert all(torch.equal(weight, whole[name]) for name, weight in load_model(snapshot).state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [], "no weight_map from tensor names to file names"),
        (lambda names: {}, "no weight_map from tensor names to file names"),
        (lambda names: names.update({"lm_head.weight": 3}), "no weight_map from tensor names to file names"),
        (lambda names: names.update({"lm_head.weight": "../a.safetensors"}), "is not a .safetensors file of this"),
        (lambda names: names.update({"lm_head.weight": "/etc/a.safetensors"}), "is not a .safetensors file of this"),
        (lambda names: names.update({"lm_head.weight": "config.json"}), "is not a .safetensors file of this"),
        (lambda names: names.update({"lm_head.weight": "a\0.safetensors"}), "is not a .safetensors file of this"),
        (lambda names: names.update({"lm_head.weight": "c.safetensors"}), "names c.safetensors, not there"),
        (
            lambda names: names.update({"more.weight": "a.safetensors"}),
            "puts more.weight in a.safetensors, and .* none",
        ),
        (lambda names: names.pop("lm_head.weight") and None, "puts lm_head.weight in no file, and .* a.safetensors"),
        (lambda names: names.update({"lm_head.weight": "b.safetensors"}), "in b.safetensors, and .* a.safetensors"),
    ],
)
def test_an_index_that_does_not_describe_its_files(snapshot, change, message):
    sharded(snapshot, change)
    with pytest.raises(InputError, match=message):
        check_snapshot(snapshot)


def test_an_index_without_metadata_which_transformers_reads(snapshot):
    sharded(snapshot, lambda names: None)
    path = snapshot / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    with pytest.raises(InputError, match="no object under 'metadata'"):
        check_snapshot(snapshot)


def test_a_tensor_in_two_files(snapshot):
    sharded(snapshot, lambda names: None)
    tensors = load_file(snapshot / "a.safetensors") | {"other": torch.zeros(1)}
    save_file(tensors, snapshot / "b.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors and b\.safetensors both hold"):
        check_snapshot(snapshot)


def test_weights_in_one_file_and_under_an_index(snapshot):
    """transformers would take model.safetensors; another tool the index."""
    tensors = load_file(snapshot / "model.safetensors")
    save_file(tensors, snapshot / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        check_snapshot(snapshot)


def test_shards_of_a_distributed_checkpoint_which_transformers_would_load_instead(snapshot):
    name = "shard-00001-model-00001-of-00001.safetensors"
    shutil.copy(snapshot / "model.safetensors", snapshot / name)
    with pytest.raises(InputError, match="holds shards of a distributed checkpoint"):
        check_snapshot(snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "notes.txt"])
def test_what_is_no_file(snapshot, name):
    path = snapshot / name
    for make, said in (
        (lambda: os.mkfifo(path), "not a regular file"),
        (lambda: path.symlink_to(path.name), "cannot be read .Too many levels"),
        (lambda: path.symlink_to("nowhere"), "a link to nothing"),
    ):
        path.unlink(missing_ok=True)
        make()
        with pytest.raises(InputError, match=f"{name}: {said}"):
            check_snapshot(snapshot)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "architectures is None; give a list of one class"),
        ({"architectures": []}, r"architectures is \[\]"),
        ({"architectures": "Qwen2_5_VLForConditionalGeneration"}, "architectures is 'Qwen"),
        ({"architectures": ["Qwen2ForCausalLM", "LlamaForCausalLM"]}, "give a list of one class"),
        ({"architectures": [3]}, "give a list of one class"),
        ({"model_type": "unheard_of"}, "model_type 'unheard_of' is unknown to transformers"),
        ({"model_type": None}, "model_type None is unknown"),
        ({"model_type": "llama"}, "names Qwen2_5_VL.*, and model_type 'llama' is that of LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says .* already quantized"),
        ({"quantization_config": {}}, "quantization_config says .* already quantized"),
        ({"quantization": {"bits": 4}}, "quantization says .* already quantized"),
        ({"vision_config": {"quantization_config": {"bits": 4}}}, "quantization_config says .* already quantized"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights makes transformers load other"),
        ({"attn_implementation": "kernels-community/attention"}, "attn_implementation makes transformers load other"),
        ({"text_config": {"_attn_implementation": {"": "x/y"}}}, "_attn_implementation makes transformers load other"),
        ({"fusion_config": {"a": 1}}, "fusion_config makes transformers load other"),
        ({"return_dict": False}, "return_dict is not true"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, and the weight files hold"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
    ],
)
def test_a_configuration_that_cannot_be_measured(snapshot, changes, message):
    edit_config(snapshot, **changes)
    with pytest.raises(InputError, match=message):
        check_snapshot(snapshot)


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ("text_config", {"hidden_size": "64"}, "config.json: refused by transformers .*hidden_size"),
        ("text_config", {"hidden_size": 10**18}, "config.json: refused by transformers"),
        ("text_config", {"hidden_size": 10**7}, "mismatched keys"),
        ("text_config", {"vocab_size": 10**9}, r"mismatched keys: .*lm_head.weight \[\d+, 32\] for \[1000000000, 32\]"),
        ("vision_config", {"num_heads": 0}, "config.json: refused by transformers .ZeroDivisionError"),
        ("vision_config", {"hidden_act": "unheard"}, "config.json: refused by transformers .KeyError"),
    ],
)
def test_sizes_that_the_weights_do_not_have(snapshot, block, changes, message):
    edit_config(snapshot, **{block: json.loads((snapshot / "config.json").read_text())[block] | changes})
    with pytest.raises(InputError, match=message):
        build_manifest(snapshot, "tiny", "local", {})


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_text_that_is_no_json_object(snapshot, name, text):
    (snapshot / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: not valid JSON"):
        build_manifest(snapshot, "tiny", "local", {})


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"model": 3}', '{"version": "9"}'])
def test_a_tokenizer_that_is_none(snapshot, text):
    (snapshot / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="no usable tokenizer or image processor"):
        build_manifest(snapshot, "tiny", "local", {})


@pytest.mark.parametrize("key", ["lm_head.weight", "model.language_model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantized_weights_without_their_scales(snapshot, key, dtype):
    stored = stored_name(snapshot, key)
    edit_weights(snapshot, **{stored: load_file(snapshot / "model.safetensors")[stored].to(dtype)})
    with pytest.raises(InputError, match=f"{stored} of type .*: already quantized, and meaningless"):
        build_manifest(snapshot, "tiny", "local", {})


def stored_name(snapshot: Path, name: str) -> str:
    """The name under which a weight is stored."""
    end = name.removeprefix("model.").removeprefix("language_model.")
    (found,) = (stored for stored in load_file(snapshot / "model.safetensors") if stored.endswith(end))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.language_model.layers.0.mlp.up_proj.weight_packed",
        "model.language_model.layers.0.mlp.up_proj.qweight",
        "model.language_model.layers.0.mlp.up_proj.SCB",
        "base_model.model.lm_head.lora_A.weight",
    ],
)
def test_unexpected_weights(snapshot, name):
    edit_weights(snapshot, **{name: torch.zeros(2, 2)})
    with pytest.raises(InputError, match=f"unexpected keys: unexpected in the files: {name};"):
        build_manifest(snapshot, "tiny", "local", {})
    with pytest.raises(InputError, match=f"unexpected keys: unexpected in the files: {name};"):
        load_model(snapshot)


def test_a_weight_of_another_shape_and_one_that_is_missing(snapshot):
    edit_weights(snapshot, lm_head__weight=torch.zeros(3, 5))
    with pytest.raises(InputError, match=r"mismatched keys: .*lm_head\.weight \[3, 5\] for \[\d+, 32\]"):
        build_manifest(snapshot, "tiny", "local", {})
    edit_weights(snapshot, lm_head__weight=None)
    with pytest.raises(InputError, match=r"missing keys: the files lack lm_head\.weight;"):
        build_manifest(snapshot, "tiny", "local", {})


def test_a_weight_that_transformers_loads_on_the_cpu_is_compared_too(tmp_path):
    """transformers keeps the table of n-grams of Qwen4 out of other devices."""
    write_tiny_text("qwen4_exp_text", tmp_path)
    require_filled(tmp_path, read_headers(tmp_path), empty_model(tmp_path))


def test_tied_weights_are_stored_once_or_twice_with_the_same_values(tmp_path):
    """transformers does not tie two stored weights that differ, whatever config.json says."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    require_filled(tmp_path, read_headers(tmp_path), empty_model(tmp_path))
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head[-1, -1] += 1
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ, and config\.json"):
        require_filled(tmp_path, read_headers(tmp_path), empty_model(tmp_path))


def test_two_names_of_one_weight(snapshot):
    """An older and a newer name of it: transformers would take one of them without a word."""
    older, newer = "model.norm.weight", "model.language_model.norm.weight"
    edit_weights(snapshot, **{older: torch.ones(32), newer: torch.ones(32)})
    with pytest.raises(InputError, match=f"{newer} and {older} are both the weight {newer}"):
        build_manifest(snapshot, "tiny", "local", {})


@pytest.mark.parametrize(
    "changes", [{"image_std": "text"}, {"image_std": [0, 0, 0]}, {"image_mean": [1, "a", 2]}, {"rescale_factor": 1e300}]
)
def test_an_image_processor_that_makes_no_pixels(snapshot, changes):
    path = snapshot / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: refused by transformers"):
        build_manifest(snapshot, "tiny", "local", {})


@pytest.mark.parametrize("token_id", [-1, 2**40, 294, None])
def test_an_image_token_id_that_the_tokenizer_does_not_have(snapshot, token_id):
    edit_config(snapshot, image_token_id=token_id)
    with pytest.raises(InputError, match="image_token_id"):
        load_processor(snapshot)


def test_a_missing_tokenizer_is_named(snapshot):
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"makes no tokens of a text; complete the snapshot with its tokenizer\.json"):
        load_processor(snapshot)


@pytest.mark.parametrize("template", [3, [], {"a": "b"}])
def test_a_chat_template_that_is_no_text(snapshot, template):
    (snapshot / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError, match="the chat template is not text"):
        load_processor(snapshot)


def test_a_part_of_the_configuration_that_transformers_reads_while_it_loads(snapshot):
    vision = json.loads((snapshot / "config.json").read_text())["vision_config"]
    edit_config(snapshot, vision_config=vision | {"model_type": {}})
    with pytest.raises(InputError, match=r"config\.json: refused by transformers \(TypeError"):
        build_manifest(snapshot, "tiny", "local", {})


def test_a_buffer_of_integers_is_no_quantized_weight(tmp_path):
    """Older checkpoints store masks and positions, which today's models compute."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool)})
    require_filled(tmp_path, read_headers(tmp_path), empty_model(tmp_path))


def test_weights_that_mean_nothing(tiny_snapshot, batches):
    model = load_model(tiny_snapshot)
    model.lm_head.weight.zero_()
    with pytest.raises(InputError, match="output on the first calibration batch is the same in all channels"):
        find_output_op(model, batches[0])
    model.model.visual.merger.mlp[0].weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"weights that are not finite: model\.visual\.merger\.mlp\.0\.weight"):
        find_output_op(model, batches[0])
    for parameter in model.parameters():
        parameter.zero_()
    with pytest.raises(InputError, match="every weight of the model is zero"):
        find_output_op(model, batches[0])


@pytest.mark.slow
def test_damage_drawn_at_random_is_refused_by_name_or_harmless(tiny_snapshot):
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_snapshots.py"
    specification = importlib.util.spec_from_file_location("fuzz_snapshots", path)
    fuzz_snapshots = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fuzz_snapshots)
    found = list(fuzz_snapshots.fuzz([tiny_snapshot], seed=5, number=30, seconds=60))
    allowed = (fuzz_snapshots.REFUSED, fuzz_snapshots.LATER, fuzz_snapshots.RUNS)
    assert [case for case in found if case[1] not in allowed] == []
    assert len([case for case in found if case[1] == fuzz_snapshots.REFUSED]) > 10


def test_an_adapter(snapshot):
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter \(adapter_config.json\); merge it"):
        check_snapshot(snapshot)


MORE_THAN_TEXT = sorted(
    {(model_type, name) for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    & {
        ("dots3_note", "Dots3NoteForCausalLM"),
        ("emu3", "Emu3ForCausalLM"),
        ("llama4", "Llama4ForCausalLM"),
        ("mllama", "MllamaForCausalLM"),
        ("moshi", "MoshiForCausalLM"),
        ("phi4_multimodal", "Phi4MultimodalForCausalLM"),
        ("qwen3_5", "Qwen3_5ForCausalLM"),
    }
)


@pytest.mark.parametrize(("model_type", "architecture"), MORE_THAN_TEXT)
def test_a_causal_language_model_with_a_tower(snapshot, model_type, architecture):
    edit_config(snapshot, architectures=[architecture], model_type=model_type, vision_config=None, text_config=None)
    with pytest.raises(InputError, match=f"architecture {architecture} .*takes images or sound.* is not supported"):
        check_snapshot(snapshot)


def test_the_names_above_are_all_there():
    assert len(MORE_THAN_TEXT) == 7


def text_config(**changes: object) -> dict[str, object]:
    """The config.json of a text model, without null blocks of other senses."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes}


def test_a_text_model_is_no_model_with_a_tower(snapshot):
    path = snapshot / "config.json"
    check_architecture(text_config(), path)
    check_architecture({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}, path)
    with pytest.raises(InputError, match=r"takes images or sound \(audio_config\)"):
        check_architecture(text_config(audio_config={"layers": 1}), path)


def test_every_class_with_a_tower_is_refused_and_no_other():
    """Told by transformers' own configurations: a part that is not of text. Models of images have another family."""
    refused = set()
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type) == architecture:
            continue
        try:
            check_architecture({"architectures": [architecture], "model_type": model_type}, Path("config.json"))
        except InputError as error:
            if model_type in UNFIT:
                assert UNFIT[model_type] in str(error)
                continue
            assert "takes images or sound" in str(error), (model_type, str(error))
            refused.add(model_type)
    towers = {kind for kind, _ in MORE_THAN_TEXT}
    towers |= {"moss_transcribe_diarize", "musicgen", "musicgen_melody", "qwen3_5_moe", "qwen4_exp"}
    assert refused == towers


def test_a_config_may_hold_infinity_as_transformers_writes_it(snapshot: Path) -> None:
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, math.inf]}))
    assert check_snapshot(snapshot)["time_step_limit"] == [0.0, math.inf]
