"""torch.library.opcheck of each op the rewrite writes into a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import elmo_compile as elmo
from elmo_compile import ops
from elmo_compile.config import Options
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.ops.fused import open_call
from elmo_compile.ops.owners import owner_of
from elmo_compile.passes.pipeline import analyze
from elmo_compile.runtime import CompiledGraph

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


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("rows", [0, 2])
def test_head_loss_at_once(form, rows):
    name, make = TARGETS[form]
    spec = LossSpec(name=name, targets=form).encode()
    config = (spec, *CONFIG[:-1], rows, CONFIG[-1], True, True, True)
    args = (*head(), *make(), None, *config)
    torch.library.opcheck(torch.ops.elmo.head_loss_at_once.default, args, test_utils=FUNCTIONAL)


def test_scaled():
    args = (torch.randn(L, D), torch.tensor(0.5))
    torch.library.opcheck(torch.ops.elmo.scaled.default, args, test_utils=FUNCTIONAL)


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
    config = (spec, *CONFIG, False, False)
    args = (x, b, torch.randint(0, L, (N,)), None, *open_call(owner), *config)
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


class Arguments(torch.fx.Interpreter):
    """Runs a graph up to a call of one op, and keeps what it is called with."""

    def __init__(self, module, target):
        super().__init__(module)
        self.wanted, self.found = target, None

    def call_function(self, target, args, kwargs):
        if target is self.wanted:
            self.found = args
        return super().call_function(target, args, kwargs)


def program_call(fused):
    """Arguments of the op that a loss without kernels of its own becomes."""
    torch._dynamo.reset()
    x, w, _ = head()
    w = nn.Parameter(w.detach())
    optimizer = elmo.optim.SGD([w], lr=0.1) if fused else None
    found = []

    def backend(gm, inputs):
        options = Options(min_outputs=16, lower="eager", chunk_size=7)
        compiled = CompiledGraph(analyze(gm, options), inputs, options)
        arguments = Arguments(compiled.first.module, PROGRAMS[fused])
        arguments.run(*compiled._arguments(compiled.first, inputs))
        found.append(arguments.found)
        return gm

    y = torch.randint(0, L, (N,))
    step = torch.compile(
        lambda x, w: F.cross_entropy(x @ w.t(), y, label_smoothing=0.1), backend=backend
    )
    step(x, w)
    return found[0], optimizer


PROGRAMS = {
    False: torch.ops.elmo.head_program.default,
    True: torch.ops.elmo.fused_head_program.default,
}


@pytest.mark.parametrize("fused", [False, True])
def test_head_program(fused):
    args, optimizer = program_call(fused)
    torch.library.opcheck(PROGRAMS[fused], args, test_utils=CONTRACT if fused else FUNCTIONAL)
    del optimizer


@pytest.mark.parametrize("name", ["fused_head_loss", "fused_head_program"])
def test_fused_ops_stay_out_of_cuda_graphs(name):
    """Of those Inductor makes: a replay would tell the owner nothing of what it did."""
    for op in (name, f"{name}_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.elmo, op).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.elmo.head_loss.default.tags
