"""The family of a configuration: every class of transformers has one or a reason against it."""

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from auto_quantize_model.files import InputError
from auto_quantize_model.models import pixels
from auto_quantize_model.models.architecture import check_architecture, takes_images
from auto_quantize_model.models.families import image_text
from auto_quantize_model.models.families.causal import CAUSAL, LISTED_ELSEWHERE
from auto_quantize_model.models.families.image_text import IMAGE_TEXT, PLACED, PLACING, UNFIT
from auto_quantize_model.models.families.paligemma import PALIGEMMA
from auto_quantize_model.models.families.qwen_vl import ARCHITECTURES, QWEN_VL

PLACE = Path("config.json")


def config(model_type: str, architecture: str) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture]}


def test_every_class_of_images_and_text_has_a_family_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(image_text, "is_timm_available", lambda: True)
    for model_type, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if model_type in UNFIT:
            with pytest.raises(InputError, match=f"config.json: architecture {architecture} .* is not supported: it"):
                check_architecture(config(model_type, architecture), PLACE)
            assert takes_images(architecture)
            continue
        family = check_architecture(config(model_type, architecture), PLACE)
        expected = QWEN_VL if model_type in ARCHITECTURES else CAUSAL if model_type in LISTED_ELSEWHERE else IMAGE_TEXT
        expected = PALIGEMMA if model_type == "paligemma" else PLACED if model_type in PLACING else expected
        assert family is expected
        assert family.takes_images == takes_images(architecture)


def test_a_processor_that_needs_torchvision_is_refused_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "is_torchvision_available", lambda: False)
    with pytest.raises(InputError, match=r"Llama4For.* needs torchvision.*pip install torchvision"):
        check_architecture(config("llama4", "Llama4ForConditionalGeneration"), PLACE)
    assert check_architecture(config("llava", "LlavaForConditionalGeneration"), PLACE) is IMAGE_TEXT


def test_a_tower_of_timm_is_refused_where_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_text, "is_timm_available", lambda: False)
    for model_type, architecture in (("gemma3n", "Gemma3n"), ("fast_vlm", "FastVlm")):
        with pytest.raises(InputError, match=r"has a tower of timm, .*pip install timm"):
            check_architecture(config(model_type, f"{architecture}ForConditionalGeneration"), PLACE)
    assert check_architecture(config("llava", "LlavaForConditionalGeneration"), PLACE) is IMAGE_TEXT


def test_a_causal_class_is_no_model_of_images() -> None:
    assert check_architecture(config("llama", "LlamaForCausalLM"), PLACE) is CAUSAL
    assert not takes_images(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"])


def test_a_class_of_another_model_type_is_named() -> None:
    with pytest.raises(InputError, match="names LlavaFor.*, and model_type 'llama' is that of LlamaForCausalLM"):
        check_architecture(config("llama", "LlavaForConditionalGeneration"), PLACE)
    with pytest.raises(InputError, match="WhisperForAudioClassification is not supported; supported: the classes"):
        check_architecture(config("whisper", "WhisperForAudioClassification"), PLACE)
