"""More tiny models of images and text, one for each family that is less common."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from auto_quantize_model.made.tiny_parts import PATCH, SIDE, SQUARE, TEXT, VISION, Shape

LLAMA = TEXT | {"model_type": "llama"}
QWEN2 = TEXT | {"model_type": "qwen2"}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
AREA = {"shortest_edge": SIDE**2, "longest_edge": (4 * SIDE) ** 2}
BY_TOKENIZER = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}


def siglip_of_janus(
    architecture: str, kind: str, processor: str, sizes: Mapping[str, Any] = MappingProxyType({}), **others: Any
) -> Shape:
    return Shape(
        architecture,
        {"text_config": LLAMA, "vision_config": SIGLIP} | others,
        (kind, {"size": SQUARE, "min_size": PATCH, **sizes}),
        (processor, {"num_image_tokens": 16}),
        "<image>",
        tuple(BY_TOKENIZER.values()),
        BY_TOKENIZER,
        {"image_token_id": "<image>"},
    )


MORE_SHAPES: dict[str, Shape] = {
    "aya_vision": Shape(
        "AyaVisionForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "cohere2", "sliding_window": 64},
            "vision_config": SIGLIP,
            "downsample_factor": 2,
        },
        ("GotOcr2ImageProcessorPil", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
        ("AyaVisionProcessor", {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2}),
        "<image>",
        ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
        ids={"image_token_index": "<|IMG_PATCH|>"},
    ),
    "idefics2": Shape(
        "Idefics2ForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
        },
        ("Idefics2ImageProcessorPil", {"size": {"shortest_edge": PATCH, "longest_edge": SIDE}}),
        ("Idefics2Processor", {"image_seq_len": 4}),
        "<image>",
        ("<fake_token_around_image>", "<end_of_utterance>"),
        ids={"image_token_id": "<image>"},
    ),
    "glm4v": Shape(
        "Glm4vForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": SECTIONS},
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "depth": 2}
            | {"num_heads": 4, "image_size": 4 * SIDE, "patch_size": PATCH},
        },
        ("Glm4vImageProcessorPil", {"size": AREA, "patch_size": PATCH}),
        ("Glm4vProcessor", {}),
        "<|begin_of_image|><|image|><|end_of_image|>",
        ("<|begin_of_video|>", "<|end_of_video|>"),
        ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
        },
    ),
    "ovis2": Shape(
        "Ovis2ForConditionalGeneration",
        {
            "text_config": QWEN2,
            "vision_config": VISION | {"vocab_size": 64, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
            "hidden_size": 32,
            "vocab_size": 268,  # that of the tokenizer
        },
        ("Ovis2ImageProcessorPil", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
        ("Ovis2Processor", {"image_seq_length": 4}),
        "<image>",
        ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        ids={"image_token_id": "<IMG_ATOM>"},
    ),
    "mllama": Shape(
        "MllamaForConditionalGeneration",
        {
            "text_config": TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_global_layers": 1, "attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
            | {"intermediate_layers_indices": [0], "vision_output_dim": 64, "max_num_tiles": 4},
        },
        ("MllamaImageProcessorPil", {"size": SQUARE, "max_image_tiles": 4}),
        ("MllamaProcessor", {}),
        "<|image|>",
        ("<|python_tag|>",),
        ids={"image_token_index": "<|image|>"},
    ),
    "janus": siglip_of_janus(
        "JanusForConditionalGeneration",
        "JanusImageProcessorPil",
        "JanusProcessor",
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE}
        | {"patch_size": PATCH, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 16},
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32}
        | {"channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32}
        | {"image_token_embed_dim": 32},
    ),
    "deepseek_vl": siglip_of_janus(
        "DeepseekVLForConditionalGeneration", "DeepseekVLImageProcessorPil", "DeepseekVLProcessor"
    ),
    "gemma4": Shape(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "global_head_dim": 8},
            "vision_config": VISION
            | {"num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
            "audio_config": None,
        },
        ("Gemma4ImageProcessorPil", {"patch_size": PATCH, "max_soft_tokens": 70, "pooling_kernel_size": 2}),
        ("Gemma4Processor", {"image_seq_length": 70}),
        "<image>",
        ("<begin>", "<end>", "<|video|>"),
        {**BY_TOKENIZER, "audio_token": "<sound>", "boa_token": "<begin_sound>", "eoa_token": "<end_sound>"},
        {"image_token_id": "<image>", "boi_token_id": "<begin>", "eoi_token_id": "<end>"},
    ),
    "aria": Shape(
        "AriaForConditionalGeneration",
        {
            "text_config": TEXT | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": VISION | {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
            "projector_patch_to_query_dict": {"49": 4},
        },
        ("AriaImageProcessorPil", {"max_image_size": 980}),  # its processor takes 490 and 980 alone
        ("AriaProcessor", {"size_conversion": {"980": 4}}),
        "<image>",
        named={"image_token": "<image>"},
        ids={"image_token_index": "<image>"},
    ),
    "paddleocr_vl": Shape(
        "PaddleOCRVLForConditionalGeneration",
        {"text_config": TEXT | {"rope_parameters": SECTIONS}, "vision_config": VISION},
        ("PaddleOCRVLImageProcessorPil", {"size": AREA, "patch_size": PATCH}),
        ("PaddleOCRVLProcessor", {}),
        "<begin><image><end>",
        ("<begin>", "<end>"),
        {"image_token": "<image>"},
        {
            "image_token_id": "<image>",
            "video_token_id": "<video>",
            "vision_start_token_id": "<begin>",
            "vision_end_token_id": "<end>",
        },
    ),
    "video_llama_3": Shape(
        "VideoLlama3ForConditionalGeneration",
        {"text_config": QWEN2, "vision_config": VISION},
        ("VideoLlama3ImageProcessorPil", {"size": AREA, "patch_size": PATCH}),
        ("VideoLlama3Processor", {}),
        "<image>",
        (),
        {"image_token": "<image>", "video_token": "<video>"},
        {"image_token_id": "<image>", "video_token_id": "<video>"},
    ),
    "blip_2": Shape(
        "Blip2ForConditionalGeneration",
        {
            "text_config": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
            "vision_config": VISION,
            "qformer_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "encoder_hidden_size": 32, "vocab_size": 8},
            "num_query_tokens": 4,
        },
        ("BlipImageProcessorPil", {"size": SQUARE}),
        ("Blip2Processor", {"num_query_tokens": 4}),
        ids={"image_token_index": "<image>"},
    ),
    "vipllava": Shape(
        "VipLlavaForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "vision_feature_layers": [-2, -1],
            "image_seq_length": 16,
        },
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}),
        (
            "LlavaProcessor",
            {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "<image>",
        ids={"image_token_index": "<image>"},
    ),
}
