"""The tiny models of images and text: for each family a configuration, its processor, its tokens and its template."""

from typing import Any

from auto_quantize_model.made.tiny_parts import PATCH, PINPOINTS, SIDE, SQUARE, TEXT, VISION, Shape


def llava(architecture: str, image_processor: str, settings: dict[str, Any], processor: str, **others: Any) -> Shape:
    return Shape(
        architecture,
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}}
        | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 16}
        | others,
        (image_processor, {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE} | settings),
        (
            processor,
            {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "<image>",
        ids={"image_token_index": "<image>"},
    )


def _idefics3(architecture: str, image_processor: str, processor: str) -> Shape:
    return Shape(
        architecture,
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 2},
        (image_processor, {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}),
        (processor, {"image_seq_len": 4}),
        "<image>",
        (
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *[f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)],
        ),
        ids={"image_token_id": "<image>"},
    )


def qwen(architecture: str, text: dict[str, Any], vision: dict[str, Any], processor: str, **sizes: Any) -> Shape:
    side = sizes.get("patch_size", 14)
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    area = {"shortest_edge": (2 * side) ** 2, "longest_edge": (8 * side) ** 2}
    return Shape(
        architecture,
        {"text_config": TEXT | text, "vision_config": vision | sizes},
        ("Qwen2VLImageProcessorPil", {"size": area, **sizes}),
        (processor, {}),
        "<|vision_start|><|image_pad|><|vision_end|>",
        tuple(f"<|{name}|>" for name in names),
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
    )


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN3_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
}
QWEN3_VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HYBRID |= {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}
IMAGE = {"image_token": "<image>"}

IMAGE_TEXT_SHAPES: dict[str, Shape] = {
    "qwen2_vl": qwen(
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": MROPE},
        {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2},
        "Qwen2VLProcessor",
    ),
    "qwen2_5_vl": qwen(
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": MROPE},
        {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
        | {"window_size": 56, "fullatt_block_indexes": [1]},
        "Qwen2_5_VLProcessor",
    ),
    "qwen3_vl": qwen(
        "Qwen3VLForConditionalGeneration", {"rope_parameters": MROPE}, QWEN3_VISION, "Qwen3VLProcessor", patch_size=16
    ),
    "qwen3_vl_moe": qwen(
        "Qwen3VLMoeForConditionalGeneration",
        {"rope_parameters": MROPE, "decoder_sparse_step": 1, **EXPERTS},
        QWEN3_VISION,
        "Qwen3VLProcessor",
        patch_size=16,
    ),
    "qwen3_5": qwen("Qwen3_5ForConditionalGeneration", HYBRID, QWEN3_VISION, "Qwen3VLProcessor", patch_size=16),
    "qwen3_5_moe": qwen(
        "Qwen3_5MoeForConditionalGeneration",
        HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16},
        QWEN3_VISION,
        "Qwen3VLProcessor",
        patch_size=16,
    ),
    "llava": llava("LlavaForConditionalGeneration", "CLIPImageProcessorPil", {}, "LlavaProcessor"),
    "llava_next": llava(
        "LlavaNextForConditionalGeneration",
        "LlavaNextImageProcessorPil",
        {"image_grid_pinpoints": PINPOINTS},
        "LlavaNextProcessor",
        image_grid_pinpoints=PINPOINTS,
    ),
    "llava_onevision": Shape(
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -1,
        },
        ("LlavaOnevisionImageProcessorPil", {"size": SQUARE, "image_grid_pinpoints": PINPOINTS}),
        ("LlavaOnevisionProcessor", {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
        "<image>",
        ("<video>",),
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
    "internvl": Shape(
        "InternVLForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            "image_seq_length": 4,
        },
        ("GotOcr2ImageProcessorPil", {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}),
        ("InternVLProcessor", {"image_seq_length": 4}),
        "<IMG_CONTEXT>",
        ("<img>", "</img>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_token_id": "<IMG_CONTEXT>"},
    ),
    "smolvlm": _idefics3("SmolVLMForConditionalGeneration", "SmolVLMImageProcessorPil", "SmolVLMProcessor"),
    "idefics3": _idefics3("Idefics3ForConditionalGeneration", "Idefics3ImageProcessorPil", "Idefics3Processor"),
    "gemma3": Shape(
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT | {"sliding_window": 64}, "vision_config": VISION, "mm_tokens_per_image": 4},
        ("Gemma3ImageProcessorPil", {"size": SQUARE, "image_seq_length": 4}),
        ("Gemma3Processor", {"image_seq_length": 4}),
        "<start_of_image>",
        ("<image_soft_token>", "<end_of_image>"),
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    ),
    "mistral3": Shape(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "image_size": 2 * SIDE, "head_dim": 8},
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        ("PixtralImageProcessorPil", {"size": {"longest_edge": 2 * SIDE}, "patch_size": {"height": 14, "width": 14}}),
        ("PixtralProcessor", {"patch_size": PATCH, "spatial_merge_size": 2}),
        "[IMG]",
        ("[IMG_BREAK]", "[IMG_END]"),
        ids={"image_token_index": "[IMG]"},
    ),
    "paligemma": Shape(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "gemma2", "sliding_window": 64},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "projection_dim": 32,
        },
        ("SiglipImageProcessorPil", {"size": SQUARE, "image_seq_length": 16}),
        ("PaliGemmaProcessor", {}),
        ids={"image_token_index": "<image>"},
    ),
}
