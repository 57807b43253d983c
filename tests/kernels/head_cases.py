"""Problems for kernel tests, and the exact and the same-precision results to hold them against."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_compile.kernels import reference
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.targets import positives_of
from elmo_compile.numerics.losses import BCE, CE, LossSpec, Positives

FP8 = torch.float8_e4m3fn


def problem(
    kind: str = "bce",
    *,
    num_rows: int = 7,
    num_features: int = 12,
    num_outputs: int = 53,
    weight: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
    chunk: int = 16,
    bias: bool = True,
    integers: bool = False,
    positives: int = 4,
    seed: int = 0,
) -> HeadProblem:
    """A head problem. kind: bce, bce_count, bce_dense, ce, ce_dense."""
    torch.manual_seed(seed)
    n, d, num = num_rows, num_features, num_outputs
    if integers:
        x, w = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (num, d)).float()
    else:
        x, w = torch.randn(n, d), torch.randn(num, d) * 0.3
    loss, target = _targets(kind, n, num, positives)
    return HeadProblem(
        x_ND=x.to(compute),
        w_LD=w.to(weight),
        b_L=torch.randn(num) if bias else None,
        target=target,
        loss=loss,
        chunk=chunk,
        compute_dtype=compute,
    )


def _targets(kind: str, n: int, num: int, positives: int) -> tuple[LossSpec, Tensor | Positives]:
    if kind in ("bce", "bce_count"):
        duplicates = "count" if kind == "bce_count" else "once"
        spec = LossSpec(name=BCE, targets="padded", duplicates=duplicates)
        return spec, positives_of(spec, torch.randint(-1, num, (n, positives)), None, n, num)
    if kind == "ce":
        classes = torch.randint(0, num, (n,))
        classes[n // 2] = -100
        return LossSpec(name=CE, targets="classes"), classes
    if kind == "bce_dense":
        return LossSpec(name=BCE, targets="dense"), torch.rand(n, num)
    return LossSpec(name=CE, targets="dense"), torch.rand(n, num).softmax(1)


def replaced(p: HeadProblem, **changes: object) -> HeadProblem:
    """A copy with other fields and a weight of its own."""
    p = dataclasses.replace(p, w_LD=p.w_LD.clone())
    return dataclasses.replace(p, **changes)  # type: ignore[arg-type]


def exact(p: HeadProblem) -> HeadProblem:
    """The same stored values, computed in float64."""
    bias = None if p.b_L is None else p.b_L.double()
    return dataclasses.replace(
        p,
        x_ND=p.x_ND.double(),
        w_LD=p.w_LD.double(),
        b_L=bias,
        compute_dtype=torch.float64,
    )


class TorchResult(NamedTuple):
    rows_N: Tensor
    dx_ND: Tensor
    dw_LD: Tensor
    db_L: Tensor | None


def in_torch(p: HeadProblem, scale_N: Tensor) -> TorchResult:
    """Loss rows and gradients by eager autograd in the compute dtype, as a user of torch has them:
    logits rounded to it, the loss in float32."""
    dtype = p.compute_dtype
    x = p.x_ND.to(dtype).requires_grad_()
    w = p.w_LD.to(dtype).requires_grad_()
    b = None if p.b_L is None else p.b_L.to(dtype).requires_grad_()
    z = F.linear(x, w, b)
    z = z.double() if dtype == torch.float64 else z.float()
    y = reference._targets(p).to(z.dtype)
    if p.loss.name == CE:
        rows = F.cross_entropy(z, y, reduction="none")
    else:
        rows = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    (rows * scale_N.to(rows.dtype)).sum().backward()
    return TorchResult(rows.detach(), x.grad, w.grad, None if b is None else b.grad)
