"""The tiny classifiers of images."""

from typing import Any

from auto_quantize_model.made.tiny_parts import SIDE, SQUARE, VISION, Shape

CLASSES = {"num_labels": 5}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
SHORTEST = {"size": {"shortest_edge": SIDE}}
EDGE = {"height": 32, "width": 32}
PYRAMID: dict[str, Any] = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    **STAGES,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def _shape(architecture: str, config: dict[str, Any], processor: str = "ViTImageProcessorPil", **size: Any) -> Shape:
    settings = {"size": SQUARE, "do_center_crop": False} | size
    return Shape(architecture, config | CLASSES, (processor, settings), words=False)


IMAGE_CLASSIFIER_SHAPES: dict[str, Shape] = {
    "vit": _shape("ViTForImageClassification", VISION),
    "deit": _shape("DeiTForImageClassification", VISION, "DeiTImageProcessorPil"),
    "beit": _shape("BeitForImageClassification", VISION, "BeitImageProcessorPil"),
    "dinov2": _shape("Dinov2ForImageClassification", VISION, "BitImageProcessorPil"),
    "siglip": _shape("SiglipForImageClassification", {"vision_config": VISION}, "SiglipImageProcessorPil"),
    "siglip2": _shape(
        "Siglip2ForImageClassification",
        {"vision_config": VISION | {"num_patches": 16}},
        "Siglip2ImageProcessorPil",
        patch_size=7,
        max_num_patches=16,
    ),
    "clip": _shape("CLIPForImageClassification", {"vision_config": VISION}, "CLIPImageProcessorPil"),
    "swin": _shape("SwinForImageClassification", SWIN, size={"height": 32, "width": 32}),
    "swinv2": _shape("Swinv2ForImageClassification", SWIN, size={"height": 32, "width": 32}),
    "convnext": _shape(
        "ConvNextForImageClassification",
        {"image_size": SIDE, "num_stages": 2, **STAGES},
        "ConvNextImageProcessorPil",
        size={"shortest_edge": SIDE},
    ),
    "convnextv2": _shape(
        "ConvNextV2ForImageClassification",
        {"image_size": SIDE, "num_stages": 2, **STAGES},
        "ConvNextImageProcessorPil",
        **SHORTEST,
    ),
    "dinov2_with_registers": _shape("Dinov2WithRegistersForImageClassification", VISION, "BitImageProcessorPil"),
    "metaclip_2": _shape("MetaClip2ForImageClassification", {"vision_config": VISION}, "CLIPImageProcessorPil"),
    "ijepa": _shape("IJepaForImageClassification", VISION),
    "data2vec_vision": _shape("Data2VecVisionForImageClassification", VISION, "BeitImageProcessorPil"),
    "vit_msn": _shape("ViTMSNForImageClassification", VISION),
    "donut_swin": _shape("DonutSwinForImageClassification", SWIN, size=EDGE),
    "focalnet": _shape(
        "FocalNetForImageClassification",
        {"image_size": 32, "embed_dim": 16, "focal_levels": [2, 2], "focal_windows": [3, 3], **STAGES},
        "BitImageProcessorPil",
        size=EDGE,
    ),
    "hiera": _shape(
        "HieraForImageClassification",
        {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
        | {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False]},
        "BitImageProcessorPil",
        size=EDGE,
    ),
    "segformer": _shape(
        "SegformerForImageClassification", PYRAMID | {"sr_ratios": [4, 1]}, "SegformerImageProcessorPil", size=EDGE
    ),
    "pvt": _shape(
        "PvtForImageClassification", PYRAMID | {"patch_sizes": [4, 2], "sequence_reduction_ratios": [4, 1]}, size=EDGE
    ),
    "pvt_v2": _shape("PvtV2ForImageClassification", PYRAMID | {"sr_ratios": [4, 1]}, size=EDGE),
    "poolformer": _shape(
        "PoolFormerForImageClassification",
        PYRAMID | {"padding": [2, 1]},
        "PoolFormerImageProcessorPil",
        size={"shortest_edge": 32},
    ),
    "levit": _shape(
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
        | {"key_dim": [16, 16, 16]},
        "LevitImageProcessorPil",
        size={"height": 64, "width": 64},
    ),
    "mobilevit": _shape(
        "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 32, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32]}
        | {"num_attention_heads": 2},
        "MobileViTImageProcessorPil",
        size={"height": 64, "width": 64},
    ),
    "bit": _shape(
        "BitForImageClassification",
        {"embedding_size": 16, "num_groups": 4, "depths": [1, 1], "hidden_sizes": [32, 64]},
        "BitImageProcessorPil",
    ),
    "regnet": _shape(
        "RegNetForImageClassification",
        {"embedding_size": 16, "groups_width": 8, **STAGES},
        "ConvNextImageProcessorPil",
        **SHORTEST,
    ),
    "resnet": _shape(
        "ResNetForImageClassification",
        {"embedding_size": 16, "layer_type": "basic", **STAGES},
        "ConvNextImageProcessorPil",
        size={"shortest_edge": SIDE},
    ),
}
