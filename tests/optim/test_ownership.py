"""An owner's life: taking over, deletion, names, closures and writes from elsewhere."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from training import (
    EAGER,
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
from elmo_compile.kernels import aten


def test_a_new_optimizer_takes_over() -> None:
    model = net()
    step, old = owned(model, lr=0.1)
    train(step, old, 1)
    new = elmo.optim.SGD(model.parameters(), 0.5)
    want = reference(model, 1, lr=0.5)
    train(step, new, 1)
    assert_same(model, want)
    assert updates(old, model.head.weight) == updates(new, model.head.weight) == 1
    with pytest.raises(FusedUpdateError, match="newer elmo_compile optimizer"):
        old.step()
    assert_same(model, want)


def test_a_new_optimizer_between_forward_and_backward() -> None:
    model = net()
    step, old = owned(model)
    loss = step(*batch())
    new = elmo.optim.SGD(model.parameters(), 0.5)
    with pytest.raises(FusedUpdateError, match="taken over"):
        loss.backward()
    assert not updates(old, model.head.weight)
    assert not updates(new, model.head.weight)


def test_an_optimizer_deleted_between_forward_and_backward() -> None:
    model = net()
    before = model.head.weight.detach().clone()
    step, opt = owned(model)
    loss = step(*batch())
    del opt
    gc.collect()
    with pytest.raises(FusedUpdateError, match="was deleted"):
        loss.backward()
    assert torch.equal(model.head.weight, before)


def test_a_deleted_optimizer_owns_nothing() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 2)
    del opt
    want = reference(model, 2)
    train(step, torch.optim.SGD(model.parameters(), 0.5), 2)
    assert_same(model, want)


def test_two_optimizers_of_which_one_is_ordinary() -> None:
    model = net()
    step, _opt = owned(model)
    other = torch.optim.SGD(model.parameters(), 0.5)
    train(step, other, 1)
    with pytest.raises(FusedUpdateError, match="delete that optimizer"):
        train(step, other, 1)


def test_groups_with_rates_of_their_own_and_without_fusing() -> None:
    model = net()
    want = copy.deepcopy(model)
    step = compiled(model)
    opt = elmo.optim.SGD(model.encoder.parameters(), 0.1)
    opt.add_param_group({"params": model.head.parameters(), "lr": 0.7, "momentum": 0.5})
    groups = [
        {"params": want.encoder.parameters()},
        {"params": want.head.parameters(), "lr": 0.7, "momentum": 0.5},
    ]
    train(want, torch.optim.SGD(groups, 0.1), 3)
    train(step, opt, 3)
    assert_same(model, want)
    assert elmo.is_fused(model.head.weight)

    model = net()
    step = compiled(model)
    unfused = [{"params": model.head.parameters(), "fused": False}]
    opt = elmo.optim.SGD([{"params": model.encoder.parameters()}, *unfused], 0.5)
    want = reference(model, 2)
    with pytest.warns(UserWarning, match="no head's update was fused"):
        train(step, opt, 2)
    assert_same(model, want)


def test_loading_an_optimizer_does_not_change_how_it_updates() -> None:
    model = net()
    step, opt = owned(model, momentum=0.9)
    train(step, opt, 1)
    state = opt.state_dict()
    opt = elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=False)
    opt.load_state_dict(state)
    train(step, opt, 1, start=1)
    assert not elmo.is_fused(model.head.weight)
    assert_same(model, reference(net(), 2, momentum=0.9))


@pytest.mark.parametrize("what", ["kernel", "half"])
def test_a_backward_that_dies_leaves_the_weight_marked(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    step, opt = owned(model, momentum=0.9)
    train(step, opt, 1)
    saved, saved_opt = copy.deepcopy((model.state_dict(), opt.state_dict()))
    real = aten.backward_update

    def dies(problem, *args, **kwargs):
        if what == "half":
            problem.w_LD[:3] += 1
        raise MemoryError("out of memory")

    monkeypatch.setattr(aten, "backward_update", dies)
    with pytest.raises(MemoryError):
        step(*batch(1)).backward()
    monkeypatch.setattr(aten, "backward_update", real)
    for forbidden in (opt.step, opt.state_dict, lambda: step(*batch(1)).backward()):
        with pytest.raises(FusedUpdateError, match="inconsistent"):
            forbidden()
    model.load_state_dict(saved)
    opt.load_state_dict(saved_opt)
    opt.zero_grad()
    step(*batch(1)).backward()
    opt.step()
    assert_same(model, reference(net(), 2, momentum=0.9))


def test_named_parameters_are_named_in_messages() -> None:
    model = net()
    step = compiled(model)
    opt = elmo.optim.SGD(model.named_parameters(), 0.5)
    step(*batch()).backward()
    with pytest.raises(FusedUpdateError, match=r"head\.weight"):
        step(*batch()).backward()
    del opt


@pytest.mark.parametrize("update_at", ["step", "backward"])
def test_a_weight_without_a_name_is_given_that_of_the_graph(update_at: str) -> None:
    gc.collect()  # Weights of other tests have the name, too.
    model = net()
    step, opt = owned(model, update_at=update_at)
    train(step, opt, 1)
    report = elmo.last_report()
    (match,) = report.matches
    assert match.name == next(iter(opt.counters()))
    assert match.name.startswith("head.weight")
    assert match.name in report.updates
    assert f"Head 1, {match.name}: cross_entropy" in str(report)
    assert ("in opt.step()" in str(report)) == match.at_step == (update_at == "step")
    run, other = owned(net())
    train(run, other, 1)
    assert list(other.counters()) == ["head.weight (#2)"]
    (explained,) = elmo.explain(net(), *batch(), options=EAGER).matches
    assert explained.name == "head.weight"


def test_deferred_logits_are_named() -> None:
    head = net().head
    opt = elmo.optim.SGD(head.parameters(), 0.5)
    compiled(head)(torch.randn(6, 8))
    (match,) = elmo.last_report().matches
    assert match.loss == "linear"
    assert match.name.startswith("weight")
    del opt


@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize("order", ["zero first", "zero before backward"])
def test_a_closure_is_called_once(update_at: str, order: str) -> None:
    """As Lightning's automatic optimisation trains."""
    model = net()
    want = reference(model, 3)
    step, opt = owned(model, update_at=update_at)
    assert opt.step(lambda: 7.0) == 7.0  # one that does nothing: Lightning's manual optimisation
    losses = []
    for number in range(3):

        def closure(number: int = number) -> torch.Tensor:
            if order == "zero first":
                opt.zero_grad()
            loss = step(*batch(number))
            if order != "zero first":
                opt.zero_grad()
            loss.backward()
            return loss

        with torch.no_grad():  # some call it so
            losses.append(opt.step(closure))
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 3
    assert all(torch.isfinite(loss) for loss in losses)  # type: ignore[arg-type]


def test_logits_of_a_closure_are_kept_as_others_are() -> None:
    model: Any = net()
    run: Any = torch.compile(
        model.logits, backend="elmo", options={**EAGER, "deferred_logits": True}
    )
    opt = elmo.optim.SGD(model.parameters(), lr=50.0, fused=False)
    inputs, labels = batch()
    made = []

    def closure() -> torch.Tensor:
        made.append((run(-inputs), model.logits(-inputs).argmax(-1)))  # no loss looks at these
        loss = torch.nn.functional.cross_entropy(model.logits(inputs), labels)
        loss.backward()
        return loss

    opt.step(closure)
    ((logits, expected),) = made
    assert not torch.equal(model.logits(-inputs).argmax(-1), expected)
    assert torch.equal(logits.argmax(-1), expected)


def test_a_closure_that_accumulates() -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model, update_at="step", accumulate="stash", max_norm=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.5)

    def closure(run: Any, own: Any) -> Any:
        own.zero_grad()
        for number in range(3):
            loss = run(*batch(number)) / 3
            loss.backward()
        return loss

    opt.step(lambda: closure(step, opt))
    closure(twin, plain)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    plain.step()
    assert_same(model, twin)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_weight_written_to_between_forward_and_backward(update_at: str, kind: str) -> None:
    model = net(kind)
    step, opt = owned(model, update_at=update_at)
    train(step, opt, 1)
    loss = step(*batch(1))
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    before = model.head.weight.detach().clone()
    with pytest.raises(FusedUpdateError, match="modified in place between forward and backward"):
        loss.backward()
    assert torch.equal(model.head.weight, before)
    opt.zero_grad()
    del loss
    want = reference(model, 2)
    train(step, opt, 2)
    assert_same(model, want)


def test_features_gradients_are_not_taken_at_a_changed_weight() -> None:
    model = net()
    step, _ = owned(model)
    loss = step(*batch(0))
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    with pytest.raises(FusedUpdateError, match="modified in place"):
        torch.autograd.grad(loss, model.encoder.weight)


@pytest.mark.parametrize(
    "how", [{"update_at": "step", "accumulate": "stash"}, {"accumulate": "step_each"}]
)
def test_an_optimizer_kept_alive_by_its_scheduler_is_told_of(how: dict) -> None:
    model = net()
    step, opt = owned(model, **how)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    train(step, opt, 1)
    del opt
    other = torch.optim.SGD(model.parameters(), 0.5)
    with pytest.warns(UserWarning, match=r"SGD steps the head weight head\.weight"):
        train(step, other, 3)
    del schedule


def test_another_optimizer_may_step_before_the_owner() -> None:
    model = net()
    step, opt = owned(model, update_at="step")
    other = torch.optim.SGD(model.parameters(), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            step(*batch(i)).backward()
            other.step()
            other.zero_grad()
            opt.step()


def test_two_optimizers_of_a_matrix_that_is_no_head() -> None:
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    first, second = (elmo.optim.SGD(model.parameters(), lr) for lr in (0.1, 0.2))
    both = (torch.optim.SGD(twin.parameters(), lr) for lr in (0.1, 0.2))
    x = torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for of, opts in ((model, (first, second)), (twin, both)):
            of(x).sum().backward()
            for opt in opts:
                opt.step()
    assert_same(model, twin)


def test_zeros_left_by_an_eager_warm_up_are_no_gradient() -> None:
    model = net()
    want = reference(model, 3, momentum=0.9, weight_decay=0.01)
    step, opt = owned(model, momentum=0.9, weight_decay=0.01)
    for run, number in ((model, 0), (step, 1), (step, 2)):
        run(*batch(number)).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    assert model.head.weight.grad is not None
    assert_same(model, want)
