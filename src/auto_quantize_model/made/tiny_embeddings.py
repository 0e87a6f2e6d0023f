"""The tiny models that embed texts or images, without a head."""

from typing import Any

from auto_quantize_model.made.tiny_encoders import BERT
from auto_quantize_model.made.tiny_parts import SQUARE, TEXT, VISION, Shape

T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def _of_images(architecture: str, config: dict[str, Any], processor: str = "ViTImageProcessorPil") -> Shape:
    return Shape(architecture, config, (processor, {"size": SQUARE, "do_center_crop": False}), words=False)


EMBEDDING_SHAPES: dict[str, Shape] = {
    "bert_embedding": Shape("BertModel", BERT),
    "xlm_roberta_embedding": Shape("XLMRobertaModel", BERT | {"max_position_embeddings": 514}),
    "mpnet_embedding": Shape("MPNetModel", BERT | {"max_position_embeddings": 514}),
    "modernbert_embedding": Shape("ModernBertModel", BERT | {"global_attn_every_n_layers": 2, "local_attention": 16}),
    "nomic_bert_embedding": Shape("NomicBertModel", BERT),
    "t5_encoder": Shape("T5EncoderModel", T5),
    "mistral_embedding": Shape("MistralModel", TEXT),
    "embedding_qwen3": Shape("Qwen3Model", TEXT),
    "gemma3_embedding": Shape("Gemma3TextModel", TEXT | {"use_bidirectional_attention": True, "sliding_window": 64}),
    "clip_text": Shape("CLIPTextModel", BERT | {"max_position_embeddings": 128}),
    "vit_embedding": _of_images("ViTModel", VISION),
    "dinov2_embedding": _of_images("Dinov2Model", VISION, "BitImageProcessorPil"),
    "dinov3_embedding": _of_images("DINOv3ViTModel", VISION | {"num_register_tokens": 2}),
    "siglip_vision": _of_images("SiglipVisionModel", VISION, "SiglipImageProcessorPil"),
    "clip_vision": _of_images("CLIPVisionModel", VISION, "CLIPImageProcessorPil"),
}
