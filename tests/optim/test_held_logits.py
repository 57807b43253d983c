"""Cross entropy with a fused update and a budget for its logits: three products, the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import elmo_compile as elmo
from elmo_compile.ops.owners import owner_of

N, D, L = 24, 16, 700


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.head = nn.Linear(D, L)
        elmo.convert_head(self, dtype, name="head")

    def forward(self, x, target):
        return F.cross_entropy(self.head(self.encoder(x)), target, ignore_index=3)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def trained(model, budget, steps: int = 3, wrap=lambda step: step, **how):
    """(losses, the model, the products of the last step)."""
    options = {"min_outputs": 64, "lower": "eager", "chunk_size": 100, "memory_budget": budget}
    step = wrap(torch.compile(model, backend="elmo", options=options))
    optimizer = elmo.optim.SGD(model.parameters(), 0.1, momentum=0.5, **how)
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        x, target = torch.randn(N, D), torch.randint(0, L, (N,))
        with FlopCounterMode(display=False) if i == steps - 1 else torch.enable_grad():
            loss = step(x, target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("how", [{}, {"update_at": "step", "max_norm": 0.5}])
def test_the_same_bits(dtype, how):
    model = Model(dtype if dtype != torch.float32 else torch.bfloat16)
    if dtype == torch.float32:
        elmo.dequantize_head(model)
    twin = copy.deepcopy(model)
    held, optimizer = trained(model, "1MiB", **how)
    assert elmo.last_report().matches[0].products == 3 + bool(how)
    assert any("logits are held" in note for note in elmo.last_report().matches[0].notes)
    assert owner_of(model.head.weight)._held == {}
    torch._dynamo.reset()
    plain, _ = trained(twin, None, **how)
    assert elmo.last_report().matches[0].products == 4 + bool(how)
    assert held == plain
    for one, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    del optimizer


def test_logits_of_a_forward_without_backward_are_let_go():
    model = Model()
    optimizer = elmo.optim.SGD(model.parameters(), 0.1)
    options = {"min_outputs": 64, "lower": "eager", "memory_budget": "4MiB"}
    step = torch.compile(model, backend="elmo", options=options)
    x, target = torch.randn(N, D), torch.randint(0, L, (N,))
    owner = owner_of(model.head.weight)
    first = step(x, target)
    (kept,) = owner._held
    second = step(x, target)
    assert len(owner._held) == 1
    assert kept not in owner._held
    before = model.head.weight.detach().clone()
    first.backward()  # makes its logits again
    assert not torch.equal(model.head.weight.float(), before.float())
    assert owner._held == {}
    optimizer.step()
    with pytest.raises(RuntimeError):
        second.backward()


def test_under_a_checkpoint():
    model = Model()
    twin = copy.deepcopy(model)
    held, _ = trained(
        model, "1MiB", wrap=lambda step: lambda *a: checkpoint(step, *a, use_reentrant=False)
    )
    torch._dynamo.reset()
    plain, _ = trained(twin, None)
    assert held == plain


def test_nothing_is_held_without_gradients():
    model = Model()
    optimizer = elmo.optim.SGD(model.parameters(), 0.1)
    options = {"min_outputs": 64, "lower": "eager", "memory_budget": "4MiB"}
    step = torch.compile(model, backend="elmo", options=options)
    with torch.no_grad():
        step(torch.randn(N, D), torch.randint(0, L, (N,)))
    assert owner_of(model.head.weight)._held == {}
    del optimizer
