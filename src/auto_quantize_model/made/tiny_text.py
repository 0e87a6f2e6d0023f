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
    1: "n_shared_experts moe_num_shared_experts num_shared_experts n_group num_expert_group topk_group"
    " first_k_dense_replace"
    " num_dense_layers moe_layer_start_index attn_layer_offset expert_layer_offset zero_expert_num mamba_n_groups"
    " num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads"
    " n_head_kv num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"
    " top_k attn_layer_period expert_layer_period linear_num_key_heads index_topk num_hash_layers num_blocks",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_query_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts num_moe_experts num_linear_heads linear_num_value_heads"
    " index_n_heads linear_num_heads num_heads",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_n_heads mamba_num_heads index_head_dim",
    16: "head_dim v_head_dim attention_head_dim kv_channels global_head_dim d_kv d_head mamba_d_head mamba_head_dim"
    " linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size state_size qk_head_dim"
    " swa_head_dim swa_v_head_dim",
    32: "q_lora_rank kv_lora_rank o_lora_rank mamba_chunk_size chunk_size",
    64: "hidden_size d_model n_embd dim embed_dim embedding_dim emb_dim hidden_dim word_embed_proj_dim embedding_size"
    " attention_hidden_size lru_width input_embedding_size output_embedding_size",
    96: "intermediate_size ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size"
    " shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size"
    " shared_intermediate_size moe_shared_expert_intermediate_size block_ff_dim prefix_hidden_size dff inner_dim"
    " moe_shared_intermediate_size shared_experts_intermediate_size",
    128: "max_position_embeddings n_positions max_seq_len block_size n_ctx seq_length mamba_intermediate_size"
    " max_source_positions max_target_positions",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# An indexer, which the defaults leave out, and embeddings of n-grams.
QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "number_of_conv_states": 3,
}
# What a model type needs besides, mostly because one of its keys is a product of others.
OTHERS: dict[str, dict[str, Any]] = {
    "axk2": {"index_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {"num_key_value_heads": 4, "head_dim": 16},
        "decoder_config": {"num_key_value_heads": 4, "head_dim": 16, "hidden_size_global": 64},
        "global_config": {"num_key_value_heads": 4, "head_dim": 16},
        "patcher_config": {"num_key_value_heads": 4, "head_dim": 16},
        "encoder_hash_byte_group_vocab": 64,
        "use_cache": False,  # it fails in this release of transformers
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [4, 2, 2]}}},
    "cpmant": {"dim_head": 16, "dim_ff": 96, "position_bias_num_buckets": 32, "position_bias_max_distance": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS},
    "deepseek_v32": {"index_head_dim": 16},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1},
    "dots3_note": {
        "text_config": {"head_dim": 16},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": {"index_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # stack by stack, in cycles
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "marian": {"decoder_vocab_size": 270},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "qwen4_exp": {"text_config": QWEN4 | {"eos_token_id": 257}},
    "qwen4_exp_text": QWEN4 | {"eos_token_id": 1},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
    },
}
# Lists with an entry for each layer, of which each kind is wanted once.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def text_types() -> list[str]:
    """The model types whose causal class takes text alone."""
    others = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    return [name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind not in others]


def class_of(model_type: str) -> str:
    """The name of a model type's causal class."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def small_config(model_type: str, vocabulary: int, **others: Any) -> PreTrainedConfig:
    """The configuration of a model type in a small size.

    Args:
        vocabulary: number of rows of the embedding.
        others: values of keys that the names of `SIZES` do not decide.
    """
    kind: Any = CONFIG_MAPPING[model_type]
    small = with_values(shrunk(kind().to_dict(), vocabulary), OTHERS.get(model_type, {})) | others
    made: PreTrainedConfig = kind.from_dict(small)
    return made


def with_values(config: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values; those of a part's configuration are put into the part."""
    in_parts = {
        key: {**config.get(key, {}), **value}
        for key, value in others.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    return {**config, **others, **in_parts}


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
        if config.get("head_dim") == config["qk_rope_head_dim"]:
            found["head_dim"] = found["qk_rope_head_dim"]
        if config.get("num_key_value_heads") == config.get("num_attention_heads"):
            found["num_key_value_heads"] = found["num_attention_heads"]
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
