"""Run a program eagerly, in float64 and through the backend, and compare values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_compile.report import store
from elmo_compile.report.records import Match, Refusal
from elmo_compile.testing.budget import assert_within_budget

N, D, L = 6, 16, 203
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 77}
"""Small, and a chunk that does not divide L."""

LOSS_ULPS = 4.0
"""A scalar is one draw: torch's may be exact by luck."""


class Outcome(NamedTuple):
    """What a program returned, and the gradients of those of its arguments that take one."""

    loss: Tensor
    grads: tuple[Tensor | None, ...]


def features(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N,)), D).requires_grad_()


def weight(rows: int = L, columns: int = D) -> Tensor:
    return (torch.randn(rows, columns) / 4).requires_grad_()


def bias() -> Tensor:
    return torch.randn(L).requires_grad_()


def classes(*shape: int) -> Tensor:
    return torch.randint(0, L, shape or (N,))


def rows() -> tuple[Any, ...]:
    """Arguments of a loss of classes."""
    return features(), weight(), classes()


def labels(positives: int = 3) -> Tensor:
    """Distinct labels of each row."""
    return torch.stack([torch.randperm(L)[:positives] for _ in range(N)])


def dense(*shape: int) -> Tensor:
    return (torch.rand(*(shape or (N,)), L) < 0.05).float()


def run(fn: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype | None = None) -> Outcome:
    """Forward and, where something takes a gradient, backward, on copies of the arguments."""
    copies = tuple(_copy(arg, dtype) for arg in args)
    torch.manual_seed(3)
    loss = fn(*copies)
    if loss.requires_grad:
        # Not constant, so that a row's gradient cannot stand for another's.
        loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape))
    grads = tuple(copy.grad if isinstance(copy, Tensor) else None for copy in copies)
    return Outcome(loss.detach(), grads)


def compiled(fn: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Any:
    """`fn` through the backend, nothing of earlier compilations left."""
    torch._dynamo.reset()
    store.clear()
    return torch.compile(
        fn, backend="elmo", options={**OPTIONS, **options}, dynamic=dynamic, fullgraph=True
    )


def matches() -> list[Match]:
    """Every head rewritten since `compiled` was called."""
    return [match for report in store.reports() for match in report.matches]


def refusals() -> list[Refusal]:
    """Every refusal since `compiled` was called."""
    return [refusal for report in store.reports() for refusal in report.refusals]


def targets_left() -> set[str]:
    """What the rewritten graphs still call, by name."""
    graphs = [report.graph_after for report in store.reports() if report.matches]
    return {str(node.target) for graph in graphs if graph is not None for node in graph.graph.nodes}


def assert_same(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    exact: Callable[..., Any] | None = None,
    count: int = 1,
    precision: torch.dtype | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> None:
    """The backend rewrites `count` heads of the program and agrees with it within the budget."""
    truth = run(exact or program, args, torch.float64)
    eager = run(program, args)
    ours = run(compiled(program, dynamic=dynamic, **options), args)
    assert len(matches()) == count, [str(refusal) for refusal in refusals()]
    assert_near(ours, eager, truth, precision)


def assert_near(
    ours: Outcome, eager: Outcome, truth: Outcome, precision: torch.dtype | None = None
) -> None:
    """Dtypes and shapes of eager; values within the error budget.

    Args:
        precision: what the program computes gradients in, where that is not their own dtype.
    """
    assert ours.loss.dtype == eager.loss.dtype
    assert ours.loss.shape == eager.loss.shape
    assert torch.equal(ours.loss.isnan(), eager.loss.isnan())
    if not bool(eager.loss.isnan().any()):
        assert_within_budget(ours.loss, truth.loss, eager.loss, what="loss", ulps=LOSS_ULPS)
    for position, (mine, theirs) in enumerate(zip(ours.grads, eager.grads)):
        assert (mine is None) == (theirs is None), f"gradient of argument {position}"
        if mine is not None and theirs is not None:
            what = f"gradient of argument {position}"
            assert mine.dtype == theirs.dtype, what
            exact = truth.grads[position]
            assert exact is not None
            same = theirs.to(precision or theirs.dtype)
            assert_within_budget(mine, exact, same, what=what)


def assert_identical(ours: Outcome, eager: Outcome) -> None:
    """The same, but for what a library's sums owe to the alignment of memory."""
    for mine, theirs in zip((ours.loss, *ours.grads), (eager.loss, *eager.grads)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


def _copy(arg: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    wide = dtype is not None and arg.is_floating_point()
    copy = arg.detach().to(dtype) if wide else arg.detach()
    copy = copy.clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(arg.requires_grad)
