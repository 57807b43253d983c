"""A small classifier and the ways of training it that the tests compare."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo

EAGER = {"min_outputs": 32, "chunk_size": 16, "lower": "eager"}
INDUCTOR = {"min_outputs": 32, "chunk_size": 16}
LABELS, FEATURES, ROWS = 48, 8, 6
EXACT_LABELS, EXACT_FEATURES, EXACT_ROWS = 320, 16, 12


class Net(nn.Module):
    """encoder -> head -> loss; `kind` is "ce" or "bce"."""

    def __init__(self, kind: str = "ce", *, bias: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.kind, self.reduction = kind, reduction
        self.encoder = nn.Linear(5, FEATURES)
        self.head = nn.Linear(FEATURES, LABELS, bias=bias)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(inputs)
        if self.kind == "ce":
            return F.cross_entropy(logits, labels, reduction=self.reduction)
        y = elmo.multi_hot(labels[:, None], LABELS)
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction=self.reduction)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """[N, LABELS]."""
        z: Tensor = self.head(torch.tanh(self.encoder(inputs)))
        return z


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, *, alias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(LABELS, 8)
        self.head = nn.Linear(8, LABELS, bias=False)
        weight = self.embed.weight
        self.head.weight = nn.Parameter(weight.data) if alias else weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embed(tokens)), labels)


def net(kind: str = "ce", seed: int = 0, **kwargs: Any) -> Net:
    """A Net with weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(kind, **kwargs)


def batch(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(inputs [N, 5], labels [N])."""
    make = torch.Generator().manual_seed(100 + seed)
    inputs = torch.randn(rows, 5, generator=make)
    return inputs, torch.randint(0, LABELS, (rows,), generator=make)


def compiled(model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """The model under the elmo backend, nothing left over from other tests."""
    torch._dynamo.reset()
    return torch.compile(model, backend="elmo", options={**(options or EAGER), **more})


def owned(
    model: nn.Module, options: dict[str, Any] | None = None, lr: float = 0.5, **hyper: Any
) -> tuple[Any, elmo.optim.SGD]:
    """(compiled model, the optimizer that owns its head)."""
    return compiled(model, options), elmo.optim.SGD(model.parameters(), lr, **hyper)


def reference(model: nn.Module, steps: int, lr: float = 0.5, **hyper: Any) -> nn.Module:
    """A copy of the model after eager steps of torch.optim.SGD on batches 0, 1, ..."""
    twin = copy.deepcopy(model)
    opt = torch.optim.SGD(twin.parameters(), lr, **hyper)
    for i in range(steps):
        opt.zero_grad()
        twin(*batch(i)).backward()
        opt.step()
    return twin


def train(step: Any, opt: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    """The ordinary loop on batches start, start + 1, ...; returns the losses."""
    losses = []
    for i in range(start, start + steps):
        loss = step(*batch(i))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def updates(opt: torch.optim.Optimizer, weight: Tensor) -> int:
    """How many updates the optimizer's state says the weight has had."""
    return int(opt.state.get(weight, {}).get("step", 0))


def assert_same(model: nn.Module, twin: nn.Module, tolerance: float = 2e-6) -> None:
    """Every parameter of two models is equal but for the order of float32 sums."""
    wanted = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.detach(),
            wanted[name].detach(),
            rtol=1e-5,
            atol=tolerance,
            msg=lambda m, n=name: n + m,
        )


class Saturated(nn.Module):
    """A head whose sigmoids are exactly 0 or 1, so that its weight gradient is exact integers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        shape = (EXACT_LABELS, EXACT_FEATURES)
        self.head = nn.Linear(EXACT_FEATURES, EXACT_LABELS, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randint(-2, 3, shape, generator=make) * 2.0**-3)
            signs = torch.randint(0, 2, (EXACT_LABELS,), generator=make) * 2.0 - 1.0
            self.head.weight[:, 0] = signs
        elmo.convert_head(self, dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.head(x), y, reduction="sum")


def integers(seed: int) -> tuple[Tensor, Tensor]:
    """Integer features with a large first column, and dense targets, for `Saturated`."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (EXACT_ROWS, EXACT_FEATURES), generator=make).float()
    x[:, 0] = 240.0 * (2 * torch.randint(0, 2, (EXACT_ROWS,), generator=make) - 1)
    return x, torch.randint(0, 2, (EXACT_ROWS, EXACT_LABELS), generator=make).float()
