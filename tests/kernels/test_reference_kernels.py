"""The reference against torch's own autograd in float64, and its update against torch.optim."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.kernels import reference
from elmo_compile.numerics.update import Update

from .head_cases import exact, in_torch, problem

KINDS = ["bce", "bce_count", "bce_dense", "ce", "ce_dense"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_autograd(kind: str, bias: bool) -> None:
    p = exact(problem(kind, bias=bias))
    scale_N = torch.rand(7, dtype=torch.float64)
    torch_result = in_torch(p, scale_N)
    forward = reference.forward(p)
    torch.testing.assert_close(forward.rows_N, torch_result.rows_N)
    got = reference.backward(p, forward.stats_2N, scale_N)
    torch.testing.assert_close(got.dx_ND, torch_result.dx_ND)
    torch.testing.assert_close(got.dw_LD, torch_result.dw_LD)
    if bias:
        torch.testing.assert_close(got.db_L, torch_result.db_L)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"), [(0, False, 0), (0.9, False, 0.1), (0.9, True, 0.1)]
)
def test_update_equals_torch_sgd(momentum: float, nesterov: bool, weight_decay: float) -> None:
    p = exact(problem("ce"))
    scale_N = torch.rand(7, dtype=torch.float64)
    w = p.w_LD.clone().requires_grad_()
    optimizer = torch.optim.SGD(
        [w], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )
    state = (torch.zeros_like(p.w_LD),) if momentum else ()
    for step in range(3):
        stats_2N = reference.forward(p).stats_2N
        w.grad = reference.backward(p, stats_2N, scale_N).dw_LD
        optimizer.step()
        update = Update(
            lr=0.1,
            beta1=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            state=state,
            step=step,
        )
        reference.backward_update(p, stats_2N, scale_N, update)
        torch.testing.assert_close(p.w_LD, w.detach())
