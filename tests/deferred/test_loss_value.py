"""loss_value="auto": filled in by backward(), or computed in a pass of its own if read before."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import (
    EAGER,
    FEATURES,
    INDUCTOR,
    LABELS,
    ROWS,
    assert_same,
    batch,
    compiled,
    net,
    owned,
    reference,
)

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.kernels import aten

LOWERINGS = pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes over the weight that are made."""
    made: list[str] = []
    for name in ("forward", "backward_update"):
        inner = getattr(aten, name)

        def counted(*args: Any, _name: str = name, _inner: Any = inner, **kwargs: Any) -> Any:
            made.append(_name)
            return _inner(*args, **kwargs)

        monkeypatch.setattr(aten, name, counted)
    return made


@LOWERINGS
def test_read_after_backward_it_costs_nothing(options: dict[str, Any], passes: list[str]) -> None:
    model = net("bce")
    want = model(*batch()).item()
    twin = reference(model, 1)
    step, opt = owned(model, options)
    loss = step(*batch())
    assert isinstance(loss, Deferred)
    loss.backward()
    opt.step()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert passes == ["backward_update"]
    assert_same(model, twin)
    (match,) = elmo.last_report().matches
    assert (match.loss_value, match.products) == ("auto", 3)


def test_a_list_of_detached_losses_is_a_tensor() -> None:
    """`torch.tensor([loss, ...])` reads memory: a loss whose value is known has some."""
    step, opt = owned(net("bce"), EAGER)
    losses = []
    for _ in range(2):
        loss = step(*batch())
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    assert torch.equal(torch.tensor(losses), torch.stack(losses))
    assert losses[1] < losses[0]


@LOWERINGS
def test_read_before_it_computes_itself_once(options: dict[str, Any], passes: list[str]) -> None:
    model = net("bce")
    want = model(*batch()).item()
    twin = reference(model, 1)
    step, opt = owned(model, options)
    loss = step(*batch())
    for _ in range(2):
        assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    opt.step()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert passes == ["forward", "backward_update"]
    assert_same(model, twin)


def scaled(loss: Tensor, encoder: Tensor) -> Tensor:
    return loss / 4


def weighted(loss: Tensor, encoder: Tensor) -> Tensor:
    return 0.3 * loss


def with_a_penalty(loss: Tensor, encoder: Tensor) -> Tensor:
    return loss + encoder.pow(2).sum()


def squared(loss: Tensor, encoder: Tensor) -> Tensor:
    return loss * loss


def in_place(loss: Tensor, encoder: Tensor) -> Tensor:
    loss /= 4
    return loss


USES: list[Callable[[Tensor, Tensor], Tensor]] = [scaled, weighted, with_a_penalty, squared]
USES += [in_place]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("log_before", [True, False])
def test_arithmetic(use: Callable[[Tensor, Tensor], Tensor], log_before: bool) -> None:
    model = net("bce")
    twin = copy.deepcopy(model)
    expected = use(twin(*batch()), twin.encoder.weight)
    expected.backward()
    step, opt = owned(model)
    loss = step(*batch())
    before = f"{loss.detach().item():.5f}" if log_before else ""
    total = use(loss, model.encoder.weight)
    total.backward()
    opt.step()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    if log_before:
        assert float(before) == pytest.approx(twin(*batch()).item(), abs=1e-5)
    torch.testing.assert_close(model.encoder.weight.grad, twin.encoder.weight.grad)


def test_two_forwards_and_the_backward_of_one() -> None:
    """The other's value is computed before its weight is gone."""
    model = net("bce")
    want = [model(*batch(i)).item() for i in range(2)]
    step, opt = owned(model)
    losses = [step(*batch(i)) for i in range(2)]
    losses[1].backward()
    opt.step()
    assert [loss.item() for loss in losses] == pytest.approx(want, rel=1e-5)


def test_never_with_other_weights() -> None:
    model = net("bce")
    step, _opt = owned(model)
    loss = step(*batch())
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(elmo.StaleLogitsError, match="loss_value"):
        loss.item()


def test_exact_where_the_loss_is_not_returned_as_it_is() -> None:
    model = net("bce")
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    torch._dynamo.reset()
    step: Any = torch.compile(lambda *args: model(*args) * 2, backend="elmo", options=EAGER)
    loss = step(*batch())
    assert type(loss) is Tensor or not loss.isnan().any()
    assert loss.item() == pytest.approx(2 * model(*batch()).item(), rel=1e-5)
    del opt


def test_any_number_of_losses_may_be_read_later() -> None:
    model = net("bce")
    step, _opt = owned(model)
    losses = torch.stack([step(*batch(i % 3)) for i in range(260)])
    want = torch.stack([model(*batch(i % 3)) for i in range(260)])
    torch.testing.assert_close(losses, want)


def test_another_optimizer_takes_the_weight_over_before_it_is_read() -> None:
    model = net("bce")
    step, _opt = owned(model)
    loss = step(*batch())
    other = elmo.optim.SGD(model.parameters(), 0.1)
    assert loss.item() == pytest.approx(model(*batch()).item(), rel=1e-5)
    loss = step(*batch(1))
    want = model(*batch(1)).item()
    loss.backward()
    other.step()
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_results_are_written_where_they_are_asked_for() -> None:
    model = net("bce")
    step, _opt = owned(model)
    buffer = torch.zeros(())
    torch.mul(step(*batch()).detach(), 2, out=buffer)
    assert buffer.item() == pytest.approx(2 * model(*batch()).item(), rel=1e-5)


def test_the_bias_is_that_of_the_forward() -> None:
    model = net("bce")
    want = model(*batch()).item()
    step, _opt = owned(model)
    loss = step(*batch())
    with torch.no_grad():
        model.head.bias.add_(1.0)
    assert loss.item() == pytest.approx(want, rel=1e-5)


@LOWERINGS
def test_never_with_other_dense_targets(options: dict[str, Any]) -> None:
    head = nn.Linear(FEATURES, LABELS)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(head(x), y)

    step = compiled(model, options)
    opt = elmo.optim.SGD(head.parameters(), 0.5)
    x, y = torch.randn(ROWS, FEATURES), torch.rand(ROWS, LABELS)
    first, second = step(x, y), step(x, y)
    read = first.item()
    assert read == pytest.approx(model(x, y).item(), rel=1e-5)
    y.fill_(0.5)
    assert first.item() == read
    with pytest.raises(elmo.StaleLogitsError, match="targets have changed"):
        second.item()
    third = step(x, y)
    third.backward()
    opt.step()
    assert not third.isnan()
    with pytest.raises(elmo.StaleLogitsError):
        second.item()


@LOWERINGS
def test_nothing_of_a_step_is_held_by_its_loss(options: dict[str, Any]) -> None:
    head = nn.Linear(FEATURES, LABELS)
    step = compiled(lambda x, y: F.binary_cross_entropy_with_logits(head(x), y), options)
    opt = elmo.optim.SGD(head.parameters(), 0.5)
    held, losses = [], []
    for read_before in (False, True, False):
        x, y = torch.randn(ROWS, FEATURES), torch.rand(ROWS, LABELS)
        loss = step(x, y)
        losses.append(loss.detach())
        if read_before:
            loss.item()
        loss.backward()
        opt.step()
        opt.zero_grad()
        held += [weakref.ref(x), weakref.ref(y)]
    for state in (loss._state for loss in losses):
        assert state._opened.value is None
    del x, y, loss
    gc.collect()
    assert [kept() for kept in held] == [None] * len(held)
    assert not torch.stack(losses).isnan().any()


def test_a_backward_for_logits_alone_updates_nothing() -> None:
    """The loss of a fused head's logits is a tensor of the package's own, too."""
    model = nn.Linear(8, LABELS)
    x, y = torch.randn(5, 8), torch.rand(5, LABELS)
    z = model(x)
    (want,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(z, y), z)
    before = copy.deepcopy(model)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    logits = torch.compile(model, backend="elmo", options=EAGER)(x)
    loss = F.binary_cross_entropy_with_logits(logits, y)
    assert isinstance(logits, Deferred)
    assert isinstance(loss, Deferred)
    loss.backward(inputs=[logits])
    torch.testing.assert_close(logits.grad, want)
    assert torch.equal(model.weight, before.weight)
    assert model.bias.grad is None
    F.binary_cross_entropy_with_logits(model(x), y).backward(inputs=[model.bias])
    opt.step()
    assert torch.equal(model.weight, before.weight)


@pytest.mark.parametrize("ask", [Tensor.backward, torch.autograd.backward])
def test_formulas_and_hooks_of_a_backward_run_as_in_any_other(ask: Callable[[Any], None]) -> None:
    """Not inside `__torch_function__` of the loss: what a compiler traces there has its own."""
    step, _ = owned(net("bce"), EAGER)
    ordinary, seen = torch._C._get_torch_function_state(), []
    x, y = batch()
    x.requires_grad_().register_hook(lambda _: seen.append(torch._C._get_torch_function_state()))
    loss = step(x, y)
    assert isinstance(loss, Deferred)
    ask(loss)
    assert seen == [ordinary]
