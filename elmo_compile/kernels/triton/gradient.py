"""The gradient of the loss with respect to a chunk's logits, never scaled, in the compute type.

Legend: N rows, D features, L outputs of the chunk. A program owns one tile [BLOCK_N, BLOCK_L] of
logits: product in float32, the loss's gradient in float32, one rounding to nearest.
Upstream factors are applied in float32 where dx and the update are formed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.configs import PADDING, batch_block
from elmo_compile.kernels.triton.device_math import (
    ceil_div,
    exp,
    expm1_nonpositive,
    tile_sum,
)
from elmo_compile.kernels.triton.launch import Call, Targets, prepare_targets
from elmo_compile.kernels.triton.product import logits_tile, whole_steps
from elmo_compile.kernels.triton.storage import narrow
from elmo_compile.kernels.triton.targets import bce_tile, class_hits, dense_tile
from elmo_compile.numerics.losses import CE


@triton.jit
def _log_probability(z, lse_ptr, n0, rows, N):
    """z minus the row's log-sum-exp, given in two parts [2, N]."""
    row_real = rows < N - n0
    high = tl.load(lse_ptr + n0 + rows, mask=row_real, other=0.0)
    low = tl.load(lse_ptr + N + n0 + rows, mask=row_real, other=0.0)
    return (z - high[:, None]) - low[:, None]


@triton.jit(do_not_specialize=["first_output"])
def _gradient_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    b_ptr,
    lse_ptr,
    mass_ptr,
    g_ptr,
    value_ptr,
    target_ptr,
    target_n,
    target_l,
    rows_ptr,
    cols_ptr,
    values_ptr,
    bounds_ptr,
    scale_ptr,
    db_ptr,
    N,
    D,
    L,
    g_stride,
    first_output: tl.int64,
    ignore_index: tl.int64,
    gradient_scale,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """g[n, l] = dloss_n/dz_nl; value, if asked for: see `Gradient`.

    db, if asked for (the tile holds all rows): db[l] = sum_n scale[n] g[n, l].
    """
    blocks = ceil_div(N, BLOCK_N)
    tile = tl.program_id(0) // blocks
    n0 = (tl.program_id(0) % blocks) * BLOCK_N
    l0 = tile * BLOCK_L
    rows = tl.arange(0, BLOCK_N)
    outputs = tl.arange(0, BLOCK_L)
    row_real = rows < N - n0
    z = logits_tile(
        x_ptr, x_scale_ptr, w_ptr, b_ptr, n0, l0, N, D, L,
        BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    output_real = outputs < L - l0
    if TARGETS == "classes":
        hit, here, counted = class_hits(
            target_ptr, n0, l0, first_output, N, ignore_index, BLOCK_L, BLOCK_N
        )
        t = _log_probability(z, lse_ptr, n0, rows, N)
        at_class = tile_sum(tl.where(hit, t, 0.0), 1)
        g = tl.where(hit, expm1_nonpositive(at_class)[:, None], exp(t))
        g = tl.where(counted[:, None], g, 0.0)
        if value_ptr is not None:
            tl.store(value_ptr + n0 + rows, -at_class, mask=here)
    elif lse_ptr is not None:
        t = _log_probability(z, lse_ptr, n0, rows, N)
        mass = tl.load(mass_ptr + n0 + rows, mask=row_real, other=0.0)[:, None]
        y = dense_tile(target_ptr, target_n, target_l, n0, l0, N, L, BLOCK_L, BLOCK_N)
        g = (mass - y) * exp(t) + y * expm1_nonpositive(t)
        g = tl.where(row_real[:, None], g, 0.0)  # past N, exp(t) of a large logit is infinite
        value = tile_sum(tl.where(output_real[None, :], -y * t, 0.0), 1)
    else:
        g, value = bce_tile(
            z, target_ptr, target_n, target_l, rows_ptr, cols_ptr, values_ptr, bounds_ptr,
            tile, n0, l0, first_output, N, L, BLOCK_L, BLOCK_N, TARGETS,
        )  # fmt: skip
    if value_ptr is not None and TARGETS != "classes":
        sums = value_ptr + tile.to(tl.int64) * N + n0 + rows
        before = tl.load(sums, mask=row_real, other=0.0)
        tl.store(sums, before + value.to(tl.float64), mask=row_real)
    if db_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=row_real, other=0.0)
        tl.store(db_ptr + l0 + outputs, tile_sum(g * scale[:, None], 0), mask=output_real)
    base = g_ptr + n0.to(tl.int64) * g_stride + l0
    tl.store(
        base + rows[:, None] * g_stride + outputs[None, :],
        narrow(g * gradient_scale, COMPUTE),
        mask=row_real[:, None] & output_real[None, :],
    )


class Gradient:
    """The gradient buffer of a call and the kernel that fills it, chunk by chunk."""

    g_NL: Tensor
    """[N, chunk rounded up to PADDING] of the compute type: the last filled chunk, times the call's
    `gradient_scale`. What is past a chunk's end is finite and not used."""

    def __init__(self, c: Call, stats_2N: Tensor, scale_N: Tensor, need_value: bool) -> None:
        N, _, _ = c.shape
        self._scale_N = scale_N
        self._tile = tile = c.logits_tile(value=need_value)
        self._call = c
        self._lse_2N = stats_2N if c.problem.loss.name == CE else None
        self._block_n = batch_block(tile.rows, N)
        self._targets: Targets = prepare_targets(c, c.chunk, tile.columns)
        self._mass_N = None
        if self._lse_2N is not None and self._targets.kind == "dense":
            self._mass_N = self._targets.mass().float()
        self.g_NL = c.x_ND.new_zeros((N, -(-c.chunk // PADDING) * PADDING))
        self._value = None
        if need_value:
            # float64 sums of each tile position over the chunks; for classes the rows themselves.
            shape = (N,) if self._targets.kind == "classes" else (-(-c.chunk // tile.columns), N)
            dtype = torch.float32 if len(shape) == 1 else torch.float64
            self._value = c.x_ND.new_zeros(shape, dtype=dtype)

    @property
    def forms_bias(self) -> bool:
        """Whether a tile holds all rows, and so the bias's gradient."""
        return self._call.shape[0] <= self._block_n

    def rows(self) -> Tensor | None:
        """float32 [N] losses of the rows, once every chunk was filled; None if not asked for."""
        if self._value is None or self._value.dim() == 1:
            return self._value
        return self._value.sum(0).float()

    def fill(self, number: int, start: int, stop: int, db_L: Tensor | None = None) -> Tensor:
        """g_NL[:, : stop - start] for the chunk `number`, outputs [start, stop).

        db_L, where given (`forms_bias`), gets the bias's gradient at these outputs.
        """
        c, tile = self._call, self._tile
        N, D, _ = c.shape
        grid = -(-(stop - start) // tile.columns) * -(-N // self._block_n)
        _gradient_kernel[(grid,)](
            c.logits_x_ND,
            c.x_scale_N,
            c.w_LD[start:stop],
            None if c.b_L is None else c.b_L[start:stop],
            self._lse_2N,
            self._mass_N,
            self.g_NL,
            self._value,
            scale_ptr=None if db_L is None else self._scale_N,
            db_ptr=None if db_L is None else db_L[start:stop],
            N=N,
            D=D,
            L=stop - start,
            g_stride=self.g_NL.stride(0),
            ignore_index=c.problem.loss.ignore_index,
            gradient_scale=c.gradient_scale,
            BLOCK_L=tile.columns,
            BLOCK_N=self._block_n,
            BLOCK_K=tile.inner,
            EVEN_K=whole_steps(D, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **self._targets.arguments(number, start),
            **c.constants,
        )
        return self.g_NL[:, : stop - start]
