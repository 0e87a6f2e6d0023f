"""An Embedding that takes a share for each row, as that of Ovis2's images does, is not made plain."""

import torch
from tiny_models import loaded

from auto_quantize_model.models.prepare import takes_shares


def test_an_embedding_of_shares_stays_as_it_is() -> None:
    model = loaded("ovis2")[0]
    table = model.get_submodule("model.visual_embeddings_table")
    assert type(table).__name__ == "Ovis2VisualEmbeddingTable" and takes_shares(table)
    assert not takes_shares(torch.nn.Embedding(4, 3)) and not takes_shares(torch.nn.Linear(3, 4))
