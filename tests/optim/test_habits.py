"""What a user of torch.optim is used to: schedulers, hooks, groups, clearing, printing, loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training import EAGER, assert_same, batch, compiled, net, reference, train

import elmo_compile as elmo

MAKERS: dict[str, Any] = {
    "SGD": lambda p, **kw: elmo.optim.SGD(p, 0.5, **kw),
    "AdamW": lambda p, **kw: elmo.optim.AdamW(p, 0.01, **kw),
    "Lion": lambda p, **kw: elmo.optim.Lion(p, 0.001, **kw),
    "Adagrad": lambda p, **kw: elmo.optim.Adagrad(p, 0.1, **kw),
}
TORCH: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}
SCHEDULES: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "Linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.02, total_steps=8, cycle_momentum=False
    ),
    "Sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [2],
    ),
}


@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TORCH)
def test_schedulers(name: str, schedule: str, update_at: str) -> None:
    model = net()
    twin = copy.deepcopy(model)
    opt, other = (
        MAKERS[name](model.parameters(), update_at=update_at),
        TORCH[name](twin.parameters()),
    )
    plans = [SCHEDULES[schedule](o) for o in (opt, other)]
    for run, each, plan in ((compiled(model), opt, plans[0]), (twin, other, plans[1])):
        for i in range(5):
            run(*batch(i)).backward()
            each.step()
            each.zero_grad()
            plan.step()
    assert plans[0].get_last_lr() == plans[1].get_last_lr()
    assert_same(model, twin, 2e-4 if name == "AdamW" else 2e-6)


def test_reduce_on_plateau() -> None:
    model = net()
    opt = MAKERS["SGD"](model.parameters())
    plan = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    train(compiled(model), opt, 1)
    for _ in range(3):
        plan.step(1.0)
    assert opt.param_groups[0]["lr"] < 0.5


@pytest.mark.parametrize("name", MAKERS)
def test_printing_shows_what_was_asked_for(name: str) -> None:
    text = repr(MAKERS[name](net().parameters(), kahan_rows=[0, 3], seed=11))
    assert text.startswith(name)
    for part in ("lr: ", "rounding: stochastic", "seed: 11", "kahan_rows: 2 rows"):
        assert part in text
    for inner in ("param_ids", "rounding_version", "foreach", "tensor("):
        assert inner not in text


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_step_hooks(update_at: str) -> None:
    model = net()
    opt = MAKERS["SGD"](model.parameters(), update_at=update_at)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    train(compiled(model), opt, 2)
    assert seen == ["before", "after"] * 2
    assert_same(model, reference(net(), 2))


@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_gradients(to_none: bool, update_at: str) -> None:
    model = net()
    opt = MAKERS["SGD"](model.parameters(), update_at=update_at)
    step = compiled(model)
    for i in range(3):
        opt.zero_grad(set_to_none=to_none)
        step(*batch(i)).backward()
        opt.step()
    assert_same(model, reference(net(), 3))
    opt.zero_grad(set_to_none=to_none)
    assert (model.encoder.weight.grad is None) == to_none
    assert model.head.weight.grad is None


def test_clearing_what_a_backward_kept() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    opt = MAKERS["AdamW"](model.parameters(), update_at="step")
    step = compiled(model)
    step(*batch(0)).backward()
    opt.zero_grad()
    opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.zero_grad()  # the module's own knows nothing of it: the next backward says so
    step(*batch(0)).backward()
    opt.step()
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_groups_with_options_of_their_own() -> None:
    model = net()
    twin = copy.deepcopy(model)
    opt = elmo.optim.AdamW([{"params": model.head.parameters(), "lr": 0.1, "betas": (0.5, 0.9)}], 1)
    opt.add_param_group({"params": list(model.encoder.parameters()), "lr": 0.02, "eps": 1e-3})
    other = torch.optim.AdamW(
        [
            {"params": twin.head.parameters(), "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": twin.encoder.parameters(), "lr": 0.02, "eps": 1e-3},
        ]
    )
    train(compiled(model), opt, 3)
    for i in range(3):
        other.zero_grad()
        twin(*batch(i)).backward()
        other.step()
    assert_same(model, twin, 1e-4)


def test_two_norms_for_two_groups() -> None:
    """Groups with the same max_norm are clipped together; others apart, or not at all."""
    model = net()
    twin = copy.deepcopy(model)
    opt = elmo.optim.SGD(
        [
            {"params": [model.head.weight], "max_norm": 0.02},
            {"params": [model.head.bias], "max_norm": None},
            {"params": model.encoder.parameters(), "max_norm": 0.01},
        ],
        0.5,
        update_at="step",
    )
    train(compiled(model), opt, 1)
    twin(*batch(0)).backward()
    torch.nn.utils.clip_grad_norm_(twin.head.weight, 0.02)
    torch.nn.utils.clip_grad_norm_(twin.encoder.parameters(), 0.01)
    torch.optim.SGD(twin.parameters(), 0.5).step()
    assert_same(model, twin)


def test_a_compiled_training_step() -> None:
    """forward, backward and step inside one compiled function (graph breaks and all)."""
    model = net()
    opt = MAKERS["SGD"](model.parameters())

    def one(inputs: Any, labels: Any) -> Any:
        loss = model(inputs, labels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    run = compiled(one, EAGER)
    for i in range(3):
        run(*batch(i))
    assert_same(model, reference(net(), 3))


@pytest.mark.parametrize("name", MAKERS)
def test_an_ordinary_model_trains(name: str) -> None:
    """No head, no backend: convolutions, norms, embeddings, complex and half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).to(torch.bfloat16)
    opt = MAKERS[name](model.parameters(), rounding="kahan", fused=False)
    x, y = torch.randn(32, 1, 4, 4).bfloat16(), torch.randint(0, 3, (32,))
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
