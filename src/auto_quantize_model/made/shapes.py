"""The shapes of stand-ins: configurations of Qwen2.5-VL, as published and smaller."""

from typing import Any

# config.json of Qwen/Qwen2.5-VL-3B-Instruct at 66285546d2b821cf421d4f5eb2576359d3770cd3: the older, flat form.
QWEN2_5_VL_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def scaled(text: dict[str, Any], vision: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The published configuration at another size, its rotary sections in the published proportions."""
    config = QWEN2_5_VL_3B | text | others
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    side = half * 3 // 8
    return config | {
        "vision_config": QWEN2_5_VL_3B["vision_config"] | vision | {"out_hidden_size": config["hidden_size"]},
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": QWEN2_5_VL_3B,
    # The proportions of the 3B model with 150 M parameters.
    "medium": scaled(
        {
            "hidden_size": 640,
            "intermediate_size": 2560,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
        },
        {
            "hidden_size": 448,
            "intermediate_size": 1344,
            "depth": 12,
            "num_heads": 8,
            "fullatt_block_indexes": [2, 5, 8, 11],
        },
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    # The sizes of Qwen/Qwen2.5-VL-7B-Instruct.
    "qwen2_5_vl_7b": scaled(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        {},
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    # The widths of the 3B model with six layers in each tower.
    "short": scaled({"num_hidden_layers": 6}, {"depth": 6, "fullatt_block_indexes": [2, 5]}, vocab_size=32000),
    # The layout alone, for tests.
    "tiny": scaled(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
        vocab_size=512,
    ),
}
