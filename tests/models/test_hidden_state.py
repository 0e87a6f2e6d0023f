"""The last hidden state as a module of its own, and the modules that have no part in that state."""

import copy

import pytest
import torch
from tiny_models import LIMITS, loaded, noise

from auto_quantize_model.models.encode import encode
from auto_quantize_model.models.hidden_state import HIDDEN_STATE, without_part
from auto_quantize_model.models.sample import Batch, Sample


def batch_of(name: str) -> Batch:
    images = (noise(60, 40),) if loaded(name)[1].family.takes_images else ()
    return encode(Sample("a", "The ship lay quiet.", images), loaded(name)[1], LIMITS)


@pytest.mark.parametrize("name", ["bert_embedding", "vit_embedding", "clip_vision"])
def test_the_state_passes_its_own_module_unchanged(name: str) -> None:
    model, batch = loaded(name)[0], batch_of(name)
    outputs: list[torch.Tensor] = []
    copied = copy.deepcopy(model)
    handle = copied.get_submodule(HIDDEN_STATE).register_forward_hook(lambda _, __, output: outputs.append(output))
    state = copied(**batch).last_hidden_state
    handle.remove()
    assert len(outputs) == 1 and outputs[0] is state
    assert torch.equal(state, model(**batch).last_hidden_state)
    assert set(model.state_dict()) == {key for key in model.state_dict() if HIDDEN_STATE not in key}


def test_a_pooler_has_no_part_in_the_state() -> None:
    for name, apart in (("bert_embedding", {"pooler.dense"}), ("siglip_vision", {"head.mlp.fc1", "head.mlp.fc2"})):
        model = loaded(name)[0]
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        assert {found for found in without_part(model, batch_of(name), names) if "out_proj" not in found} == apart
