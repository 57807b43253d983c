"""Promise 4: nothing is fused that would change the result; a real gradient appears instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from training import (
    EAGER,
    INDUCTOR,
    Tied,
    assert_same,
    batch,
    net,
    owned,
    reference,
    train,
    updates,
)

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hooked_weight_gets_a_real_gradient(hook: str) -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    train(step, opt, 1)
    train(twin, other, 1)
    seen: list[torch.Tensor] = []

    def watch(value: torch.Tensor) -> None:
        grad = value.grad if hook.endswith("accumulate_grad_hook") else value
        seen.append(grad.detach().clone())

    handle = getattr(model.head.weight, hook)(watch)
    step(*batch(1)).backward()
    twin(*batch(1)).backward()
    torch.testing.assert_close(seen, [twin.head.weight.grad])
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    for each in (opt, other):
        each.step()
        each.zero_grad()
    handle.remove()
    train(step, opt, 1)
    train(twin, other, 1)
    assert_same(model, twin)
    assert updates(opt, model.head.weight) == 3


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one gloo rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("outside", [True, False], ids=["ddp(compile)", "compile(ddp)"])
def test_distributed_data_parallel_gets_a_real_gradient(outside: bool) -> None:
    model = net()
    want = reference(model, 2)
    torch._dynamo.reset()
    ddp = nn.parallel.DistributedDataParallel
    if outside:
        step = ddp(torch.compile(model, backend="elmo", options=EAGER))
    else:
        step = torch.compile(ddp(model), backend="elmo", options=EAGER)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    with pytest.warns(UserWarning, match="no head's update was fused"):
        train(step, opt, 2)
    assert_same(model, want)
    assert not elmo.is_fused(model.head.weight)


@pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])
def test_tied_weights_get_a_real_gradient(options: dict) -> None:
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    step, opt = owned(model, options)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for run, stepper in ((step, opt), (twin, other)):
        for i in range(2):
            run(torch.arange(6), batch(i)[1]).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same(model, twin)
    assert not elmo.is_fused(model.head.weight)


def test_weights_that_share_memory_get_real_gradients() -> None:
    torch.manual_seed(0)
    model = Tied(alias=True)
    step, _ = owned(model)
    step(torch.arange(6), batch()[1]).backward()
    assert model.head.weight.grad is not None
    assert model.embed.weight.grad is not None


def test_a_second_use_outside_the_graph_is_named_by_step() -> None:
    model = net()
    step, opt = owned(model)
    before = model.encoder.weight.detach().clone()
    (step(*batch()) + model.head.weight.sum()).backward()
    with pytest.raises(FusedUpdateError, match=r"#2 \(48, 8\).*dense gradient"):
        opt.step()
    assert torch.equal(model.encoder.weight, before)
