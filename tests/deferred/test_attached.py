"""Whose gradient a loss of deferred logits gives: that of the graph the tensor is in."""

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
from elmo_compile.deferred import Deferred

N, D, L = 6, 16, 203
OPTIONS = {"lower": "eager", "min_outputs": 64}
Run = Callable[[Tensor], Tensor]


def net() -> nn.Sequential:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, D), nn.Linear(D, L))


def compiled(model: Any) -> Run:
    run: Run = torch.compile(model, backend="elmo", options=OPTIONS)
    return run


def data() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    return torch.randn(N, 8, generator=make), torch.randint(0, L, (N,), generator=make)


def leaf_by_method(run: Run, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = run(x)
    return z.requires_grad_()


def leaf_by_attribute(run: Run, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = run(x)
    z.requires_grad = True
    return z


def leaf_by_detach(run: Run, x: Tensor) -> Tensor:
    return run(x).detach_().requires_grad_()


def cast_of_a_leaf(run: Run, x: Tensor) -> Tensor:
    z = leaf_by_method(run, x)
    z.kept = z.double()  # type: ignore[attr-defined]
    return z


def from_a_function(run: Run, x: Tensor) -> Tensor:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return run(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0][:, :8] * 3

    z: Tensor = Straight.apply(x)  # type: ignore[no-untyped-call]
    return z


def from_a_checkpoint(run: Run, x: Tensor) -> Tensor:
    z: Tensor = checkpoint(run, x, use_reentrant=True)
    return z


WAYS = [leaf_by_method, leaf_by_attribute, leaf_by_detach, cast_of_a_leaf, from_a_function,
        from_a_checkpoint]  # fmt: skip


def gradients(way: Any, *, through: bool, owned: bool = False) -> list[Tensor | None]:
    model, (x, y) = net(), data()
    before = copy.deepcopy(model[1].weight)
    x.requires_grad_()
    if owned:
        model.opt = elmo.optim.SGD(model.parameters(), lr=0.1)
    z = way(compiled(model) if through else model, x)
    F.cross_entropy(getattr(z, "kept", z), y).backward()
    if owned:
        assert torch.equal(model[1].weight, before)
    return [z.grad if z.is_leaf else None, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_gives_its_gradient_to_the_graph_that_the_logits_are_in(way: Any) -> None:
    for mine, theirs in zip(gradients(way, through=True), gradients(way, through=False)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_leaf_of_its_own_updates_no_weight() -> None:
    gradients(leaf_by_method, through=True, owned=True)


def test_logits_in_their_own_graph_are_not_made() -> None:
    x, y = data()
    z = compiled(net())(x)
    F.cross_entropy(z.double() / 2, y).backward()
    assert isinstance(z, Deferred)
    assert z._state.values is None


def test_a_forward_hook_of_a_module_compiled_in_place_hooks_the_logits() -> None:
    def double(module: nn.Module, args: Any, z: Tensor) -> Tensor:
        z.register_hook(lambda grad: 2 * grad)
        return z

    found = []
    x, y = data()
    for through in (False, True):
        model = net()
        if through:
            model.compile(backend="elmo", options=OPTIONS)
        model.register_forward_hook(double)
        F.cross_entropy(model(x), y).backward()
        found.append(model[0].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
