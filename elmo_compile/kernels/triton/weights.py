"""The weight's gradient where it is asked for, its norm without it, and the bias's gradient.

Legend: N rows, D features, L outputs of the chunk. A program owns a tile [BLOCK_L, BLOCK_D] of dw:
the product in float32 registers, one rounding at the store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.factor import GramFactor
from elmo_compile.kernels.triton.configs import Tile
from elmo_compile.kernels.triton.device_math import ceil_div, tile_sum
from elmo_compile.kernels.triton.launch import Call
from elmo_compile.kernels.triton.product import gradient_tile, whole_steps
from elmo_compile.kernels.triton.storage import narrow, widen


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
    """The products of a chunk's gradient with the batch."""

    x_ND: Tensor
    """In the compute type, each row times its scale / `unit`."""
    unit: Tensor
    """float32 scalar: what the products are to be multiplied by."""

    def __init__(self, c: Call, scale_N: Tensor) -> None:
        """Fold the rows' scales into x relative to the largest: exact where they are all equal."""
        N, _, _ = c.shape
        self.call = c
        self._scale_N = scale_N
        largest = scale_N.abs().amax() if N else scale_N.new_zeros(())
        unit = torch.where(largest == 0, 1.0, largest)
        self.unit = unit / c.gradient_scale
        relative_N = scale_N / unit
        self._factor: GramFactor | None = None
        self._norm2: Tensor | None = None
        self.x_ND = (c.problem.x_ND.float() * relative_N[:, None]).to(c.x_ND.dtype).contiguous()

    def launch(self, L: int, g_NL: Tensor, tile: Tile | None = None) -> tuple[int, dict]:
        """(programs, arguments) of a product with the batch, tiled as for dw if not as given."""
        c = self.call
        tile = tile or c.tiles.weights
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
            "EVEN_K": whole_steps(N, tile.inner),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **c.constants,
        }

    def store(self, g_NL: Tensor, dw_LD: Tensor) -> None:
        """dw of a chunk into its rows of the result."""
        grid, arguments = self.launch(dw_LD.shape[0], g_NL)
        _dw_kernel[(grid,)](g_NL, self.x_ND, self.unit, dw_LD, **arguments)

    def add_norm(self, g_NL: Tensor, L: int) -> None:
        """Add a chunk to the squared norm of dw."""
        found = self.squares(g_NL, L).sum()
        self._norm2 = found if self._norm2 is None else self._norm2 + found

    def squares(self, g_NL: Tensor, L: int) -> Tensor:
        """float64 [L]: the sum of the squares of each row of dw / unit."""
        if self._factor is None:
            self._factor = GramFactor(self.x_ND, reduce=not self.call.problem.capturable)
        return self._factor.row_squares(g_NL[:, :L].t())

    def norm2(self) -> Tensor | None:
        """The squared norm of dw, float64, over the chunks that were added."""
        return None if self._norm2 is None else self._norm2 * self.unit.double().square()

    def bias(self, g_NL: Tensor, db_L: Tensor) -> None:
        """db of a chunk into its entries of the result."""
        c, L = self.call, db_L.shape[0]
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
