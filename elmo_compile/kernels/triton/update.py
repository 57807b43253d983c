"""The update of a head's weight, where its gradient is formed.

Legend: N rows, D features, L outputs of the chunk. A program owns a tile [BLOCK_L, BLOCK_D] of the
weight: gradient product in float32 registers, update in float32 on the loaded values, one rounding
at each store, whose random bits depend only on seed, parameter, step, stream and element.
Launched by `weights.WeightGradient`.
"""

import triton
import triton.language as tl

from elmo_compile.kernels.triton.device_math import ceil_div
from elmo_compile.kernels.triton.product import gradient_tile
from elmo_compile.kernels.triton.random_bits import element_words
from elmo_compile.kernels.triton.records import rates
from elmo_compile.kernels.triton.rules import (
    compensate,
    direction,
    loaded_compensation,
    stored_compensation,
    stored_state,
    with_error,
)
from elmo_compile.kernels.triton.storage import operand, rounded, widen


@triton.jit
def _words(keys_ptr, outputs, real, columns):
    """Random words of a tile's elements; anything where there are no keys: nothing uses them."""
    if keys_ptr is None:
        return columns[None, :]
    else:
        keys = tl.load(keys_ptr + outputs, mask=real, other=0)
        return element_words(keys.to(tl.uint32, bitcast=True), columns)


@triton.jit
def _update_tile(
    grad, w, w_ptr, first_ptr, second_ptr, sum_ptr, c_ptr, slot_ptr,
    w_keys_ptr, first_keys_ptr, second_keys_ptr, c_keys_ptr,
    l0, d0, D, row_mask, mask,
    lr, weight_decay, beta1, beta2, rest1, rest2, eps, error,
    RULE: tl.constexpr, NESTEROV: tl.constexpr, ECO: tl.constexpr, DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr, E5M2: tl.constexpr, LARGEST: tl.constexpr, HALF: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Update the tile at output l0 and feature d0, whose weights are `w` and gradient `grad`.

    slot_ptr: None if every row is compensated, or for each row its place in c, negative for none.
    mask: what may be written.
    """
    at = l0 + tl.arange(0, BLOCK_L)
    columns = d0 + tl.arange(0, BLOCK_D)
    base = l0.to(tl.int64) * D + d0
    offsets = tl.arange(0, BLOCK_L)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    m = w
    v = w
    a = w
    if first_ptr is not None:
        m = widen(tl.load(first_ptr + base + offsets, mask=mask, other=0))
    if second_ptr is not None:
        v = widen(tl.load(second_ptr + base + offsets, mask=mask, other=0))
    if sum_ptr is not None:
        a = tl.load(sum_ptr + at, mask=row_mask, other=1.0)[:, None]
    u, m, v = direction(
        w, grad, m, v, a, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
        RULE, first_ptr is not None, NESTEROV, DECAY,
    )  # fmt: skip
    words = _words(w_keys_ptr, at, row_mask, columns)
    TYPE: tl.constexpr = w_ptr.dtype.element_ty
    if c_ptr is None:
        new = rounded(w + u, words, TYPE, STOCHASTIC)
    else:
        c_words = _words(c_keys_ptr, at, row_mask, columns)
        if slot_ptr is None:
            s = u + loaded_compensation(tl.load(c_ptr + base + offsets, mask=mask, other=0), E5M2)
            new = rounded(w + s, words, TYPE, False)
            c = compensate(w, s, widen(new), LARGEST, HALF)
            tl.store(c_ptr + base + offsets, stored_compensation(c, c_words, E5M2), mask)
        else:
            new = rounded(w + u, words, TYPE, STOCHASTIC)
            slot = tl.load(slot_ptr + at, mask=row_mask, other=-1).to(tl.int64)
            kept = (slot >= 0)[:, None] & mask
            places = slot[:, None] * D + columns[None, :]
            s = u + loaded_compensation(tl.load(c_ptr + places, mask=kept, other=0), E5M2)
            exact = rounded(w + s, words, TYPE, False)
            c = compensate(w, s, widen(exact), LARGEST, HALF)
            tl.store(c_ptr + places, stored_compensation(c, c_words, E5M2), kept)
            new = tl.where(kept, exact, new)
    tl.store(w_ptr + base + offsets, new, mask)
    if first_ptr is not None:
        if ECO:
            m = with_error(m, v, error, (w + u) - widen(new), eps, RULE)
        words = _words(first_keys_ptr, at, row_mask, columns)
        tl.store(
            first_ptr + base + offsets, stored_state(m, words, first_ptr.dtype.element_ty), mask
        )
    if second_ptr is not None:
        words = _words(second_keys_ptr, at, row_mask, columns)
        tl.store(
            second_ptr + base + offsets, stored_state(v, words, second_ptr.dtype.element_ty), mask
        )


@triton.jit
def update_kernel(
    g_ptr, x_ptr, unit_ptr, w_ptr, first_ptr, second_ptr, sum_ptr, c_ptr, slot_ptr, guard_ptr,
    w_keys_ptr, first_keys_ptr, second_keys_ptr, c_keys_ptr,
    record_ptr, N, D, L, g_stride,
    RULE: tl.constexpr, NESTEROV: tl.constexpr, ECO: tl.constexpr, DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr, E5M2: tl.constexpr, LARGEST: tl.constexpr, HALF: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One update of a tile of w and its state; nothing is written where guard is not zero."""
    blocks_d = ceil_div(D, BLOCK_D)
    l0 = (tl.program_id(0) // blocks_d) * BLOCK_L
    d0 = (tl.program_id(0) % blocks_d) * BLOCK_D
    grad = gradient_tile(
        g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
        BLOCK_L, BLOCK_D, BLOCK_K, EVEN_D, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    outputs = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    row_mask = outputs < L - l0
    width = D - d0
    if guard_ptr is not None:
        width = tl.where(tl.load(guard_ptr) == 0, width, 0)
    mask = row_mask[:, None] & (columns < width)[None, :]
    offsets = outputs[:, None] * D + columns[None, :]
    w = widen(tl.load(w_ptr + l0.to(tl.int64) * D + d0 + offsets, mask=mask, other=0))
    lr, weight_decay, beta1, beta2, rest1, rest2, eps, error = rates(record_ptr)
    _update_tile(
        grad * tl.load(unit_ptr), w, w_ptr, first_ptr, second_ptr, sum_ptr, c_ptr, slot_ptr,
        w_keys_ptr, first_keys_ptr, second_keys_ptr, c_keys_ptr,
        l0, d0, D, row_mask, mask,
        lr, weight_decay, beta1, beta2, rest1, rest2, eps, error,
        RULE, NESTEROV, ECO, DECAY, STOCHASTIC, E5M2, LARGEST, HALF, BLOCK_L, BLOCK_D,
    )  # fmt: skip


@triton.jit
def features_update_kernel(
    g_ptr, x_ptr, unit_ptr, w_ptr, first_ptr, second_ptr, sum_ptr, c_ptr, slot_ptr, guard_ptr,
    w_keys_ptr, first_keys_ptr, second_keys_ptr, c_keys_ptr,
    record_ptr, dx_ptr, N, D, L, g_stride, outputs_each,
    RULE: tl.constexpr, NESTEROV: tl.constexpr, ECO: tl.constexpr, DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr, E5M2: tl.constexpr, LARGEST: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_L: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and the update in one pass over w and g, where one tile holds all rows of the batch.

    dx[s, n, d] += sum over the split's outputs of g[n, l] w[l, d], from the weights as they were; a
    program owns BLOCK_D columns of one split's outputs. Nothing but dx is written where guard is
    not zero.
    """
    blocks_d = ceil_div(D, BLOCK_D)
    d0 = (tl.program_id(0) % blocks_d) * BLOCK_D
    split = tl.program_id(0) // blocks_d
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    outputs = tl.arange(0, BLOCK_L)
    at_ND = rows[:, None] * D + columns[None, :]
    at_LD = outputs[:, None] * D + columns[None, :]
    at_NL = rows[:, None] * g_stride + outputs[None, :]
    row_real = rows < N
    real_ND = row_real[:, None] & (columns < D - d0)[None, :]
    x = operand(tl.load(x_ptr + d0 + at_ND, mask=real_ND, other=0), COMPUTE)
    unit = tl.load(unit_ptr)
    width = D - d0
    if guard_ptr is not None:
        width = tl.where(tl.load(guard_ptr) == 0, width, 0)
    writable = (columns < width)[None, :]
    dx = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    first = split * outputs_each
    for step in tl.range(0, ceil_div(tl.minimum(outputs_each, L - first), BLOCK_L)):
        l0 = first + step * BLOCK_L
        if EVEN_N:
            g = operand(tl.load(g_ptr + l0 + at_NL), COMPUTE)
        else:
            g = operand(tl.load(g_ptr + l0 + at_NL, mask=row_real[:, None], other=0), COMPUTE)
        row_mask = outputs < L - l0
        mask = row_mask[:, None] & (columns < D - d0)[None, :]
        tile_ptr = w_ptr + l0.to(tl.int64) * D + d0
        if EVEN_D and EVEN_L:
            stored = tl.load(tile_ptr + at_LD)
        else:
            stored = tl.load(tile_ptr + at_LD, mask=mask, other=0)
        dx = tl.dot(g, operand(stored, COMPUTE), acc=dx, input_precision=PRECISION)
        grad = tl.dot(tl.trans(g), x, input_precision=PRECISION)
        # Read in every step: kept from one to the next they would take eight registers of products.
        lr, weight_decay, beta1, beta2, rest1, rest2, eps, error = rates(record_ptr)
        _update_tile(
            grad * unit, widen(stored), w_ptr, first_ptr, second_ptr, sum_ptr, c_ptr, slot_ptr,
            w_keys_ptr, first_keys_ptr, second_keys_ptr, c_keys_ptr,
            l0, d0, D, row_mask, mask & writable,
            lr, weight_decay, beta1, beta2, rest1, rest2, eps, error,
            RULE, NESTEROV, ECO, DECAY, STOCHASTIC, E5M2, LARGEST, HALF, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    sums = dx_ptr + split.to(tl.int64) * N * D + d0 + at_ND
    before = tl.load(sums, mask=real_ND, other=0.0)
    tl.store(sums, before + dx, mask=real_ND)
