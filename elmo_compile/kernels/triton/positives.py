"""Sparse targets as tiles: each tile of outputs finds its positives in the sorted pairs.

Legend: N rows, L outputs, M pairs of a batch, T tiles of a chunk. The positives of a tile are one
contiguous piece of the pairs, so no target matrix, bit mask or fix-up pass is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.storage import operand

PAIRS_AT_ONCE = tl.constexpr(16)
"""Pairs taken into a tile by one product of one-hot matrices."""


def tile_bounds(cols_M: Tensor, outputs: int, chunk: int, block: int) -> Tensor:
    """int64 [C, T + 1]: where the pairs of each tile of each chunk begin, and the last one ends.

    T + 1 is rounded up to an even number: each chunk's row is as aligned as the first, and the
    kernel is compiled once.
    """
    tiles = -(-chunk // block)
    device = cols_M.device
    starts_C = torch.arange(0, outputs, chunk, device=device)
    inside_T = torch.arange((tiles + 2) // 2 * 2, device=device).mul_(block).clamp_(max=chunk)
    edges_CT = (starts_C[:, None] + inside_T).clamp_(max=outputs)
    return torch.searchsorted(cols_M, edges_CT)


@triton.jit
def _top_bits(v):
    """float32 cut to its top 16 bits: a bf16 value, held exactly; the rest is what it misses."""
    return (v.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _place(at_NP, values_P, at_PL, acc):
    """acc + the products of one-hot matrices with float32 values, exact: three bf16 parts."""
    for _ in tl.static_range(3):
        part = _top_bits(values_P)
        values_P = values_P - part
        right = tl.where(at_PL, part[:, None], 0.0).to(tl.bfloat16)
        acc = tl.dot(operand(at_NP, tl.bfloat16), operand(right, tl.bfloat16), acc=acc)
    return acc


@triton.jit
def positives_tile(
    rows_ptr,
    cols_ptr,
    values_ptr,
    first,
    last,
    n0,
    first_output,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_L]: targets of rows n0.. and outputs first_output...

    They come from the pairs [first, last). A pair appears once, so each element has one term and
    the placing by products is exact.
    """
    y = tl.full((BLOCK_N, BLOCK_L), 0.0, tl.float32)
    outputs = tl.arange(0, BLOCK_L)
    rows = tl.arange(0, BLOCK_N)
    for p in tl.range(first, last, PAIRS_AT_ONCE, num_stages=1):
        pair = p + tl.arange(0, PAIRS_AT_ONCE)
        inside = pair < last
        row = (tl.load(rows_ptr + pair, mask=inside, other=-1) - n0).to(tl.int32)
        output = (tl.load(cols_ptr + pair, mask=inside, other=-1) - first_output).to(tl.int32)
        at_NP = rows[:, None] == row[None, :]
        at_PL = (output[:, None] == outputs[None, :]) & inside[:, None]
        if values_ptr is None:
            y = tl.dot(at_NP.to(tl.float16), at_PL.to(tl.float16), acc=y)
        else:
            value = tl.load(values_ptr + pair, mask=inside, other=0.0)
            y = _place(at_NP.to(tl.float32).to(tl.bfloat16), value, at_PL, y)
    return y
