"""The Triton family of kernels/problem.py: `forward`, `backward`, `backward_update`.

Each chunk takes a few launches (gradient of the logits, dx, row keys, dw or update), and one more
for the bias of a batch that is larger than a tile. Nothing waits for the device: validity is a
device flag (`guard`) that the update obeys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elmo_compile.kernels.problem import Chunk, Forward, Gradients, HeadProblem, UpdateResult
from elmo_compile.kernels.triton.features import FeatureGradient, SplitSums
from elmo_compile.kernels.triton.gradient import Gradient
from elmo_compile.kernels.triton.launch import Call, prepare
from elmo_compile.kernels.triton.row_blocks import fits_row_blocks, row_blocks
from elmo_compile.kernels.triton.statistics import bce_rows, ce_rows
from elmo_compile.kernels.triton.weight_update import WeightUpdate, shared_sums
from elmo_compile.kernels.triton.weights import WeightGradient
from elmo_compile.numerics.losses import CE
from elmo_compile.numerics.update import Update


@torch.no_grad()
def forward(p: HeadProblem) -> Forward:
    """The loss of each row and, for cross entropy, its log-sum-exp, in one pass over the weight."""
    with torch.cuda.device_of(p.x_ND):
        c = prepare(p)
        if p.loss.name == CE:
            return Forward(*ce_rows(c))
        return Forward(bce_rows(c), c.x_ND.new_empty((0,), dtype=torch.float32))


@torch.no_grad()
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
) -> Gradients:
    """Gradients of `sum_n scale_n loss_n`, chunk by chunk.

    Args:
        p: the call. stats_2N: as `forward` gave it. scale_N: float32 [N], any strides.
        need_dx, need_dw, need_db, need_value, need_norm: what to compute; the rest is None.
    """
    with torch.cuda.device_of(p.x_ND):
        c = prepare(p)
        wide = p.wide_dw or p.w_LD.dtype == torch.float8_e4m3fn
        dtype = torch.float32 if wide else p.w_LD.dtype
        dw_LD = torch.empty_like(p.w_LD, dtype=dtype) if need_dw else None

        walk = _Walk(c, stats_2N, scale_N, need_dx, need_db, need_value)
        for start, stop, g_NL in walk:
            if dw_LD is not None:
                walk.product.store(g_NL, dw_LD[start:stop])
            if need_norm:
                walk.product.add_norm(g_NL, stop - start)
        return Gradients(walk.dx_ND(), dw_LD, walk.db_L, walk.rows_N(), walk.product.norm2())


@torch.no_grad()
def loss_and_gradients(
    p: HeadProblem,
    scale_N: Tensor,
    rows: int,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    need_db: bool = True,
    top: None = None,
) -> Gradients:
    """Row losses and gradients in one pass: no product is made twice where `rows` rows' logits can
    be held.

    Args:
        p: the call. scale_N: float32 [N]. rows: rows whose logits to hold, 0 for none.
        top: these kernels collect nothing.
        need_dx, need_dw, need_db: what to compute; the rest is None.
    """
    needs = {"need_dx": need_dx, "need_dw": need_dw, "need_db": need_db}
    if p.loss.name != CE:
        empty = p.x_ND.new_empty((0,), dtype=torch.float32)
        return backward(p, empty, scale_N, **needs, need_value=True)
    if rows and fits_row_blocks(p, rows, need_dw):
        with torch.cuda.device_of(p.x_ND):
            return row_blocks(p, scale_N, rows, **needs)
    made = forward(p)
    return backward(p, made.stats_2N, scale_N, **needs)._replace(rows_N=made.rows_N)


@torch.no_grad()
def backward_update(
    p: HeadProblem,
    stats_2N: Tensor,
    scale_N: Tensor,
    update: Update,
    *,
    need_dx: bool = True,
    need_db: bool = True,
    need_value: bool = False,
    guard: Tensor | None = None,
) -> UpdateResult:
    """dx and db from the weight as it was, and the weight and momentum updated in place.

    The writes are the kernels' own: the caller increments the version counters.

    Args:
        p: the call. stats_2N: as `forward` gave it. scale_N: float32 [N], any strides.
        update: hyper-parameters, momentum and rounding counters.
        need_dx, need_db, need_value: what else to compute; the rest is None.
        guard: None, or one int32 on the device: not zero leaves weight and momentum as they are.
    """
    with torch.cuda.device_of(p.x_ND):
        c = prepare(p)

        sums = shared_sums(c, update) if need_dx else None
        walk = _Walk(c, stats_2N, scale_N, need_dx, need_db, need_value, sums)
        step = WeightUpdate(walk.product, update, guard, sums)
        for start, stop, g_NL in walk:
            step.apply(g_NL, start, stop)
        return UpdateResult(walk.dx_ND(), walk.db_L, walk.rows_N())


@torch.no_grad()
def head_chunks(p: HeadProblem, stats_2N: Tensor, scale_N: Tensor) -> Iterator[Chunk]:
    """dw in float32, a chunk of `p.chunk` outputs at a time."""
    with torch.cuda.device_of(p.x_ND):
        c = prepare(p)
        dw_CD = c.x_ND.new_empty((c.chunk, c.shape[1]), dtype=torch.float32)
        walk = _Walk(c, stats_2N, scale_N, need_dx=False, need_db=False, need_value=False)
        for start, stop, g_NL in walk:
            walk.product.store(g_NL, dw_CD[: stop - start])
            yield start, stop, dw_CD[: stop - start]


class _Walk:
    """One pass over a head's chunks: yields each one's gradient of the logits, and forms beside it
    dx, db and the row losses, where they are wanted."""

    def __init__(
        self,
        c: Call,
        stats_2N: Tensor,
        scale_N: Tensor,
        need_dx: bool,
        need_db: bool,
        need_value: bool,
        sums: SplitSums | None = None,
    ) -> None:
        """sums: of dx, where whoever consumes the gradients adds to them."""
        self._call, self._scale_N = c, scale_N.float().contiguous()
        self._gradient = Gradient(c, stats_2N.contiguous(), self._scale_N, need_value)
        self._features = FeatureGradient(c) if need_dx and sums is None else None
        self._sums = sums if self._features is None else self._features.sums
        self.product = WeightGradient(c, self._scale_N)
        self.db_L = None
        if need_db:  # zeros: no program runs for a batch of no rows
            self.db_L = c.x_ND.new_zeros((c.shape[2],), dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, g [N, chunk]) of each chunk; its weights may be overwritten meanwhile."""
        c, db_L, at_once = self._call, self.db_L, self._gradient.forms_bias
        for number, start, stop in c.chunks():
            g_NL = self._gradient.fill(number, start, stop, db_L if at_once else None)
            if self._features is not None:
                self._features.add(g_NL, c.w_LD[start:stop])
            if db_L is not None and not at_once:
                self.product.bias(g_NL, db_L[start:stop])
            yield start, stop, g_NL

    def dx_ND(self) -> Tensor | None:
        return None if self._sums is None else self._sums.result(self._scale_N)

    def rows_N(self) -> Tensor | None:
        return self._gradient.rows()
