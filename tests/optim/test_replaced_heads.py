"""Who updates a weight when models and optimizers are copied, moved, reloaded and replaced."""

from __future__ import annotations

import copy
import pickle
import warnings

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


def test_a_deepcopied_model_is_not_owned() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    twin = copy.deepcopy(model)
    before = model.head.weight.detach().clone()
    run = torch.compile(twin, backend="elmo", options=EAGER)
    run(*batch(1)).backward()
    assert twin.head.weight.grad is not None
    assert torch.equal(model.head.weight, before)
    assert not elmo.is_fused(twin.head.weight)
    assert updates(opt, model.head.weight) == 1


def test_a_deepcopied_optimizer_owns_the_copies() -> None:
    model = net()
    step, opt = owned(model, momentum=0.9)
    train(step, opt, 2)
    want = reference(model, 0)
    twin, opt2 = copy.deepcopy((model, opt))
    run = compiled(twin)
    train(run, opt2, 2)
    assert updates(opt2, twin.head.weight) == 4
    assert updates(opt, model.head.weight) == 2
    assert_same(model, want)
    step = compiled(model)
    train(step, opt, 2)
    assert_same(model, twin)


def test_a_pickled_optimizer() -> None:
    model = net()
    _, opt = owned(model, momentum=0.9)
    twin, opt2 = pickle.loads(pickle.dumps((model, opt)))
    train(compiled(twin), opt2, 2)
    assert_same(twin, reference(model, 2, momentum=0.9))
    assert updates(opt2, twin.head.weight) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_the_model_to_another_dtype(dtype: torch.dtype) -> None:
    model = net()
    step, opt = owned(model, momentum=0.9)
    train(step, opt, 1)
    model.to(dtype)
    want = copy.deepcopy(model)
    inputs, labels = batch(1)
    for _ in range(2):
        step(inputs.to(dtype), labels).backward()
        opt.step()
        opt.zero_grad()
    assert updates(opt, model.head.weight) == 3
    assert model.head.weight.grad is None
    assert opt.state[model.head.weight]["momentum_buffer"].dtype == dtype
    assert not torch.equal(model.head.weight, want.head.weight)


def test_load_state_dict_keeps_the_owner() -> None:
    model, source = net(), net(seed=9)
    step, opt = owned(model)
    train(step, opt, 1)
    model.load_state_dict(source.state_dict())
    step(*batch(0)).backward()
    opt.step()
    assert_same(model, reference(source, 1))
    assert updates(opt, model.head.weight) == 2


def test_load_state_dict_assign_warns_once_and_step_raises() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    state = {k: v.clone() for k, v in net(seed=9).state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.warns(UserWarning, match="no elmo_compile optimizer owns") as caught:
        loss, _ = step(*batch(1)), step(*batch(2))
    assert len(caught) == 1
    loss.backward()
    assert model.head.weight.grad is not None
    with pytest.raises(FusedUpdateError, match="was replaced"):
        opt.step()
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    opt.zero_grad()
    train(step, opt, 1)
    assert updates(opt, model.head.weight) == 1


@pytest.mark.parametrize("how", ["new", "deepcopy"])
def test_another_model_of_the_class_is_no_replacement(how: str) -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    other = net(seed=4) if how == "new" else copy.deepcopy(model)
    want = reference(other, 2)
    run = torch.compile(other, backend="elmo", options=EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, torch.optim.SGD(other.parameters(), 0.5), 2)
        opt.step()
        train(step, opt, 1)
    assert_same(other, want)
    assert updates(opt, model.head.weight) == 2


def test_a_new_head_module_is_a_replacement() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    model.head = net(seed=9).head
    with pytest.warns(UserWarning, match="no module has the former one any more"):
        step(*batch(1)).backward()
    with pytest.raises(FusedUpdateError, match="was replaced"):
        opt.step()


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_new_head_that_is_added_is_fused_from_its_next_forward(update_at: str) -> None:
    model = net()
    step, opt = owned(model, update_at=update_at)
    train(step, opt, 1)
    model.head = net(seed=9).head
    with pytest.warns(UserWarning, match="no module has the former one any more"):
        earlier = step(*batch(0))
    want = reference(model, 3)
    opt.add_param_group({"params": model.head.parameters()})
    earlier.backward()  # of a forward that was not fused: an ordinary gradient
    assert model.head.weight.grad is not None
    opt.step()
    opt.zero_grad()
    assert not elmo.is_fused(model.head.weight)
    train(step, opt, 2, start=1)
    assert elmo.is_fused(model.head.weight)
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 3


def test_a_backward_of_before_a_new_head_was_added_beside_a_fused_one() -> None:
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    model.head = net(seed=9).head
    with pytest.warns(UserWarning, match="no module has the former one any more"):
        earlier = step(*batch(0))
    opt.add_param_group({"params": model.head.parameters()})
    step(*batch(1)).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()
    opt.step()
    assert updates(opt, model.head.weight) == 1


def test_an_averaged_copy_evaluated_without_gradients() -> None:
    model = net()
    step, opt = owned(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    run = torch.compile(average, backend="elmo", options=EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2):
            step(*batch(i)).backward()
            opt.step()
            opt.zero_grad()
            average.update_parameters(model)
            with torch.no_grad():
                run(*batch(i))
    assert updates(opt, model.head.weight) == 2
