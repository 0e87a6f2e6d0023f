"""What makes tests quick that have INC plan and measure: a model of seven ops, and plans without INC's own check.

INC's time grows with the parts that FX traces. As in a transformer, FX cannot trace the whole: INC converts two parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

VOCABULARY = 61
WIDTH = 16


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(torch.nn.functional.silu(self.up(hidden)))
        return out


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.project = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.project(hidden)
        return out


class FewOps(torch.nn.Module):
    """In: `input_ids` (samples, tokens). Out: `logits` (samples, tokens, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids)))  # FX traces no function that returns this


def few_ops_model() -> FewOps:
    """No op weighs much more than another with 7 bits of activation, so INC adds its second pass to the first."""
    torch.manual_seed(11)
    model = FewOps().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 2
    return model


def token_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one sample of 24 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, VOCABULARY, (1, 24), generator=generator)} for _ in range(count)]


@contextmanager
def plans_unchecked() -> Iterator[None]:
    """Plans say that INC can measure, and INC does not convert the model twice to find out."""
    from auto_quantize_model.inc import plan as planning  # the model above needs no INC

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "check_inc", lambda *_: ({"status": "reproduces_fp32"}, {}))
        yield
