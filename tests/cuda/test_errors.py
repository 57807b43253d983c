"""What a CUDA device is told, and when: bad input, refusals, what no kernel has a form of."""

from __future__ import annotations

import copy

import pytest
import torch
from steps import L, batch, net, on_device
from training import compiled

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, InputError


@pytest.mark.parametrize("kind", ["bce", "ce"])
@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_invalid_input_is_told_at_the_step_and_changes_nothing(kind, update_at, options):
    model = net(kind).to("cuda")
    step = compiled(model, options)
    opt = elmo.optim.SGD(model.parameters(), 0.5, update_at=update_at)
    start = net(kind).state_dict()
    x, labels = on_device(0)
    for bad_x, bad_labels in ((x, labels + L), (x * float("nan"), labels)):
        step(bad_x, bad_labels).backward()
        with pytest.raises(InputError, match="invalid"):
            opt.step()
        opt.zero_grad()
        for name, value in model.state_dict().items():
            assert torch.equal(value.cpu(), start[name]), name
    step(x, labels).backward()
    opt.step()
    assert not torch.equal(model.head.weight.cpu(), start["head.weight"])
    assert bool(torch.isfinite(model.head.weight).all())


def test_what_no_kernel_guards_is_looked_at_before_the_step(options):
    model = net("focal").to("cuda")
    step = compiled(model, options)
    opt = elmo.optim.SGD(model.parameters(), 0.5, update_at="step")
    x, labels = on_device(0)
    step(x, labels).backward()
    opt.step()
    opt.zero_grad()
    before = copy.deepcopy(model.state_dict())
    step(x * float("inf"), labels).backward()
    with pytest.raises(InputError):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_captured_graph_is_refused(options, monkeypatch):
    model = net("bce").to("cuda")
    step, opt = compiled(model, options), elmo.optim.SGD(model.parameters(), 0.5)
    step(*on_device(0)).backward()
    opt.step()
    before = model.head.weight.detach().clone()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FusedUpdateError, match="CUDA graph"):
        step(*on_device(1)).backward()
    assert torch.equal(model.head.weight, before)


def test_float64_is_left_to_torch(options):
    model = net("ce").to("cuda", torch.float64)
    x, labels = on_device(0)
    loss = compiled(model, options)(x.double(), labels)
    loss.backward()
    assert loss.item() == pytest.approx(
        net("ce").double()(batch(0)[0].double(), batch(0)[1]).item()
    )
    (refusal,) = elmo.last_report().refusals
    assert "float64" in refusal.reason
    assert model.head.weight.grad.dtype == torch.float64
