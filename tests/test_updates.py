"""Promise 2: a backward updates a fused head exactly once, and nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import (
    EAGER,
    INDUCTOR,
    Net,
    assert_same,
    batch,
    compiled,
    net,
    owned,
    reference,
    train,
    updates,
)

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError

LOWERINGS = [pytest.param(EAGER, id="eager"), pytest.param(INDUCTOR, id="inductor")]


@pytest.fixture(params=["ce", "bce"])
def kind(request: pytest.FixtureRequest) -> str:
    """The loss."""
    return str(request.param)


EVERYTHING = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("hyper", "options"),
    [
        ({}, EAGER),
        ({"momentum": 0.9}, EAGER),
        ({"weight_decay": 0.1}, EAGER),
        (EVERYTHING, EAGER),
        (EVERYTHING, INDUCTOR),
    ],
    ids=["plain", "momentum", "decay", "everything", "everything-inductor"],
)
def test_training_equals_torch(kind: str, options: dict, hyper: dict) -> None:
    model = net(kind)
    want = reference(model, 4, **hyper)
    step, opt = owned(model, options, **hyper)
    train(step, opt, 4)
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 4
    assert model.head.weight.grad is None
    assert elmo.is_fused(model.head.weight)
    assert [w is model.head.weight for w in opt.fused_parameters()] == [True]


@pytest.mark.parametrize("options", LOWERINGS)
def test_no_grad_eval_and_inference_never_update(options: dict) -> None:
    model = net("bce")
    step, opt = owned(model, options)
    before = copy.deepcopy(model.state_dict())
    want = model(*batch()).item()
    with torch.no_grad():
        assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    with torch.inference_mode():
        assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    model.eval()
    with torch.no_grad():
        assert step(*batch()).item() == pytest.approx(want, rel=1e-5)
    step(*batch())  # with gradients on, but nobody calls backward
    assert updates(opt, model.head.weight) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluating_between_forward_and_backward() -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model)
    loss = step(*batch(0))
    with torch.no_grad():
        step(*batch(1))
    with torch.inference_mode():
        step(*batch(2))
    loss.backward()
    opt.step()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 1


def test_backward_in_eval_mode_updates() -> None:
    model = net()
    want = reference(model, 2)
    step, opt = owned(model)
    train(step, opt, 1)
    model.eval()
    loss = step(*batch(1))
    loss.backward()
    opt.step()
    assert_same(model, want)


@pytest.mark.parametrize("options", LOWERINGS)
def test_gradient_of_the_encoder_only(options: dict) -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model, options)
    before = model.head.weight.detach().clone()
    (got,) = torch.autograd.grad(step(*batch()), [model.encoder.weight])
    (want,) = torch.autograd.grad(twin(*batch()), [twin.encoder.weight])
    torch.testing.assert_close(got, want)
    step(*batch()).backward(inputs=[model.encoder.weight])
    torch.testing.assert_close(model.encoder.weight.grad, want)
    assert model.encoder.bias.grad is None
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("options", LOWERINGS)
@pytest.mark.parametrize("update_at", ["backward", "step"])
@torch._functorch.config.patch(donated_buffer=False)  # as torch asks for
def test_gradient_of_the_encoder_then_backward(options: dict, kind: str, update_at: str) -> None:
    """As PCGrad, GradNorm and adaptive loss weights do; torch keeps the graph for it."""
    torch._dynamo.reset()
    model = net(kind)
    twin, want = copy.deepcopy(model), reference(model, 2)
    step, opt = owned(model, options, update_at=update_at)
    for number in range(2):
        loss = step(*batch(number))
        (got,) = torch.autograd.grad(loss, [model.encoder.weight], retain_graph=True)
        if number == 0:
            (expected,) = torch.autograd.grad(twin(*batch(0)), [twin.encoder.weight])
            torch.testing.assert_close(got, expected)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert_same(model, want)


@pytest.mark.parametrize("loss", ["ce", "bce", "margin"])
def test_a_graph_that_is_kept_accumulates_twice(loss: str) -> None:
    functions: dict[str, Any] = {
        "ce": F.cross_entropy,
        "bce": lambda z, y: F.binary_cross_entropy_with_logits(
            z, elmo.multi_hot(y[:, None], z.shape[-1])
        ),
        "margin": F.multi_margin_loss,
    }
    results = [_backward_twice(functions[loss], ours) for ours in (True, False)]
    assert_same(*results)


def _backward_twice(loss: Any, ours: bool) -> nn.Module:
    model: Any = net()
    run, kind, more = model.logits, torch.optim.SGD, {}
    if ours:
        run = torch.compile(run, backend="elmo", options=EAGER)
        kind, more = elmo.optim.SGD, {"update_at": "step", "accumulate": "stash"}
    opt = kind(model.parameters(), lr=0.3, **more)
    inputs, labels = batch()
    made = loss(run(inputs), labels)
    made.backward(retain_graph=True)
    made.backward()
    opt.step()
    return model  # type: ignore[no-any-return]


def test_backward_with_inputs_that_name_the_weight_updates() -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model)
    step(*batch()).backward(inputs=[model.encoder.weight, model.head.weight])
    assert updates(opt, model.head.weight) == 1
    torch.testing.assert_close(model.head.weight.detach(), want.head.weight.detach())


@pytest.mark.parametrize("options", LOWERINGS)
def test_asking_for_the_gradient_of_the_weight_raises(options: dict) -> None:
    model = net()
    step, opt = owned(model, options)
    before = model.head.weight.detach().clone()
    with pytest.raises(FusedUpdateError, match="fused=False"):
        torch.autograd.grad(step(*batch()), [model.head.weight])
    with pytest.raises(FusedUpdateError, match="fused=False"):
        torch.autograd.grad(step(*batch()), [model.encoder.weight, model.head.weight])
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("options", LOWERINGS)
def test_a_second_backward_raises(options: dict) -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model, options)
    loss = step(*batch())
    with pytest.raises(RuntimeError):  # torch's own words: saved or donated buffers
        _twice(loss)
    if updates(opt, model.head.weight):
        torch.testing.assert_close(model.head.weight.detach(), want.head.weight.detach())
    assert updates(opt, model.head.weight) <= 1


def _twice(loss: torch.Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("options", LOWERINGS)
def test_two_forwards_then_two_backwards_raise_on_the_second(options: dict) -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model, options)
    first, second = step(*batch(0)), step(*batch(1))
    first.backward()
    with pytest.raises(FusedUpdateError, match="already updated since"):
        second.backward()
    torch.testing.assert_close(model.head.weight.detach(), want.head.weight.detach())
    assert updates(opt, model.head.weight) == 1


def test_accumulating_without_step_raises() -> None:
    model = net()
    step, opt = owned(model)
    step(*batch(0)).backward()
    after_one = model.head.weight.detach().clone()
    with pytest.raises(FusedUpdateError, match=r"before opt\.step"):
        step(*batch(1)).backward()
    assert torch.equal(model.head.weight, after_one)
    opt.step()
    step(*batch(1)).backward()
    assert updates(opt, model.head.weight) == 2


def test_the_sum_of_two_losses_raises() -> None:
    model = net()
    step, opt = owned(model)
    with pytest.raises(FusedUpdateError, match="reaches two losses"):
        (step(*batch(0)) + step(*batch(1))).backward()
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("options", LOWERINGS)
def test_a_frozen_encoder_does_not_stop_the_head(options: dict) -> None:
    model = net(bias=False)
    model.encoder.requires_grad_(False)
    want = reference(model, 3)
    step, opt = owned(model, options)
    train(step, opt, 3)
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 3


def test_a_frozen_head_is_not_touched() -> None:
    model = net()
    model.head.requires_grad_(False)
    want = reference(model, 3)
    step, opt = owned(model)
    with pytest.warns(UserWarning, match="no head's update was fused"):
        train(step, opt, 3)
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 0


def test_freezing_and_thawing_the_head() -> None:
    model = net()
    want = copy.deepcopy(model)
    other = torch.optim.SGD(want.parameters(), 0.5)
    step, opt = owned(model)
    for i, trainable in enumerate([True, False, True]):
        for each, run, stepper in ((model, step, opt), (want, want, other)):
            each.head.weight.requires_grad_(trainable)
            run(*batch(i)).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 2


@pytest.mark.parametrize("options", LOWERINGS)
def test_modules_that_share_code_do_not_share_owners(options: dict) -> None:
    a, b, c = net(seed=1), net(seed=2), net(seed=3)
    wants = [reference(m, 2, lr=lr) for m, lr in ((a, 0.5), (b, 0.1), (c, 0.3))]
    torch._dynamo.reset()
    opt_a = elmo.optim.SGD(a.parameters(), 0.5)
    opt_b = elmo.optim.SGD(b.parameters(), 0.1)
    opt_c = torch.optim.SGD(c.parameters(), 0.3)
    run = torch.compile(lambda model, *args: model(*args), backend="elmo", options=options)
    torch._dynamo.utils.counters.clear()
    for i in range(2):
        for model, opt in ((a, opt_a), (b, opt_b), (c, opt_c)):
            run(model, *batch(i)).backward()
            opt.step()
            opt.zero_grad()
    later = options is INDUCTOR  # Inductor compiles the variant without an owner through Dynamo
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + later
    for model, want in zip((a, b, c), wants):
        assert_same(model, want)
    assert updates(opt_a, a.head.weight) == updates(opt_b, b.head.weight) == 2


@pytest.mark.parametrize("options", LOWERINGS)
def test_learning_rates_change_without_recompiling(options: dict) -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model, options)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    train(step, opt, 1)
    train(twin, other, 1)
    torch._dynamo.utils.counters.clear()
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (opt, other)]
    for i in range(3):
        for run, stepper, schedule in zip((step, twin), (opt, other), schedules):
            loss = run(*batch(i))
            stepper.param_groups[0]["lr"] *= 0.9  # after forward: backward's value counts
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            schedule.step()
    assert_same(model, twin)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


def test_a_rate_of_zero_changes_nothing() -> None:
    model = net()
    before = model.head.weight.detach().clone()
    step, opt = owned(model, lr=0.0)
    train(step, opt, 2)
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 2


def test_a_rate_in_a_tensor() -> None:
    model = net()
    want = reference(model, 2)
    step, opt = owned(model, lr=torch.tensor(0.5))
    train(step, opt, 2)
    assert_same(model, want)


def test_only_the_backend_leaves_an_ordinary_gradient(kind: str) -> None:
    model = net(kind)
    twin = copy.deepcopy(model)
    step = compiled(model)
    step(*batch()).backward()
    twin(*batch()).backward()
    for got, want in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(got.grad, want.grad)


def test_fused_false_always_works(kind: str) -> None:
    model = net(kind)
    want = reference(model, 3, momentum=0.9)
    step, opt = owned(model, momentum=0.9, fused=False)
    train(step, opt, 3)
    assert_same(model, want)
    assert not elmo.is_fused(model.head.weight)
    assert isinstance(model, Net)
