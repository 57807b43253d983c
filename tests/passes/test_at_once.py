"""Which heads form their gradients in the forward, and that these are the gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import elmo_compile as elmo
from elmo_compile.planner import choose
from elmo_compile.report import store

N, D, L = 40, 24, 700
AT_ONCE = "elmo.head_loss_at_once"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Blocks of few rows, so that a small batch has several."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    store.clear()
    monkeypatch.setattr(choose, "FEWEST_ROWS", 2)
    monkeypatch.setattr(choose, "ROW_BLOCK_BYTES", 10 * L * 4)


class Model(nn.Module):
    def __init__(self, loss: str = "ce", reduction: str = "mean") -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.head = nn.Linear(D, L)
        self.loss, self.reduction = loss, reduction

    def forward(self, x, target):
        z = self.head(self.encoder(x))
        if self.loss == "ce":
            return F.cross_entropy(z, target, reduction=self.reduction)
        y = elmo.multi_hot(target[:, None], L)
        return F.binary_cross_entropy_with_logits(z, y, reduction=self.reduction)


def batch(rows: int = N):
    target = torch.randint(0, L, (rows,))
    return torch.randn(rows, D), target


def compiled(model, **options):
    options = {"min_outputs": 64, "lower": "eager", **options}
    return torch.compile(model, backend="elmo", options=options)


def op_used() -> bool:
    return AT_ONCE in str(elmo.last_report().graph_after.graph)


def assert_near(one, other) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def same_gradients(model, step, x, target, upstream=lambda loss: loss) -> None:
    twin = copy.deepcopy(model)
    ours, theirs = (v.clone().requires_grad_() for v in (x, x))
    loss, want = step(ours, target), twin(theirs, target)
    torch.testing.assert_close(loss, want)
    upstream(loss).backward()
    upstream(want).backward()
    assert_near(ours.grad, theirs.grad)
    for one, other in zip(model.parameters(), twin.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert_near(one.grad, other.grad)
    model.zero_grad()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients(loss, reduction, lower):
    model = Model(loss, reduction)
    step = compiled(model, lower=lower)
    same_gradients(model, step, *batch())
    assert op_used()
    (match,) = elmo.last_report().matches
    assert match.products == 3
    assert any("formed in the forward" in note for note in match.notes)
    assert any("rows at a time" in note for note in match.notes) == (loss == "ce")
    same_gradients(model, step, *batch(), lambda loss: loss * -2.5)
    same_gradients(model, step, *batch(), lambda loss: loss.log().sin())
    same_gradients(model, step, *batch(57))


def test_ignored_rows_and_none_that_count():
    model = Model()
    step = compiled(model)
    x, target = batch()
    target[3:30] = -100
    same_gradients(model, step, x, target)
    target[:] = -100
    loss = step(x, target)
    assert loss.isnan()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("size", [(600, 16, 203), (300, 1024, 1100)])
def test_a_batch_of_ignored_labels_has_gradients_of_zero(lower, size):
    """Its upstream gradient is infinite where the loss is divided by the labels that count."""
    rows, features, outputs = size
    weight = (torch.randn(outputs, features) * 0.25).requires_grad_()

    def loss_of(x, weight, y):
        total = F.cross_entropy(F.linear(x, weight), y, reduction="sum")
        return total / (y != -100).sum()

    step = compiled(loss_of, lower=lower)
    y = torch.full((rows,), -100)
    for loss in (loss_of, step):
        x = torch.randn(rows, features, requires_grad=True)
        made = loss(x, weight, y)
        assert made.isnan()
        made.backward()
        assert not x.grad.any()
        assert not weight.grad.any()
        x.grad = weight.grad = None
    assert op_used()


@pytest.mark.parametrize("frozen", ["head.weight", "head.bias", "encoder", "x"])
def test_frozen_parts(frozen):
    model = Model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x, target = batch()
    step = compiled(model)
    if frozen == "x":
        model.encoder.requires_grad_(False)
        twin = copy.deepcopy(model)
        step(x, target).backward()
        twin(x, target).backward()
        torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    else:
        same_gradients(model, step, x, target)
    assert op_used()
    assert elmo.last_report().matches[0].products == (2 if frozen in ("head.weight", "x") else 3)


def test_converted_heads_get_a_float32_gradient():
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        model = elmo.convert_head(Model(), dtype, name="head")
        step = compiled(model)
        x, target = batch()
        step(x, target).backward()
        assert op_used()
        weight = model.head.weight
        assert weight.grad.dtype == torch.float32
        dense = weight.detach().float().requires_grad_()
        F.cross_entropy(F.linear(model.encoder(x), dense, model.head.bias), target).backward()
        torch.testing.assert_close(weight.grad, dense.grad, atol=2e-4, rtol=0.05)


@pytest.mark.parametrize(
    "why", ["no_grad", "none", "chunk", "checkpoint", "fused", "float16", "few rows"]
)
def test_where_it_is_not_done(why):
    model = Model(reduction="none" if why == "none" else "mean")
    x, target = batch(4 if why == "few rows" else N)
    run = model
    options = {"chunk_size": 64} if why == "chunk" else {}
    optimizer = elmo.optim.SGD(model.parameters(), 0.1) if why == "fused" else None
    if why == "float16":
        model.half()
        x = x.half()
    if why == "checkpoint":

        def run(x, target):
            return checkpoint(model, x, target, use_reentrant=False)

    step = compiled(run, **options)
    with torch.set_grad_enabled(why != "no_grad"):
        loss = step(x, target).sum()
    if why != "no_grad":
        loss.backward()
    assert len(elmo.last_report().matches) == 1
    assert not op_used()
    del optimizer


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_second_derivatives_raise(lower):
    model = Model()
    step = compiled(model, lower=lower)
    x, target = batch()
    x.requires_grad_()

    def twice():
        (dx,) = torch.autograd.grad(step(x, target), [x], create_graph=True)
        dx.square().sum().backward()

    message = "second derivatives" if lower == "eager" else None  # AOTAutograd has its own
    with pytest.raises(RuntimeError, match=message):
        twice()


@pytest.mark.parametrize("loss", ["reduced", "rows", "general"])
def test_gradient_penalties_say_what_to_do(loss):
    """Also where the gradients are formed in the backward, whose op is differentiated then."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 300)
    y = torch.randint(0, 300, (6,))

    def fn(x):
        z = head(x)
        if loss == "general":
            return (z - 1).relu().sum()
        return F.cross_entropy(z, y, reduction="none" if loss == "rows" else "mean").sum()

    torch._dynamo.reset()
    options = {"lower": "eager", "min_outputs": 32, "strict": True}
    step = torch.compile(fn, backend="elmo", options=options)
    x = torch.randn(6, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(fn(x), [x])

    def twice():
        (dx,) = torch.autograd.grad(step(x), [x], create_graph=True)
        torch.testing.assert_close(dx, wanted)
        dx.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"second derivatives.*elmo_compile\.exclude"):
        twice()


def test_retain_graph():
    model = Model()
    step = compiled(model)
    loss = step(*batch())
    loss.backward(retain_graph=True)
    once = model.head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad, 2 * once)


def test_gradients_of_some_inputs():
    model = Model()
    step = compiled(model)
    x, target = batch()
    x.requires_grad_()
    (got,) = torch.autograd.grad(step(x, target), [x])
    (want,) = torch.autograd.grad(model(x, target), [x])
    torch.testing.assert_close(got, want)
    (dw,) = torch.autograd.grad(step(x, target), [model.head.weight])
    torch.testing.assert_close(dw, torch.autograd.grad(model(x, target), [model.head.weight])[0])


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("rows", [3, 37])
def test_float64_throughout(lower, rows):
    """Of both ops: 3 rows' gradients are made in the backward."""
    model = Model().double()
    twin = copy.deepcopy(model)
    step = compiled(model, lower=lower)
    x, target = batch(rows)
    loss, want = step(x.double(), target), twin(x.double(), target)
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)
    loss.backward()
    want.backward()
    for one, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-16)
