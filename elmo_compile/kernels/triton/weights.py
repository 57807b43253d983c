"""The weight's gradient, consumed where it is formed: the update, or dw where it is asked for.

Legend: N rows, D features, L outputs of the chunk. A program owns a tile [BLOCK_L, BLOCK_D] of the
weight: gradient product in float32 registers, update in float32 on the loaded values, one rounding
at the store, whose random bits depend only on seed, parameter, step and element.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.factor import GramFactor
from elmo_compile.kernels.triton.device_math import ceil_div, tile_sum
from elmo_compile.kernels.triton.launch import Call
from elmo_compile.kernels.triton.product import gradient_tile
from elmo_compile.kernels.triton.storage import narrow, widen
from elmo_compile.kernels.triton.update import update_kernel
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.formats import format_of, is_narrow
from elmo_compile.numerics.philox import COMPENSATION, WEIGHT, counter_words
from elmo_compile.numerics.update import STATE_STREAMS, Update, half_step_at_largest


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
    grad = gradient_tile(
        g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
        BLOCK_L, BLOCK_D, BLOCK_K, EVEN_D, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    outputs = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    base = dw_ptr + l0.to(tl.int64) * D + d0
    mask = (outputs < L - l0)[:, None] & (columns < D - d0)[None, :]
    value = narrow(grad * tl.load(unit_ptr), dw_ptr.dtype.element_ty)
    tl.store(base + outputs[:, None] * D + columns[None, :], value, mask=mask)


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
        self._slots: Tensor | None = None
        self._factor: GramFactor | None = None
        self._norm2: Tensor | None = None
        self._x_ND = (c.problem.x_ND.float() * relative_N[:, None]).to(c.x_ND.dtype).contiguous()

    def _launch(self, L: int, g_NL: Tensor, update: Update | None = None) -> tuple[int, dict]:
        c, tile = self._call, self._call.tiles.weights
        if update is not None and (len(update.moments) > 1 or update.compensation is not None):
            tile = c.tiles.weights_with_state
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
        """Update the weight and state of outputs [start, stop) in place."""
        grid, arguments = self._launch(stop - start, g_NL, update)
        if update.row_wise:
            self._accumulate_rows(g_NL, start, stop, update, guard)
        words = [
            counter_words(update.seed, update.param_id, update.step, stream)
            for stream in (WEIGHT, *STATE_STREAMS, COMPENSATION)
        ]
        held = [
            s.load(start, stop) if isinstance(s, Blockwise) else s[start:stop]
            for s in update.moments
        ]
        first, second = (*held, None, None)[:2]
        c, slots = self._compensation(update, start, stop)
        w_LD = self._call.problem.w_LD
        narrow_format = format_of(w_LD.dtype) if is_narrow(w_LD.dtype) else None
        update_kernel[(grid,)](
            g_NL,
            self._x_ND,
            self._unit,
            self._call.w_LD[start:stop],
            first,
            second,
            update.row_sums[start:stop] if update.row_wise else None,
            c,
            slots,
            guard,
            **{name: float(value) for name, value in update.rates._asdict().items()},
            rest1=1.0 - update.beta1,
            rest2=1.0 - update.beta2,
            first_row=update.row_offset + start,
            seed=_signed(words[0].seed),
            param=_signed(words[0].param_id),
            word2=_signed(words[0].step_lo),
            word3=_signed(words[0].stream_step_hi),
            first_word3=_signed(words[1].stream_step_hi),
            second_word3=_signed(words[2].stream_step_hi),
            c_word3=_signed(words[3].stream_step_hi),
            RULE=update.rule,
            NESTEROV=update.nesterov,
            ECO=update.eco,
            STOCHASTIC=update.rounding == "stochastic",
            E5M2=c is not None and update.compensation.dtype == torch.float8_e5m2,
            LARGEST=narrow_format.max if narrow_format else math.inf,
            HALF=half_step_at_largest(narrow_format) if narrow_format else math.inf,
            **arguments,
        )

        for stored, value in zip(update.moments, held):
            if isinstance(stored, Blockwise):
                stored.store(start, stop, value, None if guard is None else guard.view(()) != 0)

    def _compensation(
        self, update: Update, start: int, stop: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(compensation as the kernel takes it, place of each of the chunk's rows in it)."""
        c = update.compensation
        if c is None:
            return None, None
        if c.dtype == torch.float8_e5m2:
            c = c.view(torch.uint8)
        if update.kahan_rows is None:
            return c[start:stop], None
        if self._slots is None:
            self._slots = slots_of(update.kahan_rows, self._call.w_LD.shape[0])
        return c, self._slots[start:stop]

    def _accumulate_rows(
        self, g_NL: Tensor, start: int, stop: int, update: Update, guard: Tensor | None
    ) -> None:
        """Row-wise Adagrad's sums: a tile does not own all of D, so from `sum_n g (y y^T g)`."""
        squares_L = self._squares(g_NL, stop - start)
        squares_L *= self._unit.double().square() / self._x_ND.shape[1]
        if guard is not None:
            squares_L = torch.where(guard == 0, squares_L, 0.0)
        update.row_sums[start:stop] += squares_L.to(update.row_sums.dtype)

    def add_norm(self, g_NL: Tensor, L: int) -> None:
        """Add a chunk to the squared norm of dw."""
        found = self._squares(g_NL, L).sum()
        self._norm2 = found if self._norm2 is None else self._norm2 + found

    def _squares(self, g_NL: Tensor, L: int) -> Tensor:
        """float64 [L]: the sum of the squares of each row of dw / unit."""
        if self._factor is None:
            self._factor = GramFactor(self._x_ND)
        return self._factor.row_squares(g_NL[:, :L].t())

    def norm2(self) -> Tensor | None:
        """The squared norm of dw, float64, over the chunks that were added."""
        return None if self._norm2 is None else self._norm2 * self._unit.double().square()

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


def slots_of(rows_H: Tensor, num_rows: int) -> Tensor:
    """int32 [L]: where each row stands among `rows_H`, -1 if it does not."""
    slots = torch.full((num_rows,), -1, dtype=torch.int32, device=rows_H.device)
    slots[rows_H] = torch.arange(rows_H.numel(), dtype=torch.int32, device=rows_H.device)
    return slots


def _signed(word: int) -> int:
    """A 32-bit word as the signed number with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
