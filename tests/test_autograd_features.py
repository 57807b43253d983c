"""Promise 2 with the rest of autograd: checkpoints, saved-tensor hooks, upstream gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import (
    EAGER,
    INDUCTOR,
    LABELS,
    assert_same,
    batch,
    net,
    owned,
    reference,
    train,
    updates,
)

LOWERINGS = [pytest.param(EAGER, id="eager"), pytest.param(INDUCTOR, id="inductor")]


@pytest.mark.parametrize("options", LOWERINGS)
@pytest.mark.parametrize("where", ["inside", "outside", "outside reentrant"])
def test_activation_checkpointing_updates_once(options: dict, where: str) -> None:
    model = net("bce")
    want = reference(model, 2)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, *args, use_reentrant=False)

    step, opt = owned(Checkpointed() if where == "inside" else model, options)
    for i in range(2):
        if where == "inside":
            loss = step(*batch(i))
        else:
            inputs, labels = batch(i)
            inputs.requires_grad_()
            loss = checkpoint(step, inputs, labels, use_reentrant=where.endswith("reentrant"))
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 2


@pytest.mark.parametrize("options", LOWERINGS)
@pytest.mark.parametrize("logits", ["kept in", "deferred"])
def test_a_loss_without_kernels_of_its_own_compiled_inside_a_checkpoint(
    options: dict, logits: str
) -> None:
    """What is saved while compiling is not counted as saved by the first forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, LABELS))
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(0, LABELS, (6,))

    def loss(run: nn.Module) -> torch.Tensor:
        return F.cross_entropy(run(x), y, label_smoothing=0.1)

    (want,) = torch.autograd.grad(loss(model), x)
    if logits == "deferred":
        run = torch.compile(model, backend="elmo", options=options)
        made = checkpoint(lambda x: loss(run), x, use_reentrant=False)
    else:
        whole = torch.compile(lambda x: loss(model), backend="elmo", options=options)
        made = checkpoint(whole, x, use_reentrant=False)
    (got,) = torch.autograd.grad(made, x)
    torch.testing.assert_close(got, want)


def test_saved_tensor_hooks() -> None:
    model = net()
    want = reference(model, 2)
    step, opt = owned(model)
    with torch.autograd.graph.save_on_cpu():
        train(step, opt, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        loss = step(*batch(1))
        loss.backward()
        opt.step()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 2


def test_compiled_autograd() -> None:
    model = net()
    want = reference(model, 2)
    step, opt = owned(model)
    for i in range(2):
        loss = step(*batch(i))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        opt.step()
        opt.zero_grad()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 2


@pytest.mark.parametrize("options", LOWERINGS)
def test_create_graph_raises(options: dict) -> None:
    model = net()
    before = model.head.weight.detach().clone()
    step, opt = owned(model, options)
    with pytest.raises(RuntimeError):
        step(*batch()).backward(create_graph=True)
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("options", LOWERINGS)
def test_upstream_gradients(options: dict) -> None:
    model = net(reduction="none")
    twin = copy.deepcopy(model)
    step, opt = owned(model, options)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    weights = torch.linspace(-1, 2, 6)
    for reduce in (
        lambda rows: (rows * weights).sum() * 3,
        lambda rows: rows.sum(),  # a stride of 0
        lambda rows: rows[::2].mean(),
    ):
        for run, stepper in ((step, opt), (twin, other)):
            reduce(run(*batch())).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same(model, twin)


def test_a_scaled_loss() -> None:
    model = net("bce")
    twin = copy.deepcopy(model)
    step, opt = owned(model)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for run, stepper in ((step, opt), (twin, other)):
        (run(*batch()) * -7.0).backward()
        stepper.step()
    assert_same(model, twin)


def test_the_bias_gets_a_gradient_and_is_updated_by_step() -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = owned(model)
    twin(*batch()).backward()
    step(*batch()).backward()
    torch.testing.assert_close(model.head.bias.grad, twin.head.bias.grad)
    before = model.head.bias.detach().clone()
    opt.step()
    torch.testing.assert_close(model.head.bias.detach(), before - 0.5 * twin.head.bias.grad)


def test_sparse_gradients_of_an_embedding() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.EmbeddingBag(20, 8, sparse=True)
            self.head = nn.Linear(8, LABELS)

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.embed(tokens)), labels)

    torch.manual_seed(0)
    model = Bag()
    twin = copy.deepcopy(model)
    step, opt = owned(model)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    tokens = torch.randint(0, 20, (6, 4))
    for run, stepper in ((step, opt), (twin, other)):
        for i in range(3):
            run(tokens, batch(i)[1]).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same(model, twin)
    assert updates(opt, model.head.weight) == 3
