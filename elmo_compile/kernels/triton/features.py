"""dx: the chunk's gradient times its weights, added to float32 sums without atomics.

Legend: N rows, D features, L outputs of the chunk, S splits. A program owns a tile [BLOCK_N,
BLOCK_D] of one of the S sums and a fixed S-th of the chunk's outputs, so that a small batch fills
the chip and the order of additions never varies. The sums are added once, after the last chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.configs import Tile, batch_block
from elmo_compile.kernels.triton.device_math import ceil_div
from elmo_compile.kernels.triton.launch import Call
from elmo_compile.kernels.triton.product import product, whole_steps


@triton.jit
def _features_kernel(
    g_ptr,
    w_ptr,
    sums_ptr,
    N,
    D,
    L,
    g_stride,
    outputs_each,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[s, n, d] += sum over the split's outputs of g[n, l] w[l, d]."""
    blocks_n = ceil_div(N, BLOCK_N)
    blocks_d = ceil_div(D, BLOCK_D)
    n0 = (tl.program_id(0) % blocks_n) * BLOCK_N
    d0 = (tl.program_id(0) // blocks_n % blocks_d) * BLOCK_D
    split = tl.program_id(0) // (blocks_n * blocks_d)
    first = split * outputs_each
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    acc = product(
        g_ptr + n0.to(tl.int64) * g_stride + first,
        g_stride,
        1,
        w_ptr + first.to(tl.int64) * D + d0,
        D,
        1,
        tl.minimum(rows, N - 1 - n0),
        None,
        columns,
        None if EVEN_D else columns < D - d0,
        tl.minimum(outputs_each, L - first),
        BLOCK_N,
        BLOCK_D,
        BLOCK_K,
        EVEN_K,
        COMPUTE,
        PRECISION,
        RUNS=True,
    )
    sums = sums_ptr + (split.to(tl.int64) * N + n0) * D + d0
    offsets = rows[:, None] * D + columns[None, :]
    mask = (rows < N - n0)[:, None] & (columns < D - d0)[None, :]
    before = tl.load(sums + offsets, mask=mask, other=0.0)
    tl.store(sums + offsets, before + acc, mask=mask)


class SplitSums:
    """Sums of dx, one for each of a fixed number of splits of a chunk's outputs."""

    def __init__(self, c: Call, tile: Tile, programs: int) -> None:
        """As many splits as it takes to have `programs` programs, of tiles as `tile` says: rows
        of the batch x features, over outputs."""
        N, D, _ = c.shape
        self._call = c
        self.block_n = batch_block(tile.rows, N)
        self.tiles = -(-N // self.block_n) * -(-D // tile.columns)
        splits = max(1, programs // max(1, self.tiles))
        steps = -(-c.chunk // tile.inner)
        self.outputs_each = -(-steps // splits) * tile.inner
        most = -(-c.chunk // self.outputs_each)
        self.sums_SND = c.x_ND.new_zeros((most, N, D), dtype=torch.float32)

    def grid(self, L: int) -> int:
        """Programs for a chunk of L outputs."""
        return self.tiles * -(-L // self.outputs_each)

    def result(self, scale_N: Tensor) -> Tensor:
        """float32 [N, D]: the sums over all chunks, each row times its scale."""
        factor_N = scale_N / self._call.gradient_scale
        return self.sums_SND.sum(0).mul_(factor_N[:, None])


class FeatureGradient:
    """dx of a call by a product of its own, summed chunk by chunk."""

    def __init__(self, c: Call) -> None:
        self._call = c
        self.sums = SplitSums(c, c.tiles.features, c.processors)

    def add(self, g_NL: Tensor, w_LD: Tensor) -> None:
        """Add a chunk: its gradient and its weights as they were."""
        c, tile, sums = self._call, self._call.tiles.features, self.sums
        N, D, _ = c.shape
        L = g_NL.shape[1]
        _features_kernel[(sums.grid(L),)](
            g_NL,
            w_LD,
            sums.sums_SND,
            N=N,
            D=D,
            L=L,
            g_stride=g_NL.stride(0),
            outputs_each=sums.outputs_each,
            BLOCK_N=sums.block_n,
            BLOCK_D=tile.columns,
            BLOCK_K=tile.inner,
            EVEN_D=D % tile.columns == 0,
            EVEN_K=whole_steps(L, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **c.constants,
        )
