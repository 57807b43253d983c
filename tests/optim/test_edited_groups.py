"""Parameter groups whose lists are changed by hand after the optimizer was made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import assert_same, batch, net, owned, reference, train

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, OptionError


def with_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def test_an_appended_parameter_is_updated() -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    own = elmo.optim.SGD([model.weight], 0.5, fused=False)
    theirs = torch.optim.SGD([twin.weight], 0.5)
    for opt, of in ((own, model), (theirs, twin)):
        opt.param_groups[0]["params"].append(of.bias)
        with_gradients(of)
        opt.step()
    assert_same(model, twin)
    assert own.param_groups[0]["param_ids"] == [0, 1]
    again = elmo.optim.SGD(model.parameters(), 0.5, fused=False)
    again.load_state_dict(own.state_dict())
    assert again.param_groups[0]["param_ids"] == [0, 1]


def test_a_parameter_keeps_its_rounding_stream_when_others_leave_and_return() -> None:
    first, second = (nn.Parameter(torch.zeros(3).bfloat16()) for _ in range(2))
    opt = elmo.optim.SGD([first, second], 0.5)
    group = opt.param_groups[0]
    group["params"] = [second]
    opt.step()
    assert group["param_ids"] == [1]
    group["params"] = [first, second, nn.Parameter(torch.zeros(2))]
    assert opt.state_dict()["param_groups"][0]["param_ids"] == [0, 1, 2]


def test_frozen_parameters_may_be_taken_out() -> None:
    model = net()
    want = reference(model, 3)
    step, opt = owned(model)
    train(step, opt, 3)
    assert_same(model, want)
    model.head.weight.requires_grad_(False)
    group = opt.param_groups[0]
    group["params"] = [p for p in group["params"] if p.requires_grad]
    before = model.head.weight.detach().clone()
    train(step, opt, 2)
    assert torch.equal(model.head.weight, before)
    assert not elmo.is_fused(model.head.weight)


def test_a_matrix_that_was_never_a_head_may_be_taken_out() -> None:
    model = nn.Linear(3, 2)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    opt.param_groups[0]["params"] = [model.bias]
    with_gradients(model)
    opt.step()


def test_a_head_taken_out_between_backward_and_step_is_an_error() -> None:
    model = net()
    step, opt = owned(model)
    step(*batch(0)).backward()
    opt.param_groups[0]["params"] = [model.head.bias]
    with pytest.raises(FusedUpdateError, match="removed from its optimizer's param_groups"):
        opt.step()


def test_compensated_rows_by_default_leave_groups_without_a_matrix_alone() -> None:
    model = nn.Linear(3, 4).bfloat16()
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    opt = elmo.optim.SGD(groups, 0.5, kahan_rows=2, fused=False)
    with_gradients(model)
    opt.step()
    assert opt.state[model.weight]["compensation"].shape == (2, 3)
    with pytest.raises(OptionError, match="without a matrix"):
        elmo.optim.SGD([{"params": [model.bias], "kahan_rows": 2}], 0.5)


@pytest.mark.parametrize(
    "written",
    [{"max_norm": 0.01}, {"nonfinite": "skip"}, {"accumulate": "stash"}, {"fused": False}],
    ids=str,
)
@pytest.mark.parametrize("when", ["before the forward", "before the step"])
def test_what_the_constructor_refuses_may_not_be_written_either(written: dict, when: str) -> None:
    """A clipped group whose head was not; `fused=False` that changed nothing."""
    model = net()
    step, opt = owned(model)
    train(step, opt, 1)
    if when == "before the step":
        step(*batch()).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.param_groups[0].update(written)
    use = opt.step if when == "before the step" else lambda: step(*batch())
    with pytest.raises(OptionError, match=next(iter(written))):
        use()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
