"""Causal language models: every class that takes text alone, and none with a tower."""

from typing import Any

import pytest
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families.causal import CAUSAL, TAKE_MORE_THAN_TEXT, UNFIT
from auto_quantize_model.models.sample import Limits


def config(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **others}


def test_every_causal_class_matches_its_model_type_alone() -> None:
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        assert CAUSAL.matches(config(model_type, architecture))
        assert not CAUSAL.matches(config(model_type, "Unheard"))


def test_a_text_model_that_is_listed_among_those_of_images_is_a_text_model() -> None:
    found = config("mistral4", "Mistral4ForCausalLM")
    assert CAUSAL.matches(found) and not CAUSAL.refuse(found)
    assert "Mistral4ForCausalLM" not in TAKE_MORE_THAN_TEXT


def test_a_block_of_another_sense_is_a_reason() -> None:
    assert CAUSAL.refuse(config("llama", "LlamaForCausalLM")) == ""
    reason = CAUSAL.refuse(config("llama", "LlamaForCausalLM", speech_config={}, use_cache=True))
    assert reason.startswith("takes images or sound (speech_config)")


def test_what_text_alone_does_not_measure_is_refused_in_words() -> None:
    for model_type, reason in UNFIT.items():
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "MusicgenForCausalLM")
        assert CAUSAL.refuse(config(model_type, architecture)) == f"is not supported: {reason}"


def test_no_image_is_taken() -> None:
    processor: Any = None
    with pytest.raises(InputError, match="takes no images"):
        CAUSAL.fit(Image.new("RGB", (4, 4)), processor, Limits(1, 1, 1))
