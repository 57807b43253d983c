"""Promise 7: what a fused update cannot do says so, and nothing is modified."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_  # before any optimizer was made
from training import EAGER, assert_same, batch, compiled, net, owned, reference, train

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, OptionError

CLIPS = [
    pytest.param(lambda params: clip_grad_norm_(params, 0.1), id="imported before"),
    pytest.param(lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1), id="norm"),
    pytest.param(lambda params: torch.nn.utils.clip_grad_value_(params, 0.01), id="value"),
    pytest.param(
        lambda params: torch.nn.utils.clip_grads_with_norm_(params, 0.1, torch.tensor(5.0)),
        id="in two parts",
    ),
]


@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_a_fused_head_raises(clip) -> None:
    model = net()
    step, opt = owned(model)
    step(*batch()).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(FusedUpdateError, match="max_norm"):
        clip(model.parameters())
    with pytest.raises(FusedUpdateError, match="max_norm"):
        clip(list(model.parameters()))
    with pytest.raises(FusedUpdateError, match="max_norm"):
        clip(model.head.weight)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    opt.step()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("case", ["other model", "not fused", "head left out"])
def test_clipping_without_a_fused_head_works(clip, case: str) -> None:
    fused = net(seed=5)
    step, opt = owned(fused)
    step(*batch()).backward()
    model = net()
    if case == "not fused":
        opt = elmo.optim.SGD(model.parameters(), 0.5, fused=False)
        step = compiled(model)
        step(*batch()).backward()
    elif case == "other model":
        model(*batch()).backward()
    else:
        model = fused.encoder
    twin = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        theirs.grad = mine.grad.clone()
    clip(model.parameters())  # a generator
    names = {"norm": 0.1, "value": 0.01}
    del names
    limit = max(float(p.grad.abs().max()) for p in model.parameters())
    assert 0 < limit <= 0.1
    assert any(
        not torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters())
    )
    del opt


def change(name: str, opt: torch.optim.Optimizer) -> None:
    (group,) = opt.param_groups
    if name == "scheduler":
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5**n).step()
    elif name == "lr tensor":
        group["lr"].mul_(0.5)
    else:
        group[name] = {"lr": 0.0, "weight_decay": 0.1, "betas": (0.5, 0.9)}[name]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "betas", "scheduler", "lr tensor"])
def test_a_rate_that_changes_between_backward_and_step_raises(name: str) -> None:
    model = net()
    lr = torch.tensor(0.25) if name == "lr tensor" else 0.25
    opt = elmo.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    step = compiled(model)
    train(step, opt, 1)
    step(*batch()).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    old = dict(opt.param_groups[0])
    old["lr"] = float(old["lr"])
    change(name, opt)
    with pytest.raises(FusedUpdateError, match=r"was .* in backward\(\).*update_at='step'"):
        opt.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    opt.param_groups[0].update(old)
    opt.step()  # nothing was lost
    assert not torch.equal(model.encoder.weight, before["encoder.weight"])
    change("lr", opt)  # between steps, as often as wished
    train(step, opt, 1)


def test_what_no_update_is_made_from_may_change() -> None:
    model = net()
    step, opt = owned(model)
    step(*batch()).backward()
    opt.param_groups[0].update(micro_batches=4)
    opt.step()


@pytest.mark.parametrize("what", ["at the step", "not fused", "no backward"])
def test_a_rate_may_change_before_a_step_that_reads_it(what: str) -> None:
    model = net()
    twin = copy.deepcopy(model)
    how = {"update_at": "step"} if what == "at the step" else {"fused": what != "not fused"}
    opt = elmo.optim.SGD(model.parameters(), 0.5, **how)
    theirs = torch.optim.SGD(twin.parameters(), 0.5)
    step = compiled(model)
    if what != "no backward":
        step(*batch()).backward()
        twin(*batch()).backward()
    for one in (opt, theirs):
        one.param_groups[0]["lr"] = 0.125
        one.step()
        one.zero_grad()
    step(*batch()).backward()
    twin(*batch()).backward()
    opt.step()
    theirs.step()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)


def test_clipping_after_an_unfused_backward_works() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    handle = model.head.weight.register_hook(lambda grad: None)
    step(*batch()).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(total) <= 0.1001
    opt.step()
    handle.remove()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_grad_scaler_is_refused(lower: str) -> None:
    model = net()
    step, opt = owned(model, {**EAGER, "lower": lower})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(FusedUpdateError, match="GradScaler"):
        scaler.scale(step(*batch()))
    with pytest.raises(FusedUpdateError, match="GradScaler"):
        scaler.scale([step(*batch()) * 2])
    other = net(seed=3)
    scaler.scale(other(*batch())).backward()  # has nothing to do with the fused head
    torch.amp.GradScaler("cpu", enabled=False).scale(step(*batch())).backward()
    opt.step()
    assert_same(model, reference(net(), 1))


def test_float16_autocast_with_grad_scaler_is_not_fused() -> None:
    model = net()
    want = reference(model, 1)
    step, opt = owned(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16):
        loss = step(*batch())
    scaler.scale(loss).backward()
    assert model.head.weight.grad is not None
    scaler.unscale_(opt)
    clip_grad_norm_(model.parameters(), 100.0)
    with pytest.warns(UserWarning, match="no head's update was fused"):
        scaler.step(opt)
    scaler.update()
    assert_same(model, want, tolerance=2e-3)


@pytest.mark.parametrize(
    "option", [{"accumulate": "stash"}, {"max_norm": 1.0}, {"nonfinite": "skip"}], ids=str
)
def test_what_must_see_the_whole_gradient_is_refused(option: dict) -> None:
    with pytest.raises(OptionError, match="update_at='step'"):
        elmo.optim.SGD(net().parameters(), 0.1, **option)
    elmo.optim.SGD(net().parameters(), 0.1, update_at="step", **option)
    elmo.optim.SGD(net().parameters(), 0.1, fused=False, **option)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("momentum", 1.0),
        ("momentum", -0.5),
        ("weight_decay", -1.0),
        ("nesterov", True),
        ("nesterov", 1),
        ("rounding", "up"),
        ("fused", "yes"),
        ("update_at", "later"),
        ("accumulate", "sum"),
        ("micro_batches", 0),
        ("max_norm", -1.0),
        ("nonfinite", "ignore"),
        ("state_dtype", "int4"),
        ("state_dtype", 8),
        ("compensation_dtype", torch.float16),
        ("eco", True),
        ("kahan_rows", 0),
        ("kahan_rows", 1.5),
        ("kahan_rows", "many"),
        ("kahan_rows", [0, 48]),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.5),
    ],
)
def test_hyper_parameters_out_of_range(name: str, value: object) -> None:
    model = net()
    with pytest.raises(OptionError, match=name):
        elmo.optim.SGD(model.parameters(), **{"lr": 0.1, name: value})
    opt = elmo.optim.SGD(model.encoder.parameters(), 0.1)
    with pytest.raises(OptionError, match=name):
        opt.add_param_group({"params": model.head.parameters(), name: value})
    assert len(opt.param_groups) == 1


def test_one_warning_if_nothing_was_fused() -> None:
    model = net()
    opt = elmo.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no head's update was fused") as caught:
        train(model, opt, 3)
    assert len(caught) == 1
    assert caught[0].filename.endswith("training.py")


def test_repr_names_the_hyper_parameters() -> None:
    text = repr(elmo.optim.SGD(net().parameters(), 0.1, momentum=0.9, rounding="nearest"))
    assert "momentum: 0.9" in text
    assert "rounding: nearest" in text


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "foreach"])
def test_options_of_torch_that_would_be_ignored(name: str) -> None:
    group = {"params": net().parameters(), name: True}
    with pytest.raises(OptionError, match=f"{name}=True is not an option here; use"):
        elmo.optim.AdamW([group], 0.1)
    with pytest.raises(TypeError, match=name):
        elmo.optim.AdamW(net().parameters(), 0.1, **{name: True})
    elmo.optim.AdamW([{"params": net().parameters(), name: False, "name": "all"}], 0.1)


def test_a_sparse_gradient_that_cannot_be_honoured_leaves_the_heads_alone() -> None:
    model = net()
    model.words = torch.nn.Embedding(4, 3, sparse=True)
    opt = elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9, update_at="step")
    compiled(model)(*batch()).backward()
    model.words(torch.tensor([1])).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="sparse gradient"):
        opt.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("how", [{}, {"update_at": "step"}], ids=str)
def test_a_second_step_with_the_same_gradients_raises(how: dict) -> None:
    model = net()
    step, opt = owned(model, **how)
    step(*batch(0)).backward()
    opt.step()
    before = model.encoder.weight.detach().clone()
    with pytest.raises(FusedUpdateError, match="twice with the same gradients"):
        opt.step()
    assert torch.equal(model.encoder.weight, before)
    for clear in (opt.zero_grad, model.zero_grad):
        clear()
        opt.step()
        step(*batch(1)).backward()
        opt.step()
    step(*batch(2)).backward()  # gradients of two batches, as without zero_grad() in torch
    opt.step()
