"""Features and other inputs of deferred logits that the caller writes into before he reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.deferred import Deferred

N, D, L = 6, 8, 512
OPTIONS = {"lower": "eager", "min_outputs": 64}

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda z: z + z.new_zeros(L),
    "argmax": lambda z: z.argmax(-1),
    "logsumexp": lambda z: z.logsumexp(-1),
    "loss": lambda z: F.cross_entropy(z, torch.arange(N)),
}


def counted(h: Tensor) -> None:
    h.mul_(-2)


def by_data(h: Tensor) -> None:
    h.data.mul_(-2)


def by_numpy(h: Tensor) -> None:
    values = h.detach().numpy()
    np.multiply(values, -2, out=values)


WRITES = [counted, by_data, by_numpy]


def compiled(fn: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="elmo", options={**OPTIONS, **options})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_is_filled_again(write: Any, read: str, mode: Any) -> None:
    head = nn.Linear(D, L)
    call = compiled(head)
    with mode():
        x = torch.randn(N, D)
        expected = READS[read](head(x.clone()))
        z = call(x)
        assert isinstance(z, Deferred)
        write(x)
        torch.testing.assert_close(READS[read](z), expected)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", [False, True])
def test_hidden_states_that_are_returned_too(write: Any, view: bool) -> None:
    """Written before the loss is taken; the gradient is that of the features as they were."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(D, D), nn.Linear(D, L)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.encoder(x)
            return self.head(h), h.view(-1, 2, D) if view else h

    model, x, y = Model(), torch.randn(N, D), torch.randint(L, (N,))
    F.cross_entropy(model(x)[0], y).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    z, h = compiled(model)(x)
    with torch.no_grad():
        write(h)
    F.cross_entropy(z, y).backward()
    for param, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(param.grad, grad)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("read", READS)
def test_a_bias_that_is_passed_in(write: Any, read: str) -> None:
    head, x, b = nn.Linear(D, L), torch.randn(N, D), torch.randn(L)
    call = compiled(lambda x, b: head(x) + b)
    with torch.no_grad():
        expected = READS[read](head(x) + b)
        z = call(x, b)
        write(b)
        torch.testing.assert_close(READS[read](z), expected)


@pytest.mark.parametrize("write", WRITES)
def test_a_fused_update_of_a_loss_outside(write: Any) -> None:
    ours, theirs = nn.Linear(D, L), nn.Linear(D, L)
    theirs.load_state_dict(ours.state_dict())
    call = compiled(ours)
    fused = elmo.optim.SGD(ours.parameters(), 0.5)
    sgd = torch.optim.SGD(theirs.parameters(), 0.5)
    for _ in range(3):
        x, y = torch.randn(N, D), torch.randint(L, (N,))
        F.cross_entropy(theirs(x.clone()), y).backward()
        z = call(x)
        write(x)
        F.cross_entropy(z, y).backward()
        for optimizer in (fused, sgd):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_gradient_of_a_leaf_goes_to_it() -> None:
    head, y = nn.Linear(D, L), torch.randint(L, (N,))
    x = torch.randn(N, D, requires_grad=True)
    z = compiled(head)(x)
    (mine,) = torch.autograd.grad(F.cross_entropy(z, y) + z.square().mean(), x)
    theirs = head(x)
    (grad,) = torch.autograd.grad(F.cross_entropy(theirs, y) + theirs.square().mean(), x)
    torch.testing.assert_close(mine, grad)


def held(z: Tensor) -> tuple[Any, ...]:
    assert isinstance(z, Deferred)
    root: Any = z._state.recipe()[0]
    inputs: tuple[Any, ...] = root.inputs
    return inputs


def test_what_nobody_else_has_is_not_copied() -> None:
    """The features of a compiled model: the recipe's inputs are the graph's own results."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, L))
    with torch.no_grad():
        z: Any = compiled(model)(torch.randn(N, D))
    features, *params = held(z)
    shared = z._state.origin.output.shared
    assert features.shape == (N, D)
    assert 0 not in shared
    assert len(shared) == len(params) == 2


@pytest.mark.parametrize("write", WRITES)
def test_features_nearly_as_large_as_the_logits_are_watched(write: Any) -> None:
    head, x = nn.Linear(200, L), torch.randn(N, 200)
    call = compiled(head)
    with torch.no_grad():
        expected, z = head(x), call(x)
        assert any(value is x for value in held(z))
        torch.testing.assert_close(z.materialize(), expected)
        z = call(x)
        write(x)
        with pytest.raises(elmo.StaleLogitsError, match="features they are made from changed"):
            z.sum()


def test_small_inputs_of_one_row_are_watched() -> None:
    """Of one row the logits are hardly larger than what is added to them."""
    head, b = nn.Linear(D, L), torch.randn(L)
    call = compiled(lambda x, b: head(x) + b)
    with torch.no_grad():
        z = call(torch.randn(1, D), b)
        by_numpy(b)
        with pytest.raises(elmo.StaleLogitsError):
            z.sum()
