"""A weight that is also an embedding, with the loss outside of the compiled function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import OPTIONS, L
from torch import Tensor, nn

import elmo_compile as elmo


class TiedItems(nn.Module):
    """A recommender whose items are embeddings and outputs; the loss is outside."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.mix = nn.Embedding(L, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.mix(self.items(x).mean(1)).tanh(), self.items.weight)


@pytest.mark.filterwarnings("ignore:.*no head's update was fused")
@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_tied_weight_is_not_updated_by_a_loss_outside(update_at: str) -> None:
    """In backward it would be half an update; nothing of the other half is lost."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = TiedItems()
    twin = copy.deepcopy(model)
    opt = elmo.optim.SGD(model.parameters(), lr=0.1, update_at=update_at)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    run = torch.compile(model, backend="elmo", options={**OPTIONS, "deferred_logits": True})
    for _ in range(3):
        x, y = torch.randint(L, (6, 4)), torch.randint(L, (6,))
        z = run(x)
        F.cross_entropy(z, y).backward()
        F.cross_entropy(twin(x), y).backward()
        for optimizer in (opt, plain):
            optimizer.step()
            optimizer.zero_grad()
        assert z._state.values is None
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
