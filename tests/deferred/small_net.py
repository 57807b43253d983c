"""A model whose logits are deferred, what a program makes of them, and how results compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elmo_compile.deferred import Deferred

N, L = 6, 500
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 77}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 16), nn.Linear(16, L)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(x).tanh())
        return z


def outcome(
    use: Callable[[Tensor, Tensor], Any], *, compiled: bool, **options: Any
) -> tuple[Any, list[Tensor | None], Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = Net()
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    run = torch.compile(model, backend="elmo", options={**OPTIONS, **options})
    x.requires_grad_()
    z = run(x) if compiled else model(x)
    z.features = x
    result = use(z, y)
    return result, [parameter.grad for parameter in model.parameters()], z


def assert_alike(mine: Any, theirs: Any) -> None:
    assert type(mine) is not Deferred or isinstance(theirs, Tensor)
    if isinstance(theirs, Tensor):
        assert mine.dtype == theirs.dtype
        mine = mine.materialize() if type(mine) is Deferred else mine
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-4, atol=1e-6)
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs):
            assert_alike(one, other)
    else:
        assert mine == theirs or mine == pytest.approx(theirs, rel=1e-4)
