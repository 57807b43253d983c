"""`compute_dtype=float8_e4m3fn`: the program on rounded features, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.errors import NotRewritten
from elmo_compile.numerics.features import FP8, round_features
from elmo_compile.report import store

N, D, L = 12, 24, 200


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    store.clear()


class Rounded(torch.autograd.Function):
    """Features rounded; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_features(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Model(nn.Module):
    def __init__(self, loss: str, *, rounds: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.head = nn.Linear(D, L)
        self.loss, self.rounds = loss, rounds

    def features(self, x):
        h = torch.tanh(self.encoder(x))
        return Rounded.apply(h) if self.rounds else h

    def forward(self, h, target):
        z = self.head(h)
        if self.loss == "ce":
            return F.cross_entropy(z, target)
        if self.loss == "hinge":  # a loss by the general mechanism
            y = 2 * F.one_hot(target, L).to(z.dtype) - 1
            return F.relu(1 - y * z).square().sum()
        y = elmo.multi_hot(target[:, None], L)
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")


def models(loss: str) -> tuple[Model, Model]:
    """(plain, one that rounds its features itself), with the same fp8 head."""
    plain = Model(loss)
    elmo.convert_head(plain, dtype=FP8, name="head")
    twin = copy.deepcopy(plain)
    twin.rounds = True
    return plain, twin


def compiled(model: Model, **options: Any) -> Any:
    return torch.compile(
        model, backend="elmo", options={"min_outputs": 64, "lower": "eager", **options}
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=make), torch.randint(0, L, (N,), generator=make)


def train(model: Model, opt: Any, steps: int = 3, **options: Any) -> list[Tensor]:
    """Losses and, at the end, everything that is trained."""
    step, seen = compiled(model, **options), []
    for seed in range(steps):
        x, target = batch(seed)
        loss = step(model.features(x), target)
        loss.backward()
        opt.step()
        opt.zero_grad()
        seen.append(loss.detach().clone())
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def bits(t: Tensor) -> Tensor:
    """Comparable whatever the dtype."""
    return t.detach().reshape(-1).view(torch.uint8)


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize("loss", ["bce", "ce", "hinge"])
def test_fused_training_is_that_on_rounded_features(loss: str, update_at: str) -> None:
    plain, twin = models(loss)
    found, expected = (
        train(m, elmo.optim.SGD(m.parameters(), lr=0.05, update_at=update_at), **options)
        for m, options in ((plain, {"compute_dtype": FP8}), (twin, {}))
    )
    same(found, expected)
    other = copy.deepcopy(models(loss)[0])
    torch._dynamo.reset()
    unrounded = train(other, elmo.optim.SGD(other.parameters(), lr=0.05, update_at=update_at))
    assert not torch.equal(unrounded[-1], found[-1])


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_a_real_gradient_is_that_at_the_rounded_features(loss: str) -> None:
    gradients = []
    for model, options in zip(models(loss), ({"compute_dtype": "float8_e4m3fn"}, {})):
        x, target = batch(0)
        compiled(model, **options)(model.features(x), target).backward()
        gradients.append([p.grad for p in model.parameters()])
        torch._dynamo.reset()
    same(*gradients)


def test_the_report_says_so() -> None:
    plain, _ = models("ce")
    x, target = batch(0)
    compiled(plain, compute_dtype=FP8)(plain.features(x), target)
    (match,) = elmo.last_report().matches
    assert match.compute_dtype == FP8
    assert any("features are rounded to float8_e4m3fn" in note for note in match.notes)


def test_a_head_that_is_not_stored_so_is_refused() -> None:
    model = Model("ce")
    x, target = batch(0)
    with pytest.raises(NotRewritten, match=r"float8_e4m3fn with a weight stored in torch.float32"):
        compiled(model, compute_dtype=FP8, strict=True)(model.features(x), target)
    torch._dynamo.reset()
    loss = compiled(model, compute_dtype=FP8)(model.features(x), target)
    torch.testing.assert_close(loss, model(model.features(x), target))
    (refusal,) = elmo.last_report().refusals
    assert "convert_head" in refusal.remedy


def test_features_that_are_not_finite_stop_the_update() -> None:
    plain, _ = models("bce")
    opt = elmo.optim.SGD(plain.parameters(), lr=0.05)
    before = plain.head.weight.detach().clone()
    x, target = batch(0)
    h = plain.features(x).detach()
    h[3, 3] = float("inf")
    loss = compiled(plain, compute_dtype=FP8)(h, target)
    with pytest.raises(elmo.errors.InputError, match="NaN or infinity"):
        loss.backward()
    assert torch.equal(bits(before), bits(plain.head.weight))
    del opt
