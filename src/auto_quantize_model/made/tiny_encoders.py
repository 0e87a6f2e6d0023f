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
    "albert": Shape("AlbertForMaskedLM", BERT | {"embedding_size": 16}),
    "electra": Shape("ElectraForMaskedLM", BERT | {"embedding_size": 16}),
    "nomic_bert": Shape("NomicBertForMaskedLM", BERT),
    "mpnet": Shape("MPNetForMaskedLM", BERT | {"max_position_embeddings": 514}),
}
