"""A loss without a rule in a model: metrics beside it, fused updates, frozen parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import D, L, N, classes, compiled, features, matches, refusals, rows, weight

import elmo_compile as elmo

ce = F.cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def metrics(x, w, y):
    z = F.linear(x, w)
    p = z.log_softmax(-1)
    top = z.topk(5)
    return (
        ce(z, y, label_smoothing=0.1),
        (z.argmax(-1) == y).float().mean(),
        (top.indices == y[:, None]).any(-1),
        top.values,
        -(p.exp() * p).sum(-1),
        p.gather(1, y[:, None]),
        z.max(-1).values,
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_metrics_go_along(dynamic):
    args = rows()
    expected = metrics(*args)
    got = compiled(metrics, dynamic=dynamic)(*args)
    assert len(matches()) == 1, refusals()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    got[0].backward()
    ours = args[1].grad.clone()
    args[1].grad = None
    expected[0].backward()
    torch.testing.assert_close(ours, args[1].grad, rtol=1e-5, atol=1e-6)


def test_top_k_alone():
    args = (features(), weight())
    with torch.no_grad():
        got = compiled(lambda x, w: torch.sigmoid(F.linear(x, w)).topk(7))(*args)
        expected = torch.sigmoid(F.linear(*args)).topk(7)
    (match,) = matches()
    assert match.loss == "topk"
    torch.testing.assert_close(got.values, expected.values)
    assert torch.equal(got.indices, expected.indices)


class Model(torch.nn.Module):
    """An encoder and a head under a loss that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = torch.nn.Linear(D, D), torch.nn.Linear(D, L)

    def forward(self, x, y):
        z = self.head(torch.relu(self.encoder(x)))
        return ce(z, y, label_smoothing=0.1) + 1e-3 * (z.logsumexp(-1) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fused_update_equals_unfused(dtype):
    """The same stored weights, but for single steps of the grid where float32 sums differ."""
    made = []
    for fused in (True, False):
        torch.manual_seed(1)
        model = Model()
        if dtype != torch.float32:
            elmo.convert_head(model, dtype=dtype)
        optimizer = elmo.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        step = compiled(model)
        for _ in range(3):
            step(torch.randn(N, D), classes()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {match.fused_update for match in matches()} == {fused}
        made.append(model)
    ours, theirs = (m.head.weight.detach().float() for m in made)
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.01
    torch.testing.assert_close(ours, theirs, rtol=0.13, atol=2**-7)
    torch.testing.assert_close(made[0].encoder.weight, made[1].encoder.weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(made[0].head.bias, made[1].head.bias, rtol=1e-3, atol=1e-4)


def test_updates_are_counted_once():
    model = Model()
    optimizer = elmo.optim.SGD(model.parameters(), lr=0.5)
    step, x, y = compiled(model), torch.randn(N, D), classes()
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        step(x, y)
    torch.autograd.grad(step(x, y), model.encoder.weight)
    assert torch.equal(before, model.head.weight)
    step(x, y).backward()
    assert not torch.equal(before, model.head.weight)
    assert model.head.weight.grad is None
    with pytest.raises(elmo.ElmoError, match=r"opt\.step"):
        step(x, y).backward()
    optimizer.step()


@pytest.mark.parametrize("frozen", ["head", "encoder"])
def test_frozen(frozen):
    model = Model()
    getattr(model, frozen).requires_grad_(False)
    x, y = torch.randn(N, D), classes()
    compiled(model)(x, y).backward()
    ours = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, y).backward()
    for mine, p in zip(ours, model.parameters()):
        assert (mine is None) == (p.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)
