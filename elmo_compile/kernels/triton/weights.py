"""The weight's gradient, consumed where it is formed: the update, or dw where it is asked for.

Legend: N rows, D features, L outputs of the chunk. A program owns a tile [BLOCK_L, BLOCK_D] of the
weight: gradient product in float32 registers, update in float32 on the loaded values, one rounding
at the store, whose random bits depend only on seed, parameter, step and element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.device_math import ceil_div, tile_sum
from elmo_compile.kernels.triton.launch import Call
from elmo_compile.kernels.triton.product import product
from elmo_compile.kernels.triton.random_bits import element_words, row_keys
from elmo_compile.kernels.triton.storage import narrow, store_rounded, widen
from elmo_compile.numerics.philox import MOMENTUM, WEIGHT, counter_words
from elmo_compile.numerics.update import Update


@triton.jit
def _gradient_tile(
    g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_L, BLOCK_D]: `sum_n g[n, l] x[n, d]`, x carrying each row's scale.

    g's rows are padded to whole tiles, so that outputs past L can be read.
    """
    return product(
        g_ptr + l0,
        1,
        g_stride,
        x_ptr + d0,
        D,
        1,
        tl.arange(0, BLOCK_L),
        None,
        tl.arange(0, BLOCK_D),
        None if EVEN_D else tl.arange(0, BLOCK_D) < D - d0,
        N,
        BLOCK_L,
        BLOCK_D,
        BLOCK_K,
        EVEN_K,
        COMPUTE,
        PRECISION,
    )


@triton.jit
def _dw_kernel(
    g_ptr,
    x_ptr,
    unit_ptr,
    dw_ptr,
    N,
    D,
    L,
    g_stride,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[l, d] = unit * sum_n g[n, l] x[n, d], to nearest."""
    blocks_d = ceil_div(D, BLOCK_D)
    l0 = (tl.program_id(0) // blocks_d) * BLOCK_L
    d0 = (tl.program_id(0) % blocks_d) * BLOCK_D
    grad = _gradient_tile(
        g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
        BLOCK_L, BLOCK_D, BLOCK_K, EVEN_D, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    outputs = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    base = dw_ptr + l0.to(tl.int64) * D + d0
    mask = (outputs < L - l0)[:, None] & (columns < D - d0)[None, :]
    value = narrow(grad * tl.load(unit_ptr), dw_ptr.dtype.element_ty)
    tl.store(base + outputs[:, None] * D + columns[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["first_row", "seed", "param", "word2", "word3", "momentum_word3"])
def _update_kernel(
    g_ptr,
    x_ptr,
    unit_ptr,
    w_ptr,
    m_ptr,
    guard_ptr,
    N,
    D,
    L,
    g_stride,
    lr,
    weight_decay,
    momentum,
    first_row: tl.int64,
    seed: tl.int32,
    param: tl.int32,
    word2: tl.int32,
    word3: tl.int32,
    momentum_word3: tl.int32,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SGD on a tile of w (and its momentum m); nothing is written where guard is not zero."""
    blocks_d = ceil_div(D, BLOCK_D)
    l0 = (tl.program_id(0) // blocks_d) * BLOCK_L
    d0 = (tl.program_id(0) % blocks_d) * BLOCK_D
    grad = _gradient_tile(
        g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
        BLOCK_L, BLOCK_D, BLOCK_K, EVEN_D, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    step = grad * tl.load(unit_ptr)

    outputs = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    base = l0.to(tl.int64) * D + d0
    offsets = outputs[:, None] * D + columns[None, :]
    mask = (outputs < L - l0)[:, None] & (columns < D - d0)[None, :]
    if guard_ptr is not None:
        mask = mask & (tl.load(guard_ptr) == 0)
    w = widen(tl.load(w_ptr + base + offsets, mask=mask, other=0))
    rows = first_row.to(tl.int64) + l0 + outputs
    if DECAY:
        step += weight_decay * w
    if m_ptr is not None:
        m = momentum * widen(tl.load(m_ptr + base + offsets, mask=mask, other=0)) + step
        keys = row_keys(rows, seed, param, word2, momentum_word3)
        store_rounded(m_ptr + base, offsets, m, element_words(keys, d0 + columns), mask, True)
        step = step + momentum * m if NESTEROV else m
    keys = row_keys(rows, seed, param, word2, word3)
    words = element_words(keys, d0 + columns)
    store_rounded(w_ptr + base, offsets, w - lr * step, words, mask, STOCHASTIC)


@triton.jit
def _db_kernel(
    g_ptr, scale_ptr, db_ptr, N, L, g_stride, inverse, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr
):
    """db[l] = inverse * sum_n g[n, l] scale[n], rows in order, in float32."""
    l0 = tl.program_id(0) * BLOCK_L
    outputs = tl.arange(0, BLOCK_L)
    real = outputs < L - l0
    total = tl.full((BLOCK_L,), 0.0, tl.float32)
    for n in range(0, N, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & real[None, :]
        offsets = rows.to(tl.int64)[:, None] * g_stride + (l0 + outputs)[None, :]
        g = widen(tl.load(g_ptr + offsets, mask=mask, other=0))
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        total += tile_sum(g * scale[:, None], 0)
    tl.store(db_ptr + l0 + outputs, total * inverse, mask=real)


class WeightGradient:
    """The products with the batch: dw, or the update in its place; and the bias's gradient."""

    def __init__(self, c: Call, scale_N: Tensor) -> None:
        """Fold the rows' scales into x relative to the largest: exact where they are all equal."""
        N, _, _ = c.shape
        self._call = c
        self._scale_N = scale_N
        largest = scale_N.abs().amax() if N else scale_N.new_zeros(())
        unit = torch.where(largest == 0, 1.0, largest)
        self._unit = unit / c.gradient_scale
        relative_N = scale_N / unit
        self._x_ND = (c.problem.x_ND.float() * relative_N[:, None]).to(c.x_ND.dtype).contiguous()

    def _launch(self, L: int, g_NL: Tensor) -> tuple[int, dict]:
        c, tile = self._call, self._call.tiles.weights
        N, D, _ = c.shape
        grid = -(-L // tile.rows) * -(-D // tile.columns)
        return grid, {
            "N": N,
            "D": D,
            "L": L,
            "g_stride": g_NL.stride(0),
            "BLOCK_L": tile.rows,
            "BLOCK_D": tile.columns,
            "BLOCK_K": tile.inner,
            "EVEN_D": D % tile.columns == 0,
            "EVEN_K": N % tile.inner == 0,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **c.constants,
        }

    def store(self, g_NL: Tensor, dw_LD: Tensor) -> None:
        """dw of a chunk into its rows of the result."""
        grid, arguments = self._launch(dw_LD.shape[0], g_NL)
        _dw_kernel[(grid,)](g_NL, self._x_ND, self._unit, dw_LD, **arguments)

    def update(
        self, g_NL: Tensor, start: int, stop: int, update: Update, guard: Tensor | None
    ) -> None:
        """Update the weight (and momentum) of outputs [start, stop) in place."""
        grid, arguments = self._launch(stop - start, g_NL)
        weight = counter_words(update.seed, update.param_id, update.step, WEIGHT)
        state = counter_words(update.seed, update.param_id, update.step, MOMENTUM)
        _update_kernel[(grid,)](
            g_NL,
            self._x_ND,
            self._unit,
            self._call.w_LD[start:stop],
            None if update.buffer is None else update.buffer[start:stop],
            guard,
            lr=float(update.lr),
            weight_decay=float(update.weight_decay),
            momentum=float(update.momentum),
            first_row=update.row_offset + start,
            seed=_signed(weight.seed),
            param=_signed(weight.param_id),
            word2=_signed(weight.step_lo),
            word3=_signed(weight.stream_step_hi),
            momentum_word3=_signed(state.stream_step_hi),
            DECAY=update.weight_decay != 0,
            NESTEROV=update.nesterov,
            STOCHASTIC=update.rounding == "stochastic",
            **arguments,
        )

    def bias(self, g_NL: Tensor, db_L: Tensor) -> None:
        """db of a chunk into its entries of the result."""
        c, L = self._call, db_L.shape[0]
        block_l, block_n = (32, 32) if c.processors <= 4 else (64, 128)
        _db_kernel[(-(-L // block_l),)](
            g_NL,
            self._scale_N,
            db_L,
            N=c.shape[0],
            L=L,
            g_stride=g_NL.stride(0),
            inverse=1.0 / c.gradient_scale,
            BLOCK_L=block_l,
            BLOCK_N=block_n,
            num_warps=4,
        )


def _signed(word: int) -> int:
    """A 32-bit word as the signed number with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
