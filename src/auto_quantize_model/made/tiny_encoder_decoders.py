"""The tiny encoder-decoders of text."""

from typing import Any

from auto_quantize_model.made.tiny_parts import Shape

START = {"decoder_start_token_id": "</s>"}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    "max_position_embeddings": 512,
}

ENCODER_DECODER_SHAPES: dict[str, Shape] = {
    "t5": Shape("T5ForConditionalGeneration", T5, ids=START),
    "t5_gated": Shape("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, ids=START),
    "bart": Shape("BartForConditionalGeneration", BART, ids=START),
    "marian": Shape("MarianMTModel", BART, ids=START),
    "pegasus": Shape("PegasusForConditionalGeneration", BART, ids=START),
    "m2m_100": Shape("M2M100ForConditionalGeneration", BART, ids=START),
}
