"""Heads as models have them: tied, computed, frozen, several, applied twice. As eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import elmo_compile as elmo
from elmo_compile.report import store

N, D, L = 6, 16, 203
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 77}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, D)
        self.head = nn.Linear(D, L)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))


class Tied(Base):
    """Scaled embeddings, and their transpose as the head: T5, Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(L, D)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.features(x) + self.embed(y.flip(0)) * D**0.5
        return F.cross_entropy(self.head(h * D**-0.5), y)


class Cast(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.features(x).bfloat16()
        return F.cross_entropy((h @ self.head.weight.bfloat16().t()).float(), y)


class Stored(Base):
    """The weight is stored [D, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(D, L) / 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.features(x) @ self.kernel, y)


class Scaled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(L, 1) + 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(self.features(x), self.head.weight * self.scale), y)


class Normalised(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.normalize(self.features(x), dim=-1)
        return F.cross_entropy(10 * h @ F.normalize(self.head.weight, dim=-1).t(), y)


class WeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.features(x)), y)


class Lora(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)
        self.a = nn.Linear(D, 2, bias=False)
        self.b = nn.Linear(2, L, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.features(x)
        return F.cross_entropy(self.head(h) + 0.5 * self.b(self.a(h)), y)


class Bottleneck(Base):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(D, 4)
        self.head = nn.Linear(4, L)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.narrow(self.features(x))), y)


class TwoHeads(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(D, 150)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.features(x)
        first = F.cross_entropy(self.head(h), y)
        return first + 0.3 * F.binary_cross_entropy_with_logits(
            self.other(h), elmo.multi_hot(y[:, None] % 150, 150)
        )


class Twice(Base):
    """One head on two sets of features, as in multi-token prediction."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = F.cross_entropy(self.head(self.features(x)), y)
        return first + F.cross_entropy(self.head(self.features(x * 2)), y.flip(0))


class Plain(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.features(x)), y)


class FrozenHead(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


class FrozenEncoder(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.requires_grad_(False)


class Checkpointed(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = checkpoint(
            lambda h: F.cross_entropy(self.head(h), y), self.features(x), use_reentrant=False
        )
        return loss


class Breaks(Base):
    """Graph breaks before the head and after the loss."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.features(x)
        torch._dynamo.graph_break()
        loss = F.cross_entropy(self.head(h), y)
        torch._dynamo.graph_break()
        return loss * 2


class LossHead(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h), y)


class CompiledAlone(Base):
    """Only the submodule with the head is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LossHead(self.head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(self.features(x), y)


MODELS: dict[type[Base], int] = {
    Tied: 1, Cast: 1, Stored: 1, Scaled: 1, Normalised: 1, WeightNorm: 1, Lora: 1,
    Bottleneck: 1, TwoHeads: 2, Twice: 2, FrozenHead: 1, FrozenEncoder: 1, Checkpointed: 1,
    Breaks: 1,
}  # fmt: skip
"""How many heads are rewritten."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    store.clear()
    torch.manual_seed(0)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(0, L, (N,))


def assert_alike(mine: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    for (name, one), other in zip(mine.named_parameters(), theirs.named_parameters()):
        assert (one.grad is None) == (other[1].grad is None), name
        if one.grad is not None and other[1].grad is not None:
            error = (one.grad - other[1].grad).norm()
            assert error <= tolerance * other[1].grad.norm() + 1e-7, name


def losses_of(step: Callable[..., Tensor], plain: nn.Module, given: tuple[Tensor, ...]) -> None:
    mine, theirs = step(*given), plain(*given)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine.backward()
    theirs.backward()


@pytest.mark.parametrize("kind", list(MODELS), ids=lambda kind: kind.__name__)
def test_head(kind: type[Base]) -> None:
    model = kind()
    plain, given = copy.deepcopy(model), batch()
    step: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    losses_of(step, plain, given)
    found = [match for report in elmo.reports() for match in report.matches]
    assert len(found) == MODELS[kind], str(elmo.last_report())
    assert_alike(model, plain, 2e-2 if kind is Cast else 1e-4)


def test_a_submodule_compiled_alone() -> None:
    model = CompiledAlone()
    plain, given = copy.deepcopy(model), batch()
    model.inner.compile(backend="elmo", options=OPTIONS)
    losses_of(model, plain, given)
    assert len(elmo.last_report().matches) == 1
    assert_alike(model, plain)


@pytest.mark.parametrize(
    "kind", [Tied, Stored, Scaled, Twice, Lora], ids=lambda kind: kind.__name__
)
def test_what_cannot_be_fused_is_trained_by_its_gradient(kind: type[Base]) -> None:
    model = kind()
    plain, given = copy.deepcopy(model), batch()
    mine = elmo.optim.SGD(model.parameters(), lr=0.5)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.5)
    step: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    for _ in range(2):
        losses_of(step, plain, given)
        for opt in (mine, theirs):
            opt.step()
            opt.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_makes_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from elmo_compile.kernels import aten

    asked: list[bool] = []
    backward = aten.backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["need_dw"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(aten, "backward", counted)
    step: Any = torch.compile(FrozenHead(), backend="elmo", options=OPTIONS)
    step(*batch()).backward()
    assert asked == [False]


def test_under_autocast_and_no_grad() -> None:
    model = Plain()
    step: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    given = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(step(*given), model(*given), rtol=2e-2, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(step(*given), model(*given))
    assert all(report.matches for report in elmo.reports())
