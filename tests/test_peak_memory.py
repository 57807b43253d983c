"""Promise 3: the logits never exist, nor, with a fused update, the weight's gradient.

Peak bytes of live tensors are counted in a whole training step, and eager is counted beside it: it
must exceed what the backend stays below, or the test could not fail. (The file is not named
test_memory.py: tests/planner has one.)
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend
from elmo_compile.report import store
from elmo_compile.testing.memory import PeakBytes, allocated_peak

BUDGET = {"lower": "eager", "memory_budget": "24MiB"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    store.clear()


class Model(nn.Module):
    def __init__(self, outputs: int, columns: int, loss: str, dtype=None) -> None:
        super().__init__()
        self.encoder = nn.Linear(columns, columns)
        self.head = nn.Linear(columns, outputs, bias=False)
        self.outputs, self.loss = outputs, loss

    def forward(self, x, target):
        z = self.head(torch.relu(self.encoder(x)))
        if self.loss == "ce":
            return F.cross_entropy(z, target)
        if self.loss == "smoothed":
            return F.cross_entropy(z, target, label_smoothing=0.1)
        if self.loss == "margin":  # Nobody's: it goes through the general mechanism.
            own = z.gather(1, target[:, None])
            return F.softplus(z - own + 0.5).sum(1).log1p().mean()
        y = elmo.multi_hot(target, self.outputs)
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / x.shape[0]


def targets(loss: str, rows: int, outputs: int):
    return torch.randint(0, outputs, (rows, 5) if loss == "bce" else (rows,))


def counted_step(model, optimizer, *, compiled: bool = True, budget: str = "24MiB"):
    """A training step, and what counts the bytes in it.

    Dynamo neither compiles nor runs compiled code under a dispatch mode, so the counter is entered
    inside what the backend returns, and around the backward and the update.
    """
    mode = PeakBytes()

    def backend(gm, inputs):
        run = elmo_backend(gm, inputs, options={**BUDGET, "memory_budget": budget})

        def counted(*args):
            with mode:
                return run(*args)

        return counted

    forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model

    def step(x, target):
        with contextlib.nullcontext() if compiled else mode:
            loss = forward(x, target)
        with mode:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, mode


def second_step(step, mode, x, target) -> int:
    """Peak bytes of the second of two steps."""
    step(x, target)
    mode.live = mode.peak = 0
    step(x, target)
    return mode.peak


def peaks(loss: str, rows: int, columns: int, outputs: int, make_optimizer) -> tuple[int, int]:
    """Peak bytes of a training step through the backend, and in eager."""
    model = Model(outputs, columns, loss)
    x, target = torch.randn(rows, columns), targets(loss, rows, outputs)
    mine = second_step(*counted_step(model, make_optimizer(model.parameters())), x, target)
    assert len(elmo.last_report().matches) == 1
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    return mine, second_step(*counted_step(model, plain, compiled=False), x, target)


@pytest.mark.parametrize("loss", ["ce", "bce", "smoothed", "margin"])
def test_logits_never_exist(loss):
    """The weight's gradient does (12 MiB); logits would be 98 MiB."""
    rows, columns, outputs = 256, 32, 100_000
    logits, gradient = rows * outputs * 4, columns * outputs * 4
    mine, eager = peaks(loss, rows, columns, outputs, lambda p: torch.optim.SGD(p, lr=0.1))
    assert eager >= 2 * logits
    assert gradient <= mine < logits / 2


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("loss", ["ce", "bce", "margin"])
def test_weight_gradient_never_exists_when_updated_at_the_step(loss, max_norm):
    """What backward keeps is N x D; nor do two micro-batches make a gradient."""
    rows, columns, outputs = 8, 256, 100_000
    gradient = columns * outputs * 4
    model = Model(outputs, columns, loss)
    x, target = torch.randn(rows, columns), targets(loss, rows, outputs)
    optimizer = elmo.optim.SGD(
        model.parameters(), 0.1, update_at="step", max_norm=max_norm, accumulate="stash"
    )
    for _ in range(2):
        step, mode = counted_step(model, optimizer)
        assert second_step(step, mode, x, target) < gradient / 2
    first, mode = counted_step(model, _Nothing())
    first(x, target)
    step, mode = counted_step(model, optimizer)
    step(x, target)
    with mode:
        optimizer.step()
    assert mode.peak < gradient / 2


class _Nothing:
    """An optimizer that leaves what backwards kept."""

    def step(self):
        """Does nothing."""

    def zero_grad(self, set_to_none=True):
        """Does nothing."""


@pytest.mark.parametrize("loss", ["ce", "bce", "smoothed", "margin"])
def test_weight_gradient_never_exists_when_fused(loss):
    """The gradient would be 98 MiB."""
    rows, columns, outputs = 8, 256, 100_000
    gradient = columns * outputs * 4
    mine, eager = peaks(loss, rows, columns, outputs, lambda p: elmo.optim.SGD(p, lr=0.1))
    assert elmo.last_report().matches[0].fused_update
    assert eager >= gradient
    assert mine < gradient / 2


def test_dense_targets_never_exist():
    """In a forward without gradients only chunks are left: less than targets or logits alone."""
    rows, columns, outputs = 128, 32, 200_000
    model = Model(outputs, columns, "bce")
    x, target = torch.randn(rows, columns), targets("bce", rows, outputs)
    mode = PeakBytes()

    def backend(gm, inputs):
        run = elmo_backend(gm, inputs, options=BUDGET)

        def counted(*args):
            with mode:
                return run(*args)

        return counted

    with torch.no_grad():
        torch.compile(model, backend=backend)(x, target)
        eager = allocated_peak(model, x, target)
    assert eager >= 2 * rows * outputs * 4
    assert 0 < mode.peak < rows * outputs * 4 / 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_converted_head_has_no_wide_copy(dtype):
    """A float32 copy of the weight would be 17 MiB, and its gradient too.

    Small, because pieces that Dynamo would compile run eagerly while bytes are counted.
    """
    rows, columns, outputs = 4, 256, 17_000
    model = Model(outputs, columns, "bce")
    elmo.convert_head(model, dtype)
    optimizer = elmo.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(rows, columns), targets("bce", rows, outputs)
    peak = second_step(*counted_step(model, optimizer, budget="4MiB"), x, target)
    assert elmo.last_report().matches[0].fused_update
    assert 0 < peak < columns * outputs * 4 / 2
