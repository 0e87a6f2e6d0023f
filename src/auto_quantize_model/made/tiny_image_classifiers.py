"""The tiny classifiers of images."""

from typing import Any

from auto_quantize_model.made.tiny_parts import SIDE, SQUARE, VISION, Shape

CLASSES = {"num_labels": 5}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
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
    "resnet": _shape(
        "ResNetForImageClassification",
        {"embedding_size": 16, "layer_type": "basic", **STAGES},
        "ConvNextImageProcessorPil",
        size={"shortest_edge": SIDE},
    ),
}
