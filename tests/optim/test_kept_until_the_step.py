"""Between backward and `opt.step()`: what `update_at="step"` kept, and what may become of it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import training
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from training import (
    LABELS,
    assert_same,
    batch,
    net,
    reference,
    train,
)

from elmo_compile.errors import FusedUpdateError, OptionError

owned = functools.partial(training.owned, update_at="step")


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_another_use_of_the_weight_is_added(max_norm: float | None) -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model, max_norm=max_norm)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for i in range(2):
        for run, m in ((step, model), (twin, twin)):
            (run(*batch(i)) + 0.1 * m.head.weight.square().sum()).backward()
        if max_norm is not None:
            clip_grad_norm_(twin.parameters(), max_norm)
        for each in (opt, other):
            each.step()
            each.zero_grad()
    assert_same(model, twin)


@pytest.mark.parametrize("clipped", [False, True])
def test_a_refused_step_may_be_tried_again(clipped: bool) -> None:
    """What is in .grad counts once, as it is at the try that succeeds."""
    model = net()
    model.embed = nn.Embedding(LABELS, 5, sparse=True)
    twin = copy.deepcopy(model)
    step, opt = owned(model, weight_decay=0.1)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for run, m in ((step, model), (twin, twin)):
        inputs, labels = batch()
        penalty = 0.1 * m.head.weight.square().sum()
        (run(inputs, labels) + m.embed(labels).sum() + penalty).backward()
    with pytest.raises(OptionError, match="sparse gradient"):
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0.0
    if clipped:
        for m in (model, twin):
            m.head.weight.grad.mul_(0.5)
        twin.head.weight.grad.add_(_fused_part(twin), alpha=0.5)
    opt.step()
    other.step()
    assert_same(model, twin)


def _fused_part(model: nn.Module) -> Tensor:
    """The gradient of the loss alone, of batch 0."""
    (found,) = torch.autograd.grad(model(*batch()), [model.head.weight])
    return found


def test_two_losses_of_one_head_in_one_backward() -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    (step(*batch(0)) + 2 * step(*batch(1))).backward()
    (twin(*batch(0)) + 2 * twin(*batch(1))).backward()
    opt.step()
    other.step()
    assert_same(model, twin)


def test_a_forward_before_the_step_has_stale_weights_after_it() -> None:
    model = net(bias=False)
    step, opt = owned(model)
    early = step(*batch(1))
    train(step, opt, 1)
    with pytest.raises(FusedUpdateError, match="already updated since this forward"):
        early.backward()


@pytest.mark.parametrize("change", ["load", "in place", "dtype"])
def test_a_weight_changed_between_backward_and_step(change: str) -> None:
    """The gradient of the former values is gone: said, not taken at the new ones."""
    model = net(bias=False)
    step, opt = owned(model)
    step(*batch()).backward()
    if change == "load":
        model.load_state_dict(net(seed=5, bias=False).state_dict())
    elif change == "dtype":
        model.to(torch.bfloat16)
    else:
        with torch.no_grad():
            model.head.weight.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FusedUpdateError, match=r"changed between backward\(\) and opt\.step"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    opt.zero_grad()
    if change != "dtype":
        train(step, opt, 1)


@pytest.mark.parametrize("weights", [False, True])
def test_loading_the_optimizer_leaves_gradients(weights: bool) -> None:
    """As torch's does; of weights that were loaded, too, the head's is no gradient any more."""
    model = net()
    want = reference(model, 1)
    step, opt = owned(model)
    step(*batch(0)).backward()
    if weights:
        model.load_state_dict(model.state_dict())
    opt.load_state_dict(opt.state_dict())
    if weights:
        with pytest.raises(FusedUpdateError, match=r"changed between backward\(\) and opt\.step"):
            opt.step()
        opt.zero_grad()
        step(*batch(0)).backward()
    opt.step()
    assert_same(model, want)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["model", "head"])
def test_a_module_s_zero_grad_discards_what_was_kept(whose: str, set_to_none: bool) -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model, accumulate="stash")
    (1e6 * step(*batch(5))).backward()
    model.zero_grad(set_to_none)
    if whose == "head":
        (1e6 * step(*batch(5))).backward()
        model.head.zero_grad(set_to_none)
        model.encoder.zero_grad(set_to_none)
    step(*batch(0)).backward()
    opt.step()
    assert_same(model, want)
