"""Promise 4: nothing is fused that would change the result; a real gradient appears instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import (
    EAGER,
    INDUCTOR,
    Tied,
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
    with pytest.warns(
        UserWarning, match=r"no head's update was fused: head\.weight.*: Distributed"
    ):
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
    with pytest.raises(FusedUpdateError, match=r"head weight head\.weight.*dense gradient"):
        opt.step()
    assert torch.equal(model.encoder.weight, before)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_beside_a_gradient_that_is_there_nothing_is_updated(kind: str) -> None:
    """Of a loss that was not fused, or of a step that nobody made."""
    model = net(kind)
    step, opt = owned(model)
    model(*batch(0)).backward()
    twin = copy.deepcopy(model)
    gradient = model.head.weight.grad.clone()
    with pytest.raises(FusedUpdateError, match=r"has a dense gradient.*zero_grad\(\)"):
        step(*batch(1)).backward()
    assert torch.equal(model.head.weight, twin.head.weight)
    assert torch.equal(model.head.weight.grad, gradient)
    opt.zero_grad(set_to_none=False)  # zeros are no gradient
    twin.zero_grad()
    step(*batch(1)).backward()
    opt.step()
    twin(*batch(1)).backward()
    torch.optim.SGD(twin.parameters(), 0.5).step()
    assert_same(model, twin)


class Halved(nn.Module):
    """A head whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = net().head

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, self.head.weight * 0.5), y)


class Sorted(Halved):
    """A head that is refused."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(x).sort(-1).values.sum()


class Broken(Halved):
    """A head whose logits another graph receives."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.head(x)
        torch._dynamo.graph_break()
        return z.sort(-1).values.sum()


class Normalized(nn.Module):
    """Features enter as rows of a matrix with as many columns as the layer before has outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.spoken, self.narrow = nn.Embedding(48, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.spoken(x)) @ F.normalize(self.spoken.weight, dim=-1).t()


def test_a_weight_that_is_computed_before_a_loss_outside_is_named() -> None:
    model = Normalized()
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    F.cross_entropy(compiled(model, min_outputs=32)(torch.arange(6)), torch.arange(6)).backward()
    assert "the weight is computed" in str(elmo.last_report())
    told = (
        r"spoken\.weight: the weight is computed, in an earlier graph; "
        r"narrow\.weight: it has 16 outputs"
    )
    with pytest.warns(UserWarning, match=told):
        opt.step()


class Recurrent(Halved):
    """Dynamo skips it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.rnn(x)[0]), y)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By the name of the head where a weight has two."""
    names = {param: name for name, param in model.named_parameters(remove_duplicate=False)}
    return [(name, param) for param, name in names.items()]


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (Tied, {}, r"head\.weight: something else in the graph reads the weight"),
        (lambda: Tied(alias=True), {}, r"head\.weight: another input .* shares .* memory"),
        (Halved, {}, r"head\.weight: the weight is computed in the graph"),
        (Sorted, {}, r"head\.weight: the head was left as it was \(.*sort"),
        (Broken, {}, r"head\.weight: its deferred logits were made as values: a function that"),
        (Halved, {"min_outputs": 100}, r"head\.weight: it has 48 outputs, below min_outputs=100"),
        pytest.param(
            Recurrent,
            {},
            r"Dynamo skipped the function .*nn\.GRU",
            marks=pytest.mark.skipif(
                tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15),
                reason="Dynamo traces RNNs there",
            ),
        ),
    ],
    ids=["tied", "alias", "computed", "refused", "made", "small", "skipped"],
)
def test_the_warning_names_the_reason(make: Any, options: dict[str, Any], why: str) -> None:
    model = make()
    step = compiled(model, **options)
    opt = elmo.optim.SGD(_named(model), 0.5)
    x = torch.arange(6) if isinstance(model, Tied) else torch.randn(6, 8)
    step(x, batch()[1]).backward()
    with pytest.warns(UserWarning, match="(?s)no head's update was fused: .*" + why):
        opt.step()


def test_the_warning_names_hooks() -> None:
    model = net()
    step, opt = owned(model)
    model.head.weight.register_hook(lambda grad: None)
    step(*batch()).backward()
    with pytest.warns(UserWarning, match="the weight has gradient hooks"):
        opt.step()


def test_a_frozen_head_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    """What trains is an adapter or an encoder."""
    model = net()
    model.head.requires_grad_(False)
    before = model.head.weight.clone()
    opt = elmo.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    step = compiled(model)
    for number in range(2):
        step(*batch(number)).backward()
        opt.step()
        opt.zero_grad()
    assert elmo.last_report().matches
    assert torch.equal(model.head.weight, before)
    assert not [w for w in recwarn if "elmo_compile" in str(w.message)]
