"""What stands around a head: modules, other heads, checkpoints, autocast, grad modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    assert_near,
    assert_same,
    bias,
    classes,
    compiled,
    dense,
    features,
    matches,
    refusals,
    rows,
    run,
    weight,
)
from torch.utils.checkpoint import checkpoint

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(D, D)
            self.head = torch.nn.Linear(D, L)
            self.loss = torch.nn.CrossEntropyLoss()

        def forward(self, x, y):
            return self.loss(self.head(torch.relu(self.encoder(x))), y)

    model = Model()
    before = [set(vars(module)) for module in model.modules()]
    x, y = features(), classes()
    model(x, y).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    compiled(model)(x, y).backward()
    assert len(matches()) == 1
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    # `_is_torch_compile` is torch.compile's own, whatever the backend.
    after = [set(vars(module)) - {"_is_torch_compile"} for module in model.modules()]
    assert after == before


def test_two_heads_and_one_head_twice():
    args = (features(), weight(), weight(), classes(), dense())
    assert_same(lambda x, w, v, y, t: ce(F.linear(x, w), y) + bce(F.linear(x, v), t), args, count=2)
    args = (features(), weight(), classes())
    assert_same(
        lambda x, w, y: ce(F.linear(x, w), y) + ce(F.linear(2 * x, w), y.flip(0)), args, count=2
    )


def test_tied_embedding():
    assert_same(lambda x, w, y: ce(F.linear(x + F.embedding(y, w), w), y.flip(0)), rows())


CHECKPOINTED: dict[str, Callable[..., Any]] = {
    "not_reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "nested": lambda f, x: checkpoint(
        lambda x: checkpoint(f, x * 2, use_reentrant=False), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("form", CHECKPOINTED)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_inside_checkpoint(form, lower):
    def program(x, w, y):
        return CHECKPOINTED[form](lambda x: ce(F.linear(torch.tanh(x), w), y), x)

    assert_same(program, rows(), lower=lower)


def test_two_checkpoints_of_one_function():
    def program(x, w, y):
        def loss(x):
            return ce(F.linear(torch.tanh(x), w), y)

        first = checkpoint(loss, x, use_reentrant=False)
        return first + checkpoint(loss, 2 * x, use_reentrant=False)

    assert_same(program, rows(), count=2)


def bf16_inside(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ce(F.linear(x, w), y)


def bf16_product_only(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = x @ w.t()
    return ce(z.to(y.new_empty((), dtype=x.dtype).dtype), y)


def bf16_loss_only(x, w, y):
    z = F.linear(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ce(z, y)


def bf16_switched_off(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        return ce(F.linear(x, w), y)


def bf16_behind_another_device(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cuda", enabled=False):
        return ce(F.linear(x, w), y)


def f16_inside(x, w, y):
    with torch.autocast("cpu", dtype=torch.float16):
        return ce(F.linear(x, w), y)


def bf16_checkpoint(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return checkpoint(lambda x: ce(F.linear(x, w), y), x, use_reentrant=False)


AUTOCAST = {
    "inside": (bf16_inside, torch.bfloat16),
    "product_only": (bf16_product_only, torch.bfloat16),
    "loss_only": (bf16_loss_only, torch.float32),
    "switched_off": (bf16_switched_off, torch.float32),
    "behind_another_device": (bf16_behind_another_device, torch.bfloat16),
    "float16": (f16_inside, torch.float32),
    "checkpoint": (bf16_checkpoint, torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name):
    program, computed_in = AUTOCAST[name]
    narrow = torch.bfloat16 if computed_in == torch.bfloat16 else None
    assert_same(program, rows(), exact=lambda x, w, y: ce(F.linear(x, w), y), precision=narrow)
    assert matches()[0].compute_dtype == computed_in


def test_autocast_around_the_call():
    args = rows()
    truth = run(lambda x, w, y: ce(F.linear(x, w), y), args, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = run(lambda x, w, y: ce(F.linear(x, w), y), args)
        ours = run(compiled(lambda x, w, y: ce(F.linear(x, w), y)), args)
    assert matches()[0].compute_dtype == torch.bfloat16
    assert_near(ours, eager, truth, torch.bfloat16)


def test_bf16_weight_and_features():
    args = (features(), weight(), classes())
    assert_same(
        lambda x, w, y: ce(F.linear(x.bfloat16(), w.bfloat16()).float(), y),
        args,
        exact=lambda x, w, y: ce(F.linear(x, w), y),
        precision=torch.bfloat16,
    )
    assert matches()[0].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("inside", [False, True])
def test_no_grad(inside):
    def program(x, w, y):
        with torch.set_grad_enabled(not inside):
            return ce(F.linear(x, w), y)

    with torch.set_grad_enabled(inside):
        assert_same(program, rows())


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_frozen_parts(frozen):
    args = tuple(
        arg.detach() if position in frozen else arg
        for position, arg in enumerate((features(), weight(), bias(), classes()))
    )
    assert_same(lambda x, w, b, y: ce(F.linear(torch.sin(x), w, b), y), args)


def test_loss_in_half_and_in_integers():
    x, w, y = rows()
    frozen = (x.detach(), w.detach(), y)
    assert_same(lambda x, w, y: ce(F.linear(x, w), y).half(), frozen)
    cut = compiled(lambda x, w, y: (ce(F.linear(x, w), y) * 1000).to(torch.int64))(*frozen)
    assert cut.dtype == torch.int64
    assert abs(int(cut) - int(ce(F.linear(frozen[0], frozen[1]), y) * 1000)) <= 1
    assert len(matches()) == 1


def taught(x, w, v):
    """A student by what its teacher finds best; the teacher's product alone is under no_grad."""
    z = F.linear(x, w)
    with torch.no_grad():
        t = F.linear(x.detach(), v)
    values, places = t.log_softmax(-1).topk(4, -1)
    return (values.exp() * (values - z.log_softmax(-1).gather(-1, places))).sum(-1).mean()


def test_a_frozen_teacher_may_be_read_in_another_grad_mode():
    assert_same(taught, (features(), weight(), weight().detach()), count=2)


def test_a_teacher_that_takes_gradients_may_not():
    """Its product would leave the no_grad block."""
    args = (features(), weight(), weight())
    ours, eager = run(compiled(taught), args), run(taught, args)
    (refusal,) = refusals()
    assert "no_grad block" in refusal.remedy
    torch.testing.assert_close(ours.loss, eager.loss)
    for mine, theirs in zip(ours.grads[:2], eager.grads[:2]):
        torch.testing.assert_close(mine, theirs)
    assert ours.grads[2] is None
    assert eager.grads[2] is None
