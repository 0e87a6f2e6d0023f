"""The tiny encoder-decoders of text."""

from typing import Any

from auto_quantize_model.made.tiny_parts import TEXT, Shape

START = {"decoder_start_token_id": "</s>"}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    "max_position_embeddings": 512,
}
GEMMA: dict[str, Any] = TEXT | {"sliding_window": 64, "vocab_size": 262, "bos_token_id": 256, "eos_token_id": 257}

ENCODER_DECODER_SHAPES: dict[str, Shape] = {
    "t5": Shape("T5ForConditionalGeneration", T5, ids=START),
    "t5_gated": Shape("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, ids=START),
    "bart": Shape("BartForConditionalGeneration", BART, ids=START),
    "marian": Shape("MarianMTModel", BART, ids=START),
    "pegasus": Shape("PegasusForConditionalGeneration", BART, ids=START),
    "m2m_100": Shape("M2M100ForConditionalGeneration", BART, ids=START),
    "mbart": Shape("MBartForConditionalGeneration", BART, ids=START),
    "mvp": Shape("MvpForConditionalGeneration", BART, ids=START),
    "plbart": Shape("PLBartForConditionalGeneration", BART, ids=START),
    "blenderbot": Shape("BlenderbotForConditionalGeneration", BART, ids=START),
    "led": Shape(
        "LEDForConditionalGeneration",
        BART | {"attention_window": 16, "max_encoder_position_embeddings": 512, "max_decoder_position_embeddings": 512},
        ids=START,
    ),
    "bigbird_pegasus": Shape("BigBirdPegasusForConditionalGeneration", BART, ids=START),
    "pegasus_x": Shape(
        "PegasusXForConditionalGeneration", BART | {"block_size": 16, "num_global_tokens": 4}, ids=START
    ),
    "nllb_moe": Shape(
        "NllbMoeForConditionalGeneration",
        BART | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        ids=START,
    ),
    "mt5": Shape("MT5ForConditionalGeneration", T5, ids=START),
    "umt5": Shape("UMT5ForConditionalGeneration", T5, ids=START),
    "longt5": Shape("LongT5ForConditionalGeneration", T5 | {"local_radius": 8, "global_block_size": 4}, ids=START),
    "switch_transformers": Shape(
        "SwitchTransformersForConditionalGeneration",
        T5
        | {"num_decoder_layers": 2, "num_experts": 4}
        | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ids=START,
    ),
    "t5gemma": Shape("T5GemmaForConditionalGeneration", {"encoder": GEMMA, "decoder": GEMMA}),
}
