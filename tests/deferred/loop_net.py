"""A model that a user's own loop trains, and its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elmo_compile.report import store

ROWS, L = 12, 300
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 50}


class Net(nn.Module):
    def __init__(self, outputs: int = L) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.encoder(x)))
        return z


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(3)
    return [
        (torch.randn(ROWS, 5, generator=make), torch.randint(0, L, (ROWS,), generator=make))
        for _ in range(count)
    ]


def fresh(model: nn.Module) -> Any:
    torch._dynamo.reset()
    store.clear()
    return model
