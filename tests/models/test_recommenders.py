"""Recommenders as they are written: SASRec and two towers, a softmax over all items."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.report import store

ITEMS = 40_000
OPTIONS = {"lower": "eager"}


class SASRec(nn.Module):
    """Self-attention over a history; the scores are products with the item embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, 32, padding_idx=0)
        self.places = nn.Embedding(10, 32)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, history: Tensor, following: Tensor) -> Tensor:
        length = history.shape[1]
        x = self.items(history) * 32**0.5 + self.places(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        h = self.block(x, src_mask=mask, is_causal=True)
        scores = h @ self.items.weight.t()
        return F.cross_entropy(scores.view(-1, ITEMS), following.view(-1), ignore_index=0)


class TwoTowers(nn.Module):
    """Cosine scores with a temperature, a popularity correction, and label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.EmbeddingBag(500, 32)
        self.items = nn.Parameter(torch.randn(ITEMS, 32))
        self.register_buffer("log_popularity", torch.rand(ITEMS).log())

    def forward(self, history: Tensor, chosen: Tensor) -> Tensor:
        user = F.normalize(self.users(history), dim=-1)
        item = F.normalize(self.items, dim=-1)
        scores = user @ item.t() / 0.05 - self.log_popularity
        return F.cross_entropy(scores, chosen, label_smoothing=0.1)


CASES: dict[str, Any] = {
    "sasrec": (SASRec, lambda: (torch.randint(1, ITEMS, (3, 8)), torch.randint(0, ITEMS, (3, 8)))),
    "two_towers": (
        TwoTowers,
        lambda: (torch.randint(0, 500, (5, 6)), torch.randint(0, ITEMS, (5,))),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_recommender(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    store.clear()
    make, batch = CASES[name]
    model, given = make(), batch()
    twin = copy.deepcopy(model)
    expected = twin(*given)
    expected.backward()
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    loss = run(*given)
    loss.backward()
    assert [match.loss for match in elmo.last_report().matches] == ["cross_entropy"], str(
        elmo.last_report()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (label, one), other in zip(model.named_parameters(), twin.parameters()):
        error = (one.grad - other.grad).norm()
        assert error <= 1e-4 * other.grad.norm(), label
