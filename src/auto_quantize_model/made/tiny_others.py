"""Further tiny models of images and text: relatives of those in the other files, and models with image codebooks."""

from typing import Any

from auto_quantize_model.made.tiny_image_text import HYBRID, QWEN3_VISION, llava, qwen
from auto_quantize_model.made.tiny_more import AREA, BY_TOKENIZER, LLAMA, MORE_SHAPES, SECTIONS, siglip_of_janus
from auto_quantize_model.made.tiny_parts import PATCH, PINPOINTS, SIDE, SQUARE, TEXT, VISION, Shape

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BLOCKS = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}
IMAGE_ID = 259  # that of the token "<image>" in the tokenizer of tiny models


def _glm(architecture: str, image_processor: str, processor: str, **text: Any) -> Shape:
    like = MORE_SHAPES["glm4v"]
    config = like.config | {"text_config": like.config["text_config"] | text}
    return Shape(
        architecture,
        config,
        (image_processor, {"size": AREA, "patch_size": PATCH}),
        (processor, {}),
        like.image,
        like.tokens,
        ids=like.ids,
    )


OTHER_SHAPES: dict[str, Shape] = {
    "glm46v": _glm("Glm46VForConditionalGeneration", "Glm46VImageProcessorPil", "Glm46VProcessor"),
    "glm_ocr": _glm("GlmOcrForConditionalGeneration", "Glm46VImageProcessorPil", "Glm46VProcessor"),
    "glm4v_moe": _glm(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vImageProcessorPil",
        "Glm4vProcessor",
        **EXPERTS,
        rope_parameters=SECTIONS | {"partial_rotary_factor": 1.0},
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "lighton_ocr": Shape(
        "LightOnOcrForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen3"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "spatial_merge_size": 2,
        },
        ("PixtralImageProcessorPil", {"size": {"longest_edge": 2 * SIDE}, "patch_size": 2 * PATCH}),
        ("LightOnOcrProcessor", {"patch_size": PATCH, "spatial_merge_size": 2}),
        "<image>",
        named={"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"},
        ids={"image_token_id": "<image>"},
    ),
    "llava_next_video": llava(
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextImageProcessorPil",
        {"image_grid_pinpoints": PINPOINTS},
        "LlavaNextVideoProcessor",
        image_grid_pinpoints=PINPOINTS,
    ),
    "video_llava": Shape(
        "VideoLlavaForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "vision_feature_layer": -2,
            "image_seq_length": 16,
        },
        ("VideoLlavaImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}),
        ("VideoLlavaProcessor", {"patch_size": PATCH}),
        "<image>",
        named={"image_token": "<image>", "video_token": "<video>"},
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
    "chameleon": Shape(
        "ChameleonForConditionalGeneration",
        TEXT
        | {
            "vq_config": BLOCKS | {"num_embeddings": 16, "channel_multiplier": [1, 1, 1], "resolution": SIDE},
            "vocabulary_map": {"<image>": IMAGE_ID}
            | {f"IMGIMG{'ABCDEFGHIJ'[code // 10]}{'ABCDEFGHIJ'[code % 10]}Z": code for code in range(16)},
        },
        ("ChameleonImageProcessorPil", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}),
        ("ChameleonProcessor", {"image_seq_length": 49}),
        "<image>",
        named=BY_TOKENIZER,
        ids={"image_token_id": "<image>"},
    ),
    "emu3": Shape(
        "Emu3ForConditionalGeneration",
        {
            "text_config": TEXT,
            "vq_config": BLOCKS
            | {"codebook_size": 128, "channel_multiplier": [1, 1, 1, 1], "attn_resolutions": [], "hidden_size": 32},
            "vocabulary_map": {"<image>": IMAGE_ID, "<|extra_200|>": 20}
            | {f"<|visual token {code:06}|>": code for code in range(128)},
        },
        ("Emu3ImageProcessor", {"min_pixels": SIDE**2, "max_pixels": (4 * SIDE) ** 2}),
        ("Emu3Processor", {}),
        "<image>",
        named={**BY_TOKENIZER, "image_wrapper_token": "<wrap>", "eof_token": "<eof>"},
        ids={"image_token_id": "<image>"},
    ),
    "deepseek_vl_hybrid": siglip_of_janus(
        "DeepseekVLHybridForConditionalGeneration",
        "DeepseekVLHybridImageProcessorPil",
        "DeepseekVLHybridProcessor",
        {"high_res_size": {"height": 64, "width": 64}},
        high_res_vision_config={"model_type": "sam_vision_model", "hidden_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "mlp_dim": 64, "image_size": 64, "patch_size": 16, "output_channels": 16}
        | {"window_size": 2, "global_attn_indexes": [1]},
    ),
    "instructblip": Shape(
        "InstructBlipForConditionalGeneration",
        MORE_SHAPES["blip_2"].config
        | {"qformer_config": MORE_SHAPES["blip_2"].config["qformer_config"] | {"vocab_size": 300}},
        ("BlipImageProcessorPil", {"size": SQUARE}),
        ("InstructBlipProcessor", {"num_query_tokens": 4}),
        ids={"image_token_index": "<image>"},
    ),
    "exaone4_5": qwen(
        "Exaone4_5_ForConditionalGeneration",
        {"model_type": "exaone4", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "num_key_value_heads": 2}
        | {"out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]},
        "Exaone4_5_Processor",
    ),
    "qwen4_exp": qwen(
        "Qwen4ExpForConditionalGeneration",
        HYBRID
        | EXPERTS
        | {"layer_types": ["linear_attention", "indexed_attention"], "num_experts": 4}
        | {"shared_expert_intermediate_size": 16, "hc_count": 2, "hc_lowrank": 8}
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 8, "indexer_compress_ratio": 2},
        QWEN3_VISION,
        "Qwen3VLProcessor",
        patch_size=16,
    ),
}
