"""loss_value="deferred": NaN until backward() fills it in, one product less."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import EAGER, INDUCTOR, assert_same, batch, compiled, net, owned, reference, updates

import elmo_compile as elmo
from elmo_compile.errors import InputError

LOWERINGS = pytest.mark.parametrize(
    "options",
    [{**EAGER, "loss_value": "deferred"}, {**INDUCTOR, "loss_value": "deferred"}],
    ids=["eager", "inductor"],
)
DEFERRED = {**EAGER, "loss_value": "deferred"}


@LOWERINGS
def test_the_value_appears_with_backward(options: dict) -> None:
    model = net("bce")
    want = model(*batch()).item()
    twin = reference(model, 1)
    step, opt = owned(model, options)
    loss = step(*batch())
    view = loss.detach()
    assert math.isnan(loss.item())
    loss.backward()
    opt.step()
    for value in (loss, view):
        assert value.item() == pytest.approx(want, rel=1e-5)
    assert_same(model, twin)
    (match,) = elmo.last_report().matches
    assert match.loss_value == "deferred"
    assert match.products == 3


def test_a_scaled_backward_fills_in_the_unscaled_value() -> None:
    model = net("bce")
    want = model(*batch()).item()
    step, opt = owned(model, DEFERRED)
    loss = step(*batch())
    (loss * 3).backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    opt.step()


def test_the_gradient_of_the_encoder_fills_it_in() -> None:
    model = net("bce")
    want = model(*batch()).item()
    step, opt = owned(model, DEFERRED)
    loss = step(*batch())
    torch.autograd.grad(loss, [model.encoder.weight])
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert updates(opt, model.head.weight) == 0


def test_each_forward_has_its_own_value() -> None:
    model = net("bce")
    want = model(*batch(1)).item()
    step, opt = owned(model, DEFERRED)
    first, second = step(*batch(0)), step(*batch(1))
    second.backward()
    assert math.isnan(first.item())
    assert second.item() == pytest.approx(want, rel=1e-5)
    opt.step()


def test_exact_where_no_backward_fills_it_in() -> None:
    model = net("bce")
    want = model(*batch()).item()
    step, opt = owned(model, DEFERRED)
    with torch.no_grad():
        assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    with torch.inference_mode():
        assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    del opt  # nobody owns the head any more
    assert step(*batch()).item() == pytest.approx(want, rel=1e-5)


@LOWERINGS
def test_an_outer_checkpoint_computes_the_value_at_once(options: dict) -> None:
    model = net("bce")
    want = model(*batch()).item()
    twin = reference(model, 1)
    step, opt = owned(model, options)
    inputs, labels = batch()
    loss = checkpoint(step, inputs.requires_grad_(), labels, use_reentrant=False)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    opt.step()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert_same(model, twin)


def test_a_loss_that_is_not_returned_as_it_is_stays_exact() -> None:
    model = net("bce")
    want = model(*batch()).item()
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    step = compiled(lambda *args: model(*args) + model.encoder.weight.sum() * 0, DEFERRED)
    assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    (match,) = elmo.last_report().matches
    assert match.loss_value == "exact"
    assert any("not returned as it is" in note for note in match.notes)
    del opt


def test_cross_entropy_is_exact_for_free() -> None:
    model = net("ce")
    want = model(*batch()).item()
    step, _opt = owned(model, DEFERRED)
    assert step(*batch()).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_rows_and_narrow_losses(reduction: str) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 48, dtype=torch.bfloat16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss = F.binary_cross_entropy_with_logits(self.head(x), y, reduction="none")
            return loss.sum(1) if reduction == "none" else loss.sum()

    torch.manual_seed(0)
    model = Rows()
    twin = copy.deepcopy(model)
    x, y = torch.randn(4, 8, dtype=torch.bfloat16), torch.randint(0, 2, (4, 48)).bfloat16()
    step, opt = owned(model, DEFERRED, lr=0.01)
    loss = step(x, y)
    assert loss.isnan().all()
    loss.sum().backward()
    want = twin(x, y)
    assert loss.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0.02)
    opt.step()


def test_arithmetic_on_the_missing_value_is_stopped_before_the_update() -> None:
    model = net("bce")
    before = model.head.weight.detach().clone()
    step, opt = owned(model, DEFERRED)
    loss = step(*batch())
    with pytest.raises(InputError, match="deferred"):
        (loss * loss).backward()
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 0
