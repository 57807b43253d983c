"""The backend adds no guards: as many graphs as any other backend, whatever is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import elmo_compile as elmo

L = 203
OPTIONS = {"lower": "eager", "min_outputs": 64}


class Net(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.encoder, self.head = use, nn.Linear(5, 8), nn.Linear(8, L)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.head(torch.tanh(self.encoder(x)))
        if self.use == "logits":
            return z
        smoothing = 0.1 if self.use == "program" else 0.0
        return F.cross_entropy(z, y, label_smoothing=smoothing)


def graphs(use: str, dynamic: bool | None, backend: str, **how: Any) -> int:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model: Any = Net(use)
    step = torch.compile(model, backend=backend, dynamic=dynamic, **how)
    optimizer = elmo.optim.SGD(model.parameters(), 0.1, fused=backend == "elmo" and use == "loss")
    for rows in (4, 4, 6, 9, 4, 12, 1):
        out = step(torch.randn(rows, 5), torch.randint(0, L, (rows,)))
        if use != "logits":
            out.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        step(torch.randn(4, 5), torch.randint(0, L, (4,)))
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("use", ["loss", "program", "logits"])
def test_as_many_graphs_as_any_backend(use: str, dynamic: bool | None) -> None:
    assert graphs(use, dynamic, "elmo", options=OPTIONS) == graphs(use, dynamic, "eager")
