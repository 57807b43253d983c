"""The head step on a CPU: ATen matrix products and Inductor-compiled vector code, chunk by chunk.

`forward`, `backward` and `backward_update` are the contract of `kernels.problem`; `topk` streams
the largest logits. Temporaries are a few chunks: nothing of size [N, L] or [L, D] exists, except
the weight gradient where it is the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from elmo_compile.kernels.aten.head import BiasGradient, FeatureGradient, Head, WeightGradient
from elmo_compile.kernels.aten.row_losses import BinaryRows, SoftmaxRows, TargetScores
from elmo_compile.kernels.aten.topk import TopRows
from elmo_compile.kernels.aten.topk import topk as _topk
from elmo_compile.kernels.problem import Forward, Gradients, HeadProblem, UpdateResult
from elmo_compile.numerics.update import Update

__all__ = ["TopRows", "backward", "backward_update", "forward", "topk"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _plain_mode(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run without autograd and autocast: the dtypes below are chosen, and a compiled piece is
    compiled for one mode only."""

    @functools.wraps(fn)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return fn(*args, **kwargs)

    return run


topk = _plain_mode(_topk)


@_plain_mode
def forward(p: HeadProblem, top: TopRows | None = None) -> Forward:
    """Loss of each row, and its log-sum-exp for cross entropy: one product.

    `top`, if given, takes in every chunk's logits.
    """
    head = Head(p)
    if head.loss.is_ce:
        softmax = SoftmaxRows(head)
        for start, stop, _, z_CN in head.chunks():
            softmax.add(z_CN, start, stop)
            if top is not None:
                top.add(z_CN, start)
        return softmax.result()
    binary = BinaryRows(head)
    for start, stop, _, z_CN in head.chunks():
        binary.add(z_CN, start, stop)
        if top is not None:
            top.add(z_CN, start)
    return binary.result()


@_plain_mode
def backward(
    p: HeadProblem,
    stats_2N: Tensor,
    scale_N: Tensor,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    need_db: bool = True,
) -> Gradients:
    """Gradients of the head from recomputed logits: one product and one for each of dx and dw."""
    head = Head(p)
    stats = head.row_statistics(stats_2N)
    xs_ND, scale = head.scaled_features(scale_N)
    dx = FeatureGradient(head) if need_dx else None
    dw = WeightGradient(head) if need_dw else None
    db = BiasGradient(head, scale_N) if need_db else None
    for start, stop, w_CD, z_CN in head.chunks():
        g_CN = head.loss.gradient_(z_CN, start, stop, stats)
        if dx is not None:
            dx.add(g_CN, w_CD)
        if dw is not None:
            dw.put(start, stop, g_CN, xs_ND, scale)
        if db is not None:
            db.put(start, stop, g_CN)
    return Gradients(
        None if dx is None else dx.result(scale_N),
        None if dw is None else dw.dw_LD,
        None if db is None else db.db_L,
    )


@_plain_mode
def backward_update(
    p: HeadProblem,
    stats_2N: Tensor,
    scale_N: Tensor,
    update: Update,
    *,
    need_dx: bool = True,
    need_db: bool = True,
    need_value: bool = False,
) -> UpdateResult:
    """Gradients of features and bias, and the weight updated in place: three products."""
    head = Head(p, update)
    stats = head.row_statistics(stats_2N)
    xs_ND, scale = head.scaled_features(scale_N)
    dx = FeatureGradient(head) if need_dx else None
    db = BiasGradient(head, scale_N) if need_db else None
    scores = TargetScores(head) if need_value and head.loss.is_ce else None
    values = BinaryRows(head) if need_value and not head.loss.is_ce else None
    shared = values.rows_N if values is not None and head.loss.dense is None else None
    for start, stop, w_CD, z_CN in head.chunks():
        for rows in (scores, values):
            if rows is not None and shared is None:
                rows.add(z_CN, start, stop)
        g_CN = head.loss.gradient_(z_CN, start, stop, stats, shared)
        if dx is not None:
            dx.add(g_CN, w_CD)
        if db is not None:
            db.put(start, stop, g_CN)
        head.weight.step(start, stop, g_CN, xs_ND, scale)
    rows_N = None if values is None else values.result().rows_N
    return UpdateResult(
        None if dx is None else dx.result(scale_N),
        None if db is None else db.db_L,
        scores.losses(stats_2N.double().sum(0)) if scores else rows_N,
    )
