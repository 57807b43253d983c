"""A softmax head of a language model's size on a GPU, beside the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import Bench, Contender, Head, fresh, model_step, said, weight
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers(b: Bench, row: dict[str, Any]) -> dict[str, Loss]:
    """Losses of (x, w, classes) of installed packages; one that is not there is a row."""
    found: dict[str, Loss] = {
        "eager": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
        "torch.compile": torch.compile(lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda x, w, y: F.linear_cross_entropy(x, w, y)

    def liger() -> Loss:
        package = importlib.import_module("liger_kernel.transformers")
        loss = package.LigerFusedLinearCrossEntropyLoss()
        return lambda x, w, y: loss(w, x, y)

    def cce(**how: Any) -> Loss:
        package = importlib.import_module("cut_cross_entropy")
        return lambda x, w, y: package.linear_cross_entropy(x, w, y, **how)

    def quack() -> Loss:
        package = importlib.import_module("quack.linear_cross_entropy")
        return lambda x, w, y: package.chunked_linear_cross_entropy(x, w, y)

    packages: dict[str, Callable[[], Loss]] = {
        "Liger": liger,
        "cut-cross-entropy": cce,
        "cut-cross-entropy, exact": lambda: cce(impl="cce_exact"),
        "quack": quack,
    }
    for name, load in packages.items():
        try:
            found[name] = load()
        except Exception as error:  # of any kind: a package's own imports may fail
            b.emit(**row, contender=name, failed=said(error))
    return found


def cross_entropy(b: Bench) -> None:
    """A softmax head with a real gradient and with a fused update, beside peers."""
    for L in [b.size(n, 1000) for n in (128_256, 256_000)]:
        with fresh():
            _cross_entropy(b, L)
        if b.dry:
            break


def _cross_entropy(b: Bench, L: int) -> None:
    N, D = b.size(8192, 16), b.size(4096, 32)
    x = torch.randn(N, D, device=b.device).bfloat16()
    w = weight(L, D, torch.bfloat16, b.device)
    y = torch.randint(0, L, (N,), device=b.device)
    truth = _truth(x, w, y)
    row = {"part": "ce", "L": L}
    losses = {"elmo, real gradient": _ours(b), **peers(b, row)}
    contenders = {}
    for name, loss in losses.items():
        step = _gradient_step(loss, x, w, y)
        try:
            errors = step(truth)
        except Exception as error:  # a peer that does not run here is a row that says so
            b.emit(**row, contender=name, failed=said(error))
            continue
        b.emit(**row, contender=name, **errors)
        contenders[name] = Contender(step)
    del truth
    fused = model_step(b, Head(w.clone()), x, y)
    contenders["elmo, fused update (four products)"] = Contender(fused)
    b.compare(row, contenders, moved=2 * w.numel() * 2, product=2 * N * L * D)


def _truth(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dw in float64, a block of rows at a time."""
    N, dx, wide = x.shape[0], [], w.double()
    dw = torch.zeros_like(wide)
    for start in range(0, N, 512):
        x_R, y_R = x[start : start + 512].double(), y[start : start + 512]
        g = (x_R @ wide.t()).softmax(1)
        g[torch.arange(len(y_R), device=x.device), y_R] -= 1
        g /= N
        dx.append(g @ wide)
        dw.addmm_(g.t(), x_R)
    return torch.cat(dx).float(), dw.float()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def _ours(b: Bench) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A loss of (x, w, classes) through the backend alone."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    return torch.compile(loss, backend="elmo", options=b.options)


def _gradient_step(loss: Loss, x: Tensor, w: Tensor, y: Tensor) -> Callable[..., Any]:
    """Both gradients of a loss; their errors where the true ones are given."""
    x, w = x.clone().requires_grad_(), w.detach().requires_grad_()

    def step(truth: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        x.grad = w.grad = None
        loss(x, w, y).backward()
        errors = {}
        if truth is not None:
            assert x.grad is not None
            assert w.grad is not None
            errors = {"error dx": _error(x.grad, truth[0]), "error dw": _error(w.grad, truth[1])}
        x.grad = w.grad = None
        return errors

    return step
