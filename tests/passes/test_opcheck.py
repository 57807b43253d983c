"""torch.library.opcheck of each op the rewrite writes into a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import elmo_compile as elmo
from elmo_compile import ops
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.ops.fused import open_call
from elmo_compile.ops.owners import owner_of

ops.load()
N, D, L = 4, 5, 33
CONFIG = (1.0, 1, 7, torch.float32)
FUNCTIONAL = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CONTRACT = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def head():
    x = torch.randn(N, D, requires_grad=True)
    w = torch.randn(L, D, requires_grad=True)
    b = torch.randn(L, requires_grad=True)
    return x, w, b


TARGETS = {
    "classes": (CE, lambda: (torch.randint(0, L, (N,)), None)),
    "dense": (BCE, lambda: (torch.rand(N, L), None)),
    "padded": (BCE, lambda: (torch.tensor([[1, -1], [2, 2], [-1, -1], [32, 0]]), None)),
    "flat": (BCE, lambda: (torch.tensor([3, 3, 5]), torch.tensor([0, 1, 1, 3, 3]))),
}


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_loss(form, reduction):
    name, make = TARGETS[form]
    target, aux = make()
    spec = LossSpec(name=name, targets=form, reduction=reduction).encode()
    args = (*head(), target, aux, None, spec, *CONFIG)
    torch.library.opcheck(torch.ops.elmo.head_loss.default, args, test_utils=FUNCTIONAL)


def test_head_loss_backward():
    x, w, b = (tensor.detach() for tensor in head())
    spec = LossSpec(name=CE, targets="classes").encode()
    target, stats = torch.randint(0, L, (N,)), torch.randn(2, N)
    args = (torch.ones(()), x, w, b, target, None, stats, spec, *CONFIG, True, True, True)
    for wide_dw in (False, True):
        op = torch.ops.elmo.head_loss_backward.default
        torch.library.opcheck(op, (*args, wide_dw), test_utils=FUNCTIONAL)


def test_fused_head_loss():
    """Its backward writes into the weight, so only its contract is checked."""
    w = nn.Parameter(torch.randn(L, D))
    optimizer = elmo.optim.SGD([w], lr=0.1)
    owner = owner_of(w)
    assert owner is not None
    x, _, b = head()
    spec = LossSpec(name=CE, targets="classes").encode()
    args = (x, b, torch.randint(0, L, (N,)), None, *open_call(owner), spec, *CONFIG, False)
    torch.library.opcheck(torch.ops.elmo.fused_head_loss.default, args, test_utils=CONTRACT)
    del optimizer


def test_lowp_linear():
    x, w, b = head()
    carrier = torch.zeros((), requires_grad=True).expand(L, D)
    args = (x, w.detach().bfloat16(), b, carrier)
    torch.library.opcheck(torch.ops.elmo.lowp_linear.default, args, test_utils=CONTRACT)
    # opcheck compares arguments before and after, which torch cannot do for fp8 on a CPU.
    args = (x, w.detach().to(torch.float8_e4m3fn), b, carrier)
    torch.library.opcheck(torch.ops.elmo.lowp_linear.default, args, test_utils="test_faketensor")


def test_multi_hot():
    for args in (
        (torch.tensor([[1, -1], [2, 2]]), L, None),
        (torch.tensor([3, 3, 5]), L, torch.tensor([0, 1, 3])),
    ):
        torch.library.opcheck(torch.ops.elmo.multi_hot.default, args, test_utils=FUNCTIONAL)
