"""The head step on a CPU: ATen matrix products and Inductor-compiled vector code, chunk by chunk.

`forward`, `backward` and `backward_update` are the contract of `kernels.problem`; `topk` streams
the largest logits. Temporaries are a few chunks: nothing of size [N, L] or [L, D] exists, except
the weight gradient where it is the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from elmo_compile.kernels.aten.chunk_update import ChunkUpdate, choose_layout
from elmo_compile.kernels.aten.head import (
    BiasGradient,
    FeatureGradient,
    GradientNorm,
    Head,
    WeightGradient,
    new_held,
    wide_product,
)
from elmo_compile.kernels.aten.row_blocks import fits_row_blocks, row_blocks
from elmo_compile.kernels.aten.row_losses import BinaryRows, SoftmaxRows, TargetScores
from elmo_compile.kernels.aten.topk import TopRows
from elmo_compile.kernels.aten.topk import topk as _topk
from elmo_compile.kernels.problem import Chunk, Forward, Gradients, HeadProblem, UpdateResult
from elmo_compile.numerics.losses import CE
from elmo_compile.numerics.update import Update

__all__ = [
    "TopRows",
    "backward",
    "backward_update",
    "forward",
    "head_chunks",
    "loss_and_gradients",
    "new_held",
    "scale_",
    "topk",
    "update_from_chunks",
]

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
def forward(p: HeadProblem, top: TopRows | None = None, held: Tensor | None = None) -> Forward:
    """Loss of each row, and its log-sum-exp for cross entropy: one product.

    `top`, if given, takes in every chunk's logits; `held` (`new_held`) is filled with them.
    """
    head = Head(p, held=held, fill=True)
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
    need_value: bool = False,
    need_norm: bool = False,
    top: TopRows | None = None,
    held: Tensor | None = None,
) -> Gradients:
    """Gradients of the head: one product for each of dx and dw, and one for the logits unless
    `held`, which is overwritten, has them.

    `top`, if given, takes in every chunk's logits.
    """
    head = Head(p, held=held)
    walk = _Walk(head, stats_2N, scale_N, need_dx, need_db, need_value, top)
    dw = WeightGradient(head) if need_dw else None
    norm = GradientNorm(walk.xs_ND, walk.scale) if need_norm else None
    for start, stop, g_CN in walk:
        if dw is not None:
            dw.put(start, stop, g_CN, walk.xs_ND, walk.scale)
        if norm is not None:
            norm.add(g_CN)
    return Gradients(
        walk.dx_ND(),
        None if dw is None else dw.dw_LD,
        walk.db_L(),
        walk.rows_N(),
        None if norm is None else norm.result(),
    )


@_plain_mode
def loss_and_gradients(
    p: HeadProblem,
    scale_N: Tensor,
    rows: int,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    need_db: bool = True,
    top: TopRows | None = None,
) -> Gradients:
    """Row losses and gradients in one pass: no product is made twice.

    Binary cross entropy needs nothing else. Softmax holds the logits of `rows` rows at a time
    (0: none, and makes them twice).
    """
    run = functools.partial(
        backward, p, scale_N=scale_N, need_dx=need_dx, need_dw=need_dw, need_db=need_db
    )
    if p.loss.name != CE:
        return run(torch.empty(0), need_value=True, top=top)
    if rows and fits_row_blocks(p, rows, need_dw):
        return row_blocks(
            p, scale_N, rows, need_dx=need_dx, need_dw=need_dw, need_db=need_db, top=top
        )
    made = forward(p, top)
    return run(made.stats_2N)._replace(rows_N=made.rows_N)


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
    held: Tensor | None = None,
) -> UpdateResult:
    """Gradients of features and bias, and the weight updated in place: three products, or two if
    `held`, which is overwritten, has the logits."""
    head = Head(p, update, held=held)
    walk = _Walk(head, stats_2N, scale_N, need_dx, need_db, need_value)
    for start, stop, g_CN in walk:
        head.weight.step(start, stop, g_CN, walk.xs_ND, walk.scale)
    return UpdateResult(walk.dx_ND(), walk.db_L(), walk.rows_N())


@_plain_mode
def scale_(made: Tensor, factor: Tensor) -> None:
    """Multiply a tensor by a 0-d one, unless that is 1; what is 0 stays 0."""
    number = float(factor)
    if number == 1.0:
        return
    zeros = None if math.isfinite(number) else made == 0
    made.mul_(number)
    if zeros is not None:
        made.masked_fill_(zeros, 0.0)


class _Walk:
    """One pass over a head's chunks: yields each one's gradient of the logits, and forms beside it
    dx, db and the row losses, where they are wanted."""

    def __init__(
        self,
        head: Head,
        stats_2N: Tensor,
        scale_N: Tensor,
        need_dx: bool = False,
        need_db: bool = False,
        need_value: bool = False,
        top: TopRows | None = None,
    ) -> None:
        self.head, self._stats_2N, self._scale_N, self._top = head, stats_2N, scale_N, top
        self._stats = head.row_statistics(stats_2N)
        self.xs_ND, self.scale = head.scaled_features(scale_N)
        self._dx = FeatureGradient(head) if need_dx else None
        self._db = BiasGradient(head, scale_N) if need_db else None
        is_ce = head.loss.is_ce
        self._scores = TargetScores(head) if need_value and is_ce else None
        self._values = BinaryRows(head) if need_value and not is_ce else None

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, g [C, N]) of each chunk; its weights may be overwritten meanwhile."""
        loss, values = self.head.loss, self._values
        shared = values.rows_N if values is not None and loss.dense is None else None
        for start, stop, w_CD, z_CN in self.head.chunks():
            for rows in (self._scores, values):
                if rows is not None and shared is None:
                    rows.add(z_CN, start, stop)
            if self._top is not None:
                self._top.add(z_CN, start)
            g_CN = loss.gradient_(z_CN, start, stop, self._stats, shared)
            if self._dx is not None:
                self._dx.add(g_CN, w_CD)
            if self._db is not None:
                self._db.put(start, stop, g_CN)
            yield start, stop, g_CN

    def dx_ND(self) -> Tensor | None:
        return None if self._dx is None else self._dx.result(self._scale_N)

    def db_L(self) -> Tensor | None:
        return None if self._db is None else self._db.db_L

    def rows_N(self) -> Tensor | None:
        if self._scores is not None:
            return self._scores.losses(self._stats_2N.double().sum(0))
        return None if self._values is None else self._values.result().rows_N


def head_chunks(p: HeadProblem, stats_2N: Tensor, scale_N: Tensor) -> Iterator[Chunk]:
    """(start, stop, dw in float32) of each chunk of outputs, from the weight as it is then.

    To be consumed under `torch.no_grad()`: a generator cannot set a mode for itself alone.
    """
    head = Head(p)
    walk = _Walk(head, stats_2N, scale_N)
    for start, stop, g_CN in walk:
        yield start, stop, head.weight.restore(wide_product(g_CN, walk.xs_ND)) * walk.scale


@_plain_mode
def update_from_chunks(
    w_LD: Tensor,
    chunks: Iterator[Chunk],
    update: Update,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Update a weight from its gradient, formed chunk by chunk from the weight as it was.

    Args:
        reduce: applied to each chunk of the gradient (an all-reduce).
    """
    run: ChunkUpdate | None = None
    for start, stop, dw in chunks:
        if start == stop:  # of a head spread over processes, some of which have fewer outputs
            continue
        if run is None:
            layout = choose_layout(w_LD, dw.dtype, update)
            run = ChunkUpdate(w_LD, update, layout, max(1, stop - start), fast=False)
        run.apply(start, stop, dw if reduce is None else reduce(dw), 1.0)
