"""The loss against the targets of a tile, in the three forms that targets come in."""

import triton
import triton.language as tl

from elmo_compile.kernels.triton.device_math import (
    bce_gradient,
    bce_value,
    sigmoid,
    softplus,
    tile_sum,
)
from elmo_compile.kernels.triton.positives import positives_tile
from elmo_compile.kernels.triton.storage import widen


@triton.jit
def dense_tile(
    target_ptr, target_n, target_l, n0, l0, N, L, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr
):
    """float32 [BLOCK_N, BLOCK_L] of targets [N, L] of any strides and type, from row n0, output l0.

    Past N and L the last ones are repeated.
    """
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
    outputs = tl.minimum(tl.arange(0, BLOCK_L), L - 1 - l0)
    base = target_ptr + n0.to(tl.int64) * target_n + l0.to(tl.int64) * target_l
    offsets_n = rows.to(tl.int64) * target_n
    offsets_l = outputs.to(tl.int64) * target_l
    y = tl.load(base + offsets_n[:, None] + offsets_l[None, :])
    return y.to(tl.float32) if y.dtype == tl.uint8 else widen(y)


@triton.jit
def bce_tile(
    z,
    target_ptr,
    target_n,
    target_l,
    rows_ptr,
    cols_ptr,
    values_ptr,
    bounds_ptr,
    tile,
    n0,
    l0,
    first_output,
    N,
    L,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """(gradient [BLOCK_N, BLOCK_L], value of each row [BLOCK_N]) of BCE: rows n0.., outputs l0...

    `dense`: targets read from a matrix. `pairs`: targets made from the tile's piece
    of the pairs; most tiles of a huge head have none. What is not used costs nothing.
    """
    real = (tl.arange(0, BLOCK_L) < L - l0)[None, :]
    if TARGETS == "dense":
        y = dense_tile(target_ptr, target_n, target_l, n0, l0, N, L, BLOCK_L, BLOCK_N)
        return bce_gradient(z, y), tile_sum(tl.where(real, bce_value(z, y), 0.0), 1)
    else:
        first = tl.load(bounds_ptr + tile)
        last = tl.load(bounds_ptr + tile + 1)
        if first == last:
            gradient = sigmoid(z)
            value = tile_sum(tl.where(real, softplus(z), 0.0), 1)
        else:
            y = positives_tile(
                rows_ptr, cols_ptr, values_ptr, first, last, n0, first_output + l0, BLOCK_L, BLOCK_N
            )
            gradient = bce_gradient(z, y)
            value = tile_sum(tl.where(real, bce_value(z, y), 0.0), 1)
        return gradient, value


@triton.jit
def class_hits(
    target_ptr, n0, l0, first_output, N, ignore_index, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr
):
    """For rows n0..: (hit [BLOCK_N, BLOCK_L], row has a hit [BLOCK_N], row counts [BLOCK_N]).

    `hit` is true at a row's class; a row to ignore does not count, nor does one past N.
    """
    rows = tl.arange(0, BLOCK_N)
    real = rows < N - n0
    target = tl.load(target_ptr + n0 + rows, mask=real, other=0)
    counted = real & (target != ignore_index)
    at = target - (first_output + l0)
    at = tl.where(counted & (at >= 0) & (at < BLOCK_L), at, -1).to(tl.int32)
    hit = at[:, None] == tl.arange(0, BLOCK_L)[None, :]
    return hit, at >= 0, counted
