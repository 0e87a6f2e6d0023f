"""The names of modules in the files for tools mean one module each, in every tiny model."""

import re
from pathlib import Path

import pytest
import torch

from auto_quantize_model.export.names import common_name, regular_expression
from auto_quantize_model.made.tiny import write_tiny
from auto_quantize_model.models.snapshot import module_types, tensor_names


@pytest.mark.parametrize("name", ["llava", "janus", "smolvlm", "qwen3_vl", "gemma3", "bert", "vit"])
def test_a_name_means_one_module(name: str, tmp_path: Path) -> None:
    directory = write_tiny(name, tmp_path / name)
    modules, published = module_types(directory), tensor_names(directory)
    linears = [module for module, kind in modules.items() if issubclass(kind, torch.nn.Linear)]
    assert linears
    for linear in linears:
        pattern = regular_expression(common_name(linear, modules, published))
        assert [module for module in modules if re.match(pattern, module)] == [linear]


def test_a_layer_of_both_towers_keeps_the_name_of_its_tower(tmp_path: Path) -> None:
    directory = write_tiny("llava", tmp_path / "llava")
    modules, published = module_types(directory), tensor_names(directory)
    found = common_name("model.language_model.layers.0.self_attn.q_proj", modules, published)
    assert found == "language_model.layers.0.self_attn.q_proj"
