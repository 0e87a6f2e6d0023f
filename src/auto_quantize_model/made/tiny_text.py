"""Tiny language models of every model type of transformers, for tests and for the benchmark of families.

In: a model type. Out: a complete snapshot. Its configuration is that of the real class, made small by the names of its
keys. Its weights are random, and its tokenizer has bytes as tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from auto_quantize_model.made.tiny import BEGIN, END, build_tokenizer
from auto_quantize_model.made.tiny_shapes import Shape

LAYERS, EXPERTS = 2, 4
# Small values by the names that configurations give to sizes. Widths divide into heads and into groups of 32.
_SIZES: dict[int, str] = {
    1: "n_shared_experts moe_num_shared_experts num_shared_experts n_group topk_group first_k_dense_replace"
    " num_dense_layers moe_layer_start_index attn_layer_offset expert_layer_offset zero_expert_num mamba_n_groups"
    " num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads"
    " n_head_kv num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"
    " top_k attn_layer_period expert_layer_period linear_num_key_heads index_topk num_hash_layers",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_query_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts num_moe_experts num_linear_heads linear_num_value_heads"
    " index_n_heads",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_n_heads mamba_num_heads index_head_dim",
    16: "head_dim v_head_dim attention_head_dim kv_channels global_head_dim d_kv d_head mamba_d_head mamba_head_dim"
    " linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size state_size qk_head_dim swa_head_dim"
    " swa_v_head_dim",
    32: "q_lora_rank kv_lora_rank o_lora_rank mamba_chunk_size chunk_size",
    64: "hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim word_embed_proj_dim embedding_size"
    " attention_hidden_size lru_width input_embedding_size output_embedding_size",
    96: "intermediate_size ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size"
    " shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size"
    " shared_intermediate_size moe_shared_expert_intermediate_size block_ff_dim prefix_hidden_size dff inner_dim"
    " moe_shared_intermediate_size",
    128: "max_position_embeddings n_positions max_seq_len block_size n_ctx seq_length mamba_intermediate_size"
    " max_source_positions max_target_positions",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
# What a model type needs besides, mostly because one of its keys is a product of others.
OTHERS: dict[str, dict[str, Any]] = {
    "axk2": {"index_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "cpmant": {"dim_head": 16, "dim_ff": 96, "position_bias_num_buckets": 32, "position_bias_max_distance": 64},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS},
    "deepseek_v32": {"index_head_dim": 16},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": {"index_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "marian": {"decoder_vocab_size": 270},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
}
# Lists with an entry for each layer, of which each kind is wanted once.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def text_types() -> list[str]:
    """The model types whose causal class takes text alone."""
    others = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    return [name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind not in others]


def small_config(model_type: str, vocabulary: int, **others: Any) -> PreTrainedConfig:
    """The configuration of a model type in a small size.

    Args:
        vocabulary: number of rows of the embedding.
        others: values of keys that the names of `SIZES` do not decide.
    """
    kind: Any = CONFIG_MAPPING[model_type]
    small = shrunk(kind().to_dict(), vocabulary) | OTHERS.get(model_type, {}) | others
    made: PreTrainedConfig = kind.from_dict(small)
    return made


def shrunk(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The keys of a configuration with small values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            found[key] = {} if key == "per_layer_config" else shrunk(value, vocabulary)
        elif key in SIZES and type(value) is int:
            found[key] = min(value, SIZES[key])
        elif key in ("head_dim", "kv_channels", "v_head_dim") and value is None:
            found[key] = SIZES[key]
        elif key.startswith("vocab_size") and type(value) is int:
            found[key] = vocabulary
        elif key.endswith("token_id") and type(value) is int and value >= vocabulary:
            found[key] = 1
        elif isinstance(value, list) and len(value) >= LAYERS and not key.endswith("token_id"):
            kinds = list(dict.fromkeys(map(str, value))) if key in KINDS else []
            of_layers = kinds or len(value) in {config.get(name) for name in COUNTS}
            found[key] = (kinds + value)[:LAYERS] if of_layers else value
        else:
            found[key] = value
    if "qk_rope_head_dim" in found and "qk_nope_head_dim" in found:
        found.pop("head_dim", None)  # the class computes it
    return found


def write_tiny_text(model_type: str, directory: Path, seed: int = 0) -> Path:
    """Write the snapshot of a tiny causal language model, and return its directory."""
    tokenizer: Any = build_tokenizer(Shape("", {}, ("", {}), ("", {}), ""))
    tokenizer.save_pretrained(directory)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", BEGIN), ("eos", END))}
    # Some classes have a row for the padding's id among the positions, of which there are few.
    config = small_config(model_type, len(tokenizer), **ids, pad_token_id=1)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    return directory
