"""A backward that would update a weight, and uses it otherwise too, is refused as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import elmo_compile as elmo

L = 300
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 50}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 8), nn.Linear(8, L)
        self.other = nn.Linear(8, L)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.encoder(x)))
        return z


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=make), torch.randint(0, L, (6,), generator=make)


def compiled(model: nn.Module) -> tuple[Any, Any]:
    """The logits, and the loss."""
    logits = torch.compile(model, backend="elmo", options=OPTIONS)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    return logits, torch.compile(loss, backend="elmo", options=OPTIONS)


def two_losses(logits: Any, loss: Any) -> Tensor:
    z = logits(batch()[0])
    return F.cross_entropy(z, batch()[1]) + F.multilabel_soft_margin_loss(z, torch.ones(6, L))


def two_batches(logits: Any, loss: Any) -> Tensor:
    both: Tensor = loss(*batch(0)) + loss(*batch(1))
    return both


def inside_and_outside(logits: Any, loss: Any) -> Tensor:
    both: Tensor = loss(*batch(0)) + F.cross_entropy(logits(batch(1)[0]), batch(1)[1])
    return both


def values(logits: Any, loss: Any) -> Tensor:
    z = logits(batch()[0])
    return F.cross_entropy(z, batch()[1]) + z.sin().mean()


def values_of_another_batch(logits: Any, loss: Any) -> Tensor:
    both: Tensor = logits(batch(1)[0]).sin().mean() + loss(*batch())
    return both


REFUSED: list[Callable[[Any, Any], Tensor]] = [
    two_losses, two_batches, inside_and_outside, values, values_of_another_batch
]  # fmt: skip


@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program.__name__)
def test_refused_before_anything_changes(program: Callable[[Any, Any], Tensor]) -> None:
    model = Net()
    opt = elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    before = copy.deepcopy([model.state_dict(), opt.state_dict()["state"]])
    logits, loss = compiled(model)
    with pytest.raises(elmo.FusedUpdateError, match=r"head\.weight.* nothing was changed"):
        program(logits, loss).backward()
    opt.zero_grad()
    now = [model.state_dict(), opt.state_dict()["state"]]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    # The next step is as if nothing had been.
    twin = Net()
    twin.load_state_dict(before[0])
    reference = torch.optim.SGD(twin.parameters(), 0.5, momentum=0.9)
    loss(*batch(2)).backward()
    F.cross_entropy(twin(batch(2)[0]), batch(2)[1]).backward()
    opt.step()
    reference.step()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program.__name__)
def test_at_the_step_they_are_added_up(program: Callable[[Any, Any], Tensor]) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    opt = elmo.optim.SGD(model.parameters(), 0.5, update_at="step", accumulate="stash")
    reference = torch.optim.SGD(twin.parameters(), 0.5)
    program(*compiled(model)).backward()
    program(twin, lambda x, y: F.cross_entropy(twin(x), y)).backward()
    opt.step()
    reference.step()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other)


def forwards_without_backward(logits: Any, loss: Any) -> list[Any]:
    """What someone still holds is no part of a backward."""
    held = [loss(*batch(1)), logits(batch(1)[0]).sin().sum()]
    loss(*batch()).backward()
    return held


def checkpointed(logits: Any, loss: Any) -> None:
    """Its forward runs again inside the backward."""
    checkpoint(loss, *batch(), use_reentrant=False).backward()


def detached(logits: Any, loss: Any) -> None:
    z = logits(batch()[0])
    (F.cross_entropy(z, batch()[1]) + z.detach().sin().mean()).backward()


@pytest.mark.parametrize("program", [forwards_without_backward, checkpointed, detached])
def test_one_use_is_one_use(program: Callable[[Any, Any], Any]) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    reference = torch.optim.SGD(twin.parameters(), 0.5)
    held = program(*compiled(model))
    F.cross_entropy(twin(batch()[0]), batch()[1]).backward()
    opt.step()
    reference.step()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other)
    del held


def test_losses_of_two_heads_are_two() -> None:
    model = Net()
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    twin = copy.deepcopy(model)
    reference = torch.optim.SGD(twin.parameters(), 0.5)
    _, loss = compiled(model)

    def of_other(model: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.other(torch.tanh(model.encoder(x))), y)

    other: Any = torch.compile(of_other, backend="elmo", options=OPTIONS)
    (loss(*batch()) + other(model, *batch(1))).backward()
    (F.cross_entropy(twin(batch()[0]), batch()[1]) + of_other(twin, *batch(1))).backward()
    opt.step()
    reference.step()
    for mine, expected in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, expected)


def test_a_step_for_each_takes_two_backwards() -> None:
    model = Net()
    opt = elmo.optim.SGD(model.parameters(), 0.5, accumulate="step_each")
    _, loss = compiled(model)
    before = model.head.weight.detach().clone()
    for program, reached in ((values, "values of its logits"), (two_batches, "two losses")):
        with pytest.raises(elmo.FusedUpdateError, match=reached):
            program(*compiled(model)).backward()
        assert torch.equal(before, model.head.weight)
    for seed in (0, 1):
        loss(*batch(seed)).backward()
    opt.step()
    assert not torch.equal(before, model.head.weight)
