"""The tiny encoders of text."""

from typing import Any

from auto_quantize_model.made.tiny_parts import Shape

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
CLASSES = {"num_labels": 5}

ENCODER_SHAPES: dict[str, Shape] = {
    "bert": Shape("BertForMaskedLM", BERT),
    "bert_classifier": Shape("BertForSequenceClassification", BERT | CLASSES),
    "roberta_classifier": Shape("RobertaForSequenceClassification", BERT | CLASSES | {"max_position_embeddings": 514}),
    "xlm_roberta": Shape("XLMRobertaForMaskedLM", BERT | {"max_position_embeddings": 514}),
    "distilbert_tokens": Shape(
        "DistilBertForTokenClassification", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} | CLASSES
    ),
    "modernbert": Shape("ModernBertForMaskedLM", BERT | {"global_attn_every_n_layers": 2, "local_attention": 16}),
    "modernbert_classifier": Shape("ModernBertForSequenceClassification", BERT | CLASSES | {"local_attention": 16}),
    "deberta_v2_classifier": Shape(
        "DebertaV2ForSequenceClassification",
        BERT | CLASSES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "deberta": Shape("DebertaForMaskedLM", BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "eurobert": Shape("EuroBertForMaskedLM", BERT | {"num_key_value_heads": 2}),
    "gte": Shape("GteForMaskedLM", BERT),
    "jina_embeddings_v3": Shape("JinaEmbeddingsV3ForMaskedLM", BERT),
    "ultrabert": Shape("UltrabertForMaskedLM", BERT | {"local_attention": 16}),
    "neomme": Shape("NeoMMEForMaskedLM", BERT),
    "esm": Shape("EsmForMaskedLM", BERT | {"position_embedding_type": "rotary"}),
    "longformer": Shape("LongformerForMaskedLM", BERT | {"attention_window": [16, 16], "max_position_embeddings": 514}),
    "luke": Shape(
        "LukeForMaskedLM", BERT | {"entity_vocab_size": 8, "entity_emb_size": 16} | {"max_position_embeddings": 514}
    ),
    "funnel": Shape(
        "FunnelForMaskedLM",
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    ),
    "convbert": Shape("ConvBertForMaskedLM", BERT | {"embedding_size": 32, "conv_kernel_size": 3}),
    "squeezebert": Shape("SqueezeBertForMaskedLM", BERT | {"embedding_size": 32}),
    "mobilebert_classifier": Shape(
        "MobileBertForSequenceClassification",
        BERT | CLASSES | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    ),
    "xlm_classifier": Shape("XLMForSequenceClassification", {"emb_dim": 32, "n_layers": 2, "n_heads": 4} | CLASSES),
    "llama_tokens": Shape("LlamaForTokenClassification", BERT | CLASSES | {"num_key_value_heads": 2}),
    "albert": Shape("AlbertForMaskedLM", BERT | {"embedding_size": 16}),
    "electra": Shape("ElectraForMaskedLM", BERT | {"embedding_size": 16}),
    "nomic_bert": Shape("NomicBertForMaskedLM", BERT),
    "mpnet": Shape("MPNetForMaskedLM", BERT | {"max_position_embeddings": 514}),
}
