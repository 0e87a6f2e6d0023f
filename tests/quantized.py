"""Checkpoints of compressed-tensors of a tiny language model, written by the library and by transformers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)

from auto_quantize_model.schemes.compressed import global_scale, input_parameters, weight_parameters

VOCABULARY = 61
Modules = Mapping[str, Any]


def tiny_language_model(**changes: Any) -> Any:
    """A Qwen2 of two blocks, with biases, whose blocks weigh against what passes by them."""
    torch.manual_seed(3)
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields | changes))
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data *= 5
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def token_batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of two samples of 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (2, 12), generator=generator)} for _ in range(count)]


def write_checkpoint(
    model: Any,
    folder: Path,
    scheme: QuantizationScheme | Mapping[str, QuantizationScheme],
    *,
    ignore: Sequence[str] = ("lm_head",),
    dtype: torch.dtype = torch.float32,
    calibrate: bool = True,
    before: Callable[[Modules], None] = lambda modules: None,
    after: Callable[[Modules], None] = lambda modules: None,
) -> Path:
    """Quantize a copy of a model by minima and maxima, and write the copy as llm-compressor would.

    Args:
        scheme: of every Linear, or {target: scheme}.
        ignore: of the library's config.
        dtype: of the checkpoint.
        calibrate: whether to run the model on token ids, for the ranges of static inputs.
        before: changes the modules of the copy before they are quantized.
        after: changes the modules between calibration and compression, when they have their scales.
    """
    made = copy.deepcopy(model).to(dtype)
    modules = dict(made.named_modules())
    before(modules)
    ranges = input_ranges(made) if calibrate else {}
    schemes = scheme if isinstance(scheme, Mapping) else {"Linear": scheme}
    groups: Any = {
        f"group_{index}": of_target.model_copy(deep=True, update={"targets": [target]})
        for index, (target, of_target) in enumerate(schemes.items())
    }
    apply_quantization_config(made, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for name, module in modules.items():
        if (group := getattr(module, "quantization_scheme", None)) is None:
            continue
        weight, args = module.weight.detach(), group.weights
        found = {"weight": weight_parameters(weight, args, global_scale([weight]))}
        if group.input_activations and group.input_activations.dynamic is not True:
            found["input"] = input_parameters(*ranges[name], group.input_activations, dtype)
        for side, parameters in found.items():
            for key, value in vars(parameters).items():
                if value is not None and value.numel():
                    getattr(module, f"{side}_{key}").data = value
        module.quantization_status = QuantizationStatus.FROZEN
    after(modules)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def input_ranges(model: Any) -> dict[str, tuple[float, float]]:
    """The least and the greatest input of each Linear on a batch."""
    ranges: dict[str, tuple[float, float]] = {}

    def see(name: str) -> Any:
        return lambda module, args: ranges.update({name: (float(args[0].min()), float(args[0].max()))})

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(see(name)) for name, module in linears]
    with torch.no_grad():
        model(**token_batches(1)[0])
    for handle in handles:
        handle.remove()
    return ranges
