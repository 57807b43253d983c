"""loss_value="auto": filled in by backward(), or computed in a pass of its own if read before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training import EAGER, INDUCTOR, assert_same, batch, net, owned, reference

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
