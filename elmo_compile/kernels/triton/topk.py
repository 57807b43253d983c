"""The k largest logits of each row, streamed over chunks of outputs.

Legend: N rows, D features, L outputs of the chunk. The kernel writes one int64 a logit that orders
as (logit, then lower index first), so that `torch.topk` breaks ties the same way on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.triton.configs import batch_block
from elmo_compile.kernels.triton.device_math import ceil_div
from elmo_compile.kernels.triton.launch import Call, prepare
from elmo_compile.kernels.triton.product import logits_tile, whole_steps
from elmo_compile.numerics.losses import CE, LossSpec

_LOW = 0xFFFFFFFF


@triton.jit(do_not_specialize=["first_output"])
def _keys_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    b_ptr,
    keys_ptr,
    N,
    D,
    L,
    keys_stride,
    first_output: tl.int64,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """keys[n, l]: the bits of logit n, l, made monotonic, above 2^32 - 1 - (its output's number).

    -0 counts as 0, and every NaN as one that is above infinity.
    """
    blocks = ceil_div(N, BLOCK_N)
    l0 = (tl.program_id(0) // blocks) * BLOCK_L
    n0 = (tl.program_id(0) % blocks) * BLOCK_N
    z = logits_tile(
        x_ptr, x_scale_ptr, w_ptr, b_ptr, n0, l0, N, D, L,
        BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(z != z, 0x7FC00000, order)
    rows = tl.arange(0, BLOCK_N)
    outputs = tl.arange(0, BLOCK_L)
    below = 0xFFFFFFFF - (first_output + l0 + outputs).to(tl.int64)
    keys = (order.to(tl.int64) << 32) | below[None, :]
    base = keys_ptr + n0.to(tl.int64) * keys_stride + l0
    mask = (rows < N - n0)[:, None] & (outputs < L - l0)[None, :]
    tl.store(base + rows[:, None] * keys_stride + outputs[None, :], keys, mask=mask)


def _keys(c: Call, keys_NL: Tensor, start: int, stop: int) -> None:
    N, D, _ = c.shape
    tile = c.tiles.logits_narrow
    block_n = batch_block(tile.rows, N)
    grid = -(-(stop - start) // tile.columns) * -(-N // block_n)
    _keys_kernel[(grid,)](
        c.logits_x_ND,
        c.x_scale_N,
        c.w_LD[start:stop],
        None if c.b_L is None else c.b_L[start:stop],
        keys_NL,
        N=N,
        D=D,
        L=stop - start,
        keys_stride=keys_NL.stride(0),
        first_output=start,
        BLOCK_L=tile.columns,
        BLOCK_N=block_n,
        BLOCK_K=tile.inner,
        EVEN_K=whole_steps(D, tile.inner),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **c.constants,
    )


@torch.no_grad()
def topk(
    x_ND: Tensor,
    w_LD: Tensor,
    b_L: Tensor | None,
    k: int,
    chunk: int,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values float32 [N, k], largest first, and indices int64 [N, k] of `x w^T + b`.

    Ties go to the lower index, whatever the chunk.

    Args:
        x_ND, w_LD, b_L: as in `HeadProblem`.
        k: 1 <= k <= L.
        chunk: outputs per chunk.
        compute_dtype: operand dtype of the products; logits are compared in float32.

    Raises:
        InputError: k is out of range.
    """
    N, L = x_ND.shape[0], w_LD.shape[0]
    if not 1 <= k <= L:
        raise InputError(f"k={k} is out of range; accepted: 1 <= k <= {L} outputs")
    with torch.cuda.device_of(x_ND):
        c = prepare(
            HeadProblem(
                x_ND=x_ND,
                w_LD=w_LD.contiguous(),
                b_L=b_L,
                target=x_ND.new_empty(0),
                loss=LossSpec(name=CE, targets="classes"),
                chunk=chunk,
                compute_dtype=compute_dtype,
            )
        )
        keys_NL = x_ND.new_empty((N, c.chunk), dtype=torch.int64)
        best_NK = x_ND.new_empty((N, 0), dtype=torch.int64)
        for _, start, stop in c.chunks():
            _keys(c, keys_NL, start, stop)
            found_NK = keys_NL[:, : stop - start].topk(min(k, stop - start), dim=1).values
            candidates = torch.cat((best_NK, found_NK), 1)
            best_NK = candidates.topk(min(k, candidates.shape[1]), dim=1).values
        order_NK = (best_NK >> 32).to(torch.int32)
        bits_NK = torch.where(order_NK < 0, order_NK ^ 0x7FFFFFFF, order_NK)
        return bits_NK.view(torch.float32), _LOW - (best_NK & _LOW)
