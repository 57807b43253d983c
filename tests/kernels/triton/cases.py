"""What the tests of the Triton kernels share: problems on a device, and how results are judged."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from elmo_compile.kernels import reference
from elmo_compile.kernels import triton as family
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.losses import Positives
from elmo_compile.numerics.update import Update
from elmo_compile.testing.budget import assert_within_budget
from kernels.head_cases import FP8, TorchResult, exact, in_torch, problem
from kernels.updates import tensors, with_copies

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8": (FP8, torch.bfloat16),
    "fp32 as bf16": (torch.float32, torch.bfloat16),
}
"""Name -> (weight as stored, operands of the products)."""


def moved(p: HeadProblem, device: str) -> HeadProblem:
    """A copy of the problem on a device, with a weight of its own."""
    target = p.target
    if isinstance(target, Positives):
        target = Positives(*(None if t is None else t.to(device) for t in target))
    else:
        target = target.to(device)
    return dataclasses.replace(
        p,
        x_ND=p.x_ND.to(device),
        w_LD=p.w_LD.to(device, copy=True),
        b_L=None if p.b_L is None else p.b_L.to(device),
        target=target,
    )


def make(kind: str, precision: str, **options: object) -> HeadProblem:
    """`head_cases.problem` at a named precision."""
    weight, compute = PRECISIONS[precision]
    return problem(kind, weight=weight, compute=compute, **options)


def assert_same_sums(a: Tensor, b: Tensor) -> None:
    """Equal, but on a GPU, where kernels compiled for other arguments may sum in another order."""
    if a.is_cuda:
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    else:
        assert torch.equal(a, b)


def scale_of(p: HeadProblem) -> Tensor:
    """Upstream factors of the rows, some negative, one zero where there are several rows."""
    scale_N = torch.linspace(-1.0, 1.5, p.x_ND.shape[0])
    scale_N[p.x_ND.shape[0] // 3] = 0.0 if len(scale_N) > 1 else 0.5
    return scale_N


def check_step(p: HeadProblem, device: str) -> None:
    """forward and backward against float64, within the budget of torch at the same precision."""
    scale_N = scale_of(p)
    truth: TorchResult = in_torch(exact(p), scale_N)
    same = in_torch(p, scale_N)
    q = moved(p, device)
    value = family.forward(q)
    assert_within_budget(value.rows_N.cpu(), truth.rows_N, same.rows_N, what="rows")
    assert value.rows_N.dtype == torch.float32
    got = family.backward(q, value.stats_2N, scale_N.to(device))
    assert_within_budget(got.dx_ND.cpu(), truth.dx_ND, same.dx_ND, what="dx")
    assert got.dx_ND.dtype == torch.float32
    stored = torch.float32 if p.w_LD.dtype == FP8 else p.w_LD.dtype
    assert got.dw_LD.dtype == stored
    assert_within_budget(got.dw_LD.cpu(), truth.dw_LD, same.dw_LD.to(stored), what="dw")
    if truth.db_L is not None:
        assert_within_budget(got.db_L.cpu(), truth.db_L, same.db_L, what="db")


def exact_update_problem(precision: str, chunk: int, *, num_rows: int = 6) -> HeadProblem:
    """BCE whose logits are 0, so that its gradient is +-0.5 and all sums are exact.

    Integers, each feature twice, with opposite weights. Odd shape.
    """
    p = make(
        "bce",
        precision,
        num_rows=num_rows,
        num_features=37,
        num_outputs=101,
        chunk=chunk,
        bias=False,
        integers=True,
    )
    x_ND, w_LD = p.x_ND.clone(), p.w_LD.float()
    x_ND[:, 1::2] = x_ND[:, :-1:2]
    w_LD[:, 1::2] = -w_LD[:, :-1:2]
    w_LD[:, -1] = 0
    w_LD = w_LD.to(p.w_LD.dtype)
    return dataclasses.replace(p, x_ND=x_ND, w_LD=w_LD)


def updated_by_reference(p: HeadProblem, scale_N: Tensor, update: Update) -> dict[str, Tensor]:
    """The weight and the state after the update by the specification."""
    update, q = with_copies(update), moved(p, "cpu")
    reference.backward_update(q, torch.empty(0), scale_N, update)
    return {"weight": q.w_LD, **tensors(update)}


def bits(t: Tensor) -> Tensor:
    """The stored bits, on the CPU."""
    return t.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])
