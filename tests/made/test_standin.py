"""Every supported family at tiny size: planned by INC, measured by replay, and every op audited, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from quick_inc import plans_unchecked
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.audit import audit_capture
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.made import standin
from auto_quantize_model.made.digits import build_tokenizer
from auto_quantize_model.made.shapes import SHAPES
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.sample import Limits, Sample
from auto_quantize_model.models.snapshot import build_manifest, load_model, load_processor

LIMITS = Limits(min_pixels=3136, max_pixels=3136, max_tokens=512)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def configuration(architecture: str, vocabulary: int, tokens: dict[str, int]) -> Any:
    """A tiny configuration of an architecture."""
    text = TEXT | {"vocab_size": vocabulary}
    if architecture == "Qwen2VLForConditionalGeneration":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
        text |= {"rope_parameters": ROPE}
        return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    if architecture == "Qwen3VLForConditionalGeneration":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
        vision |= {"patch_size": 14, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text |= {"head_dim": 8, "rope_parameters": ROPE | {"mrope_interleaved": True}}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    if architecture == "Qwen2ForCausalLM":
        return transformers.Qwen2Config(**text, tie_word_embeddings=True)
    return transformers.LlamaConfig(**text, tie_word_embeddings=False)


def write_snapshot(architecture: str, directory: Path) -> Path:
    """A tiny snapshot with weights from a seed; Qwen2.5-VL in its published layout."""
    if architecture == "Qwen2_5_VLForConditionalGeneration":
        standin.build(SHAPES["tiny"], directory, shard_bytes=100_000)
        return directory
    tokenizer = build_tokenizer()
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    token_id: Any = tokenizer.convert_tokens_to_ids
    tokens = {f"{key}_token_id": token_id(f"<|{name}|>") for key, name in names.items()}
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(configuration(architecture, len(tokenizer), tokens))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if "VL" in architecture:
        transformers.Qwen2VLImageProcessorPil().save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "number"),
    [
        ("Qwen2_5_VLForConditionalGeneration", 29),
        ("Qwen2VLForConditionalGeneration", 16),
        ("Qwen3VLForConditionalGeneration", 23),
        ("Qwen2ForCausalLM", 9),
        ("LlamaForCausalLM", 9),
    ],
)
def test_every_op_of_a_family_is_planned_executed_and_bit_identical(
    architecture: str, number: int, tmp_path: Path
) -> None:
    directory = write_snapshot(architecture, tmp_path / "snapshot")
    model: torch.nn.Module = load_model(directory)
    images = (Image.radial_gradient("L").convert("RGB"),) if "VL" in architecture else ()
    sample = Sample("gradient", "Which digit is this?", images, "3")
    batch = collate([encode(sample, load_processor(directory), LIMITS)])
    # Each value of the fallback map has all other ops in INT8, so of two values one at least has any op in INT8.
    with plans_unchecked():
        plan = build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=("fallback",)))
    capture, _ = capture_sensitivity(model, [batch], plan, ScoreStore(tmp_path / "scores"))
    assert len(plan.ops) == number
    assert all(op.executions == (1,) for op in plan.ops)
    audit = audit_capture(model, [batch], plan, capture, 2)
    assert (audit.status, audit.by) == ("bit_identical", "inc")


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    processor = load_processor(write_snapshot("Qwen2ForCausalLM", tmp_path / "snapshot"))
    assert set(encode(Sample("words", "Which?"), processor, LIMITS)) == {"input_ids", "attention_mask"}
    with pytest.raises(InputError, match="sample photo: the sample has an image, and the model takes none"):
        encode(Sample("photo", "Which?", (Image.new("RGB", (56, 56)),)), processor, LIMITS)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot("Qwen2_5_VLForConditionalGeneration", tmp_path_factory.mktemp("published") / "tiny")


def test_the_published_layout_is_that_of_the_hub(published: Path) -> None:
    names = {path.name for path in published.iterdir()}
    assert {"chat_template.json", "preprocessor_config.json", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert "chat_template.jinja" not in names


def test_the_published_layout_fills_the_model(published: Path) -> None:
    """The flat configuration and the older weight names reach the modules that they are for."""
    model: Any = load_model(published)
    weights = {}
    for shard in published.glob("*.safetensors"):
        weights |= load_file(shard)
    assert "lm_head.weight" not in weights
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[standin.published_name(name)].float()), name
    assert model.config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]


def test_the_processors_own_chat_template_comes_before_the_tokenizers(published: Path) -> None:
    processor = load_processor(published)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stand_in_says_so_in_its_manifest(published: Path, tiny_snapshot: Path) -> None:
    assert "drawn from seed 0" in build_manifest(published, "x", "local", {}).stand_in
    assert build_manifest(tiny_snapshot, "x", "local", {}).stand_in is None


def test_a_calibration_set_of_torchvision_is_not_read_with_another_resizer(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_quantize_model.models.snapshot.is_torchvision_available", lambda: False)
    with pytest.raises(InputError, match="made with torchvision, which is not installed"):
        load_processor(published, "torchvision")
    assert load_processor(published).image_backend == "pil"


@pytest.mark.parametrize(("side", "levels"), [(252, 0), (640, 2)], ids=["as it is", "shrunk"])
def test_torchvision_and_pil_give_the_same_pixels(published: Path, side: int, levels: int) -> None:
    """Unresized the same to float32 rounding; resized to two of 255 grey levels, as each rounds for itself."""
    pytest.importorskip("torchvision")
    image = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, side, min(side, 427)))
    limits = Limits(3136, 252 * 252, 512)
    torchvision, pil = (
        encode(Sample("photo", "Which?", (image,)), load_processor(published, backend), limits)["pixel_values"]
        for backend in ("torchvision", "pil")
    )
    one_level = 1 / 255 / 0.26
    assert float((torchvision - pil).abs().max()) <= levels * one_level + 1e-6
