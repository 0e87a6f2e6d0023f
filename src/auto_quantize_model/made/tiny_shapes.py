"""All tiny models, by name."""

from auto_quantize_model.made.tiny_embeddings import EMBEDDING_SHAPES
from auto_quantize_model.made.tiny_encoder_decoders import ENCODER_DECODER_SHAPES
from auto_quantize_model.made.tiny_encoders import ENCODER_SHAPES
from auto_quantize_model.made.tiny_image_classifiers import IMAGE_CLASSIFIER_SHAPES
from auto_quantize_model.made.tiny_image_text import IMAGE_TEXT_SHAPES
from auto_quantize_model.made.tiny_more import MORE_SHAPES
from auto_quantize_model.made.tiny_others import OTHER_SHAPES
from auto_quantize_model.made.tiny_parts import Shape

__all__ = ["SHAPES", "Shape"]

SHAPES: dict[str, Shape] = {
    **IMAGE_TEXT_SHAPES,
    **MORE_SHAPES,
    **OTHER_SHAPES,
    **ENCODER_SHAPES,
    **EMBEDDING_SHAPES,
    **IMAGE_CLASSIFIER_SHAPES,
    **ENCODER_DECODER_SHAPES,
}
