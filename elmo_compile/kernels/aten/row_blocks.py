"""Softmax cross entropy with the logits of a block of rows held: three products instead of four.

For each block of R rows: all its logits z [L, R] chunk by chunk, with their streaming log-sum-exp;
then, again chunk by chunk, the gradient in place of z, dx of the block, and dw and db added up over
blocks. dw is stored in the weight's dtype (float32 for fp8), so a bf16 dw is rounded once a block.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from elmo_compile import host_memory
from elmo_compile.kernels.aten.head import BiasGradient, FeatureGradient, Head, WeightGradient
from elmo_compile.kernels.aten.row_losses import SoftmaxRows
from elmo_compile.kernels.aten.stored import StoredWeight
from elmo_compile.kernels.aten.topk import TopRows
from elmo_compile.kernels.problem import Gradients, HeadProblem

MOST_ROUNDINGS = 16
"""Blocks, where dw is narrow: with more, its error would exceed that of one rounding much."""


def fits_row_blocks(p: HeadProblem, rows: int, need_dw: bool) -> bool:
    """Whether dw would be rounded at most `MOST_ROUNDINGS` times."""
    narrow = p.w_LD.dtype in (torch.bfloat16, torch.float16) and not p.wide_dw
    return not (need_dw and narrow) or -(-p.x_ND.shape[0] // rows) <= MOST_ROUNDINGS


def row_blocks(
    p: HeadProblem,
    scale_N: Tensor,
    rows: int,
    *,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    top: TopRows | None = None,
) -> Gradients:
    """Row losses and gradients, `rows` rows at a time."""
    num_rows, num_outputs = p.x_ND.shape[0], p.w_LD.shape[0]
    assert isinstance(p.target, Tensor)
    losses_N: list[Tensor] = []
    dx_ND: list[Tensor] = []
    dw: WeightGradient | None = None
    db_L: Tensor | None = None
    held: Tensor | None = None
    weight: StoredWeight | None = None
    for start in range(0, num_rows, rows) if num_rows else (0,):
        stop = min(start + rows, num_rows)
        x_RD, target_R = p.x_ND[start:stop], p.target[start:stop]
        head = Head(dataclasses.replace(p, x_ND=x_RD, target=target_R), weight=weight)
        weight = head.weight
        if held is None:
            held = host_memory.empty((num_outputs * head.x_ND.shape[0],), head.operand)
        z_LR = held[: num_outputs * head.x_ND.shape[0]].view(num_outputs, -1)
        part = None if top is None else top.part(start, stop)

        softmax = SoftmaxRows(head)
        for first, last, w_CD in head.weights():
            z_CR = torch.mm(w_CD, head.x_ND.t(), out=z_LR[first:last])
            softmax.add(z_CR, first, last)
            if part is not None:
                part.add(z_CR, first)
        made = softmax.result()
        losses_N.append(made.rows_N)
        if top is not None and part is not None:
            top.put(start, part)

        stats, scale_R = head.row_statistics(made.stats_2N), scale_N[start:stop]
        xs_RD, scale = head.scaled_features(scale_R)
        dx = FeatureGradient(head) if need_dx else None
        db = BiasGradient(head, scale_R, db_L) if need_db else None
        if need_dw and dw is None:
            dw = WeightGradient(head)
        for first, last, w_CD in head.weights():
            g_CR = head.loss.gradient_(z_LR[first:last], first, last, stats)
            if dx is not None:
                dx.add(g_CR, w_CD)
            if dw is not None:
                dw.put(first, last, g_CR, xs_RD, scale, add=start > 0)
            if db is not None:
                db.put(first, last, g_CR)
        if dx is not None:
            dx_ND.append(dx.result(scale_R))
        db_L = None if db is None else db.db_L
    return Gradients(
        torch.cat(dx_ND) if need_dx else None,
        None if dw is None else dw.dw_LD,
        db_L,
        torch.cat(losses_N),
    )
