"""Deferred logits without a gradient, in inference mode, under autocast, of other shapes; and what
one recipe remembers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_net import OPTIONS, L, N, Net, assert_alike, outcome
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.deferred.origin import Recent
from elmo_compile.deferred.state import State
from elmo_compile.deferred.step import Step


def test_unused_logits_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: State) -> Tensor:
        raise AssertionError("the values were made")

    monkeypatch.setattr(State, "real", never)
    _, _, z = outcome(lambda z, y: None, compiled=True)
    assert isinstance(z, Deferred)


def test_without_a_gradient() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    x = torch.randn(N, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = run(x)
            assert isinstance(z, Deferred)
            assert not z.requires_grad
            torch.testing.assert_close(z + 0, model(x))
            assert torch.equal(run(x).argmax(-1), model(x).argmax(-1))


@pytest.mark.parametrize("encoder", [True, False])
def test_a_buffer_that_is_used_again_in_inference_mode(encoder: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net() if encoder else nn.Linear(8, L)
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    with torch.inference_mode():
        given = [torch.randn(N, 8) for _ in range(2)]
        buffer, made = torch.empty(N, 8), []
        for x in given:
            made.append(run(buffer.copy_(x)))
        for z, x in zip(made, given):
            assert isinstance(z, Deferred)
            torch.testing.assert_close(z + 0, model(x))


def test_a_write_into_logits_in_inference_mode() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    with torch.inference_mode():
        z, view, cast = run(x), run(x), run(x)
        double = cast.double()
        z.mul_(2)
        view.view(2, 3, L)[1:].mul_(2)
        cast.mul_(2)
        plain = model(x)
        torch.testing.assert_close(F.cross_entropy(z, y), F.cross_entropy(2 * plain, y))
        torch.testing.assert_close(view.sum(), plain[:3].sum() + 2 * plain[3:].sum())
        torch.testing.assert_close(F.cross_entropy(double, y), F.cross_entropy(plain.double(), y))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bfloat16, torch.float16])
def test_the_largest_after_a_narrowing_cast_are_those_of_the_cast(dtype: torch.dtype) -> None:
    def use(z: Tensor, y: Tensor) -> Tensor:
        # Rounded, whole rows tie but for one entry that two logits reach.
        return (z.detach() * 3e-8 + (3.0 if dtype.is_floating_point else 0)).to(dtype).argmax(-1)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        return z.detach().to(dtype).argmax(-1)

    for read in (use, plain):
        theirs, mine = (outcome(read, compiled=through)[0] for through in (False, True))
        assert torch.equal(mine, theirs)


def test_two_long_index_arrays_are_two_programs() -> None:
    def use(z: Tensor, y: Tensor) -> list[Tensor]:
        first = np.zeros(2000, dtype=np.int64)
        second = first.copy()
        second[1000] = 3
        return [F.cross_entropy(z[i], y[torch.as_tensor(i)]) for i in (first, second)]

    theirs, mine = (outcome(use, compiled=through)[0] for through in (False, True))
    assert_alike(mine, theirs)


def test_an_annealed_temperature_is_one_program() -> None:
    def use(z: Tensor, y: Tensor) -> list[Tensor]:
        scales = [0.5 + i / 10 for i in range(5)]
        return [F.cross_entropy((0.1 + z / scale * scale**2 - 0.2), y) for scale in scales]

    theirs, _, _ = outcome(use, compiled=False)
    mine, _, z = outcome(use, compiled=True)
    assert_alike(mine, theirs)
    assert len(z._state.origin._programs) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_numbers_leave_dtypes_as_they_are(dtype: torch.dtype) -> None:
    def use(z: Tensor, y: Tensor) -> list[Tensor]:
        narrow = z.detach().to(dtype)
        return [narrow / 0.7 + 0, narrow[0] * 0.7 + 0, narrow[0, 0] + 0.7 + 0]

    theirs, mine = (outcome(use, compiled=through)[0] for through in (False, True))
    for one, other in zip(mine, theirs):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one + 0, other + 0)


def test_what_is_remembered_of_a_recipe_is_bounded() -> None:
    recent: Recent[int] = Recent(2)
    made: list[int] = []

    def get(key: int) -> int:
        return recent.get_or(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    assert len(recent) == 2


def test_switched_off() -> None:
    _, _, z = outcome(lambda z, y: None, compiled=True, deferred_logits=False)
    assert type(z) is Tensor


def test_another_batch_size() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    for rows in (6, 9, 4, 11):
        x, y = torch.randn(rows, 8), torch.randint(0, L, (rows,))
        z = run(x)
        assert z.shape == (rows, L)
        torch.testing.assert_close(F.cross_entropy(z, y), F.cross_entropy(model(x), y))
        torch.testing.assert_close(z + 0, model(x))


def test_under_autocast() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, plain = run(x), model(x)
        inside = F.cross_entropy(z, y), F.cross_entropy(plain, y)
    assert z.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(*inside, rtol=2e-2, atol=0)
    torch.testing.assert_close(F.cross_entropy(z, y), F.cross_entropy(plain, y), rtol=2e-2, atol=0)
    assert torch.equal(z + 0, plain)


def test_cast_after_autocast() -> None:
    """As accelerate does with what a model returns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z: Tensor = model(x)
        return z.float()

    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    z, plain = torch.compile(cast, backend="elmo", options=OPTIONS)(x), cast(x)
    assert isinstance(z, Deferred)
    assert z.dtype == torch.float32
    grads = []
    for logits in (z, plain):
        model.zero_grad()
        F.cross_entropy(logits, y).backward()
        grads.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-4)
    assert torch.equal(z + 0, plain)


def test_an_excluded_head_returns_ordinary_logits() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net()
    elmo.exclude(model.head)
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    z = run(x)
    assert type(z) is Tensor
    F.cross_entropy(z, y).backward()
    mine = model.head.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(mine, model.head.weight.grad)


def test_a_step_runs_in_the_autocast_mode_it_was_taken_in() -> None:
    """On CUDA a softmax under autocast is float32, also where it is made later."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Step(F.linear, (torch.ones(3, 4),), {})
    plain = Step(F.linear, (torch.ones(3, 4),), {})
    x = torch.ones(2, 4)
    assert cast(x).dtype == torch.bfloat16
    assert not cast.in_mode("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast.in_mode("cpu")
        assert plain(x).dtype == torch.float32


def test_a_softmax_of_another_mode_is_not_in_the_loss_s_program() -> None:
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    net = Net()
    run = torch.compile(net, backend="elmo", options={**OPTIONS, "deferred_logits": True})
    z = run(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = z.log_softmax(-1)
    loss = F.nll_loss(inside, y)
    assert z._state.values is not None
    torch.testing.assert_close(loss + 0, F.cross_entropy(net(x), y))
