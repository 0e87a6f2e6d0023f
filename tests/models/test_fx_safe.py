"""A model made safe for FX keeps every bit, its names, and reads no dtype of a weight that INC may quantize."""

import inspect
from typing import Any

import pytest
import torch
from tiny_models import batch_of, loaded, noise
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

from auto_quantize_model.models.fx_safe import fx_safe, safe_class


def changed(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """The modules with a changed class, each with the class before."""
    pairs = [(module, type(module).__mro__[1]) for module in model.modules()]
    return [(module, before) for module, before in pairs if safe_class(before) is type(module)]


@pytest.mark.parametrize("name", ["llava", "mistral3", "internvl", "qwen2_5_vl"])
def test_no_bit_changes(name: str) -> None:
    model, _ = loaded(name)
    batch = batch_of(name, noise(60, 40))
    with torch.no_grad():
        safe = model(**batch).logits
        modules = changed(model)
        assert modules
        for module, before in modules:
            module.__class__ = before
        assert torch.equal(model(**batch).logits, safe)
        with fx_safe(model):
            assert len(changed(model)) == len(modules)
            assert torch.equal(model(**batch).logits, safe)
        for module, before in modules:
            assert type(module) is before
            module.__class__ = safe_class(before)


@pytest.mark.parametrize("kind", [CLIPVisionEmbeddings, PixtralVisionModel, Qwen2_5_VisionPatchEmbed])
def test_the_dtype_is_not_read_and_the_name_stays(kind: Any) -> None:
    safe = safe_class(kind)
    assert str(safe) == str(kind) and safe.__name__ == kind.__name__ and issubclass(safe, kind)
    names = inspect.unwrap(safe.forward).__code__.co_names
    assert "dtype" not in names


def test_a_module_that_computes_with_its_own_weight_stays() -> None:
    assert safe_class(Gemma3TextScaledWordEmbedding) is None
    assert safe_class(torch.nn.Linear) is None
