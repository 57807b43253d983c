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
from elmo_compile.kernels.triton.random_bits import element_words, row_keys
from elmo_compile.kernels.triton.rules import (
    compensate,
    direction,
    loaded_compensation,
    stored_compensation,
    stored_state,
    with_error,
)
from elmo_compile.kernels.triton.storage import rounded, widen


@triton.jit(
    do_not_specialize=[
        "first_row", "seed", "param", "word2", "word3", "first_word3", "second_word3", "c_word3",
    ]
)  # fmt: skip
def update_kernel(
    g_ptr,
    x_ptr,
    unit_ptr,
    w_ptr,
    first_ptr,
    second_ptr,
    sum_ptr,
    c_ptr,
    slot_ptr,
    guard_ptr,
    N,
    D,
    L,
    g_stride,
    lr,
    weight_decay,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    error,
    first_row: tl.int64,
    seed: tl.int32,
    param: tl.int32,
    word2: tl.int32,
    word3: tl.int32,
    first_word3: tl.int32,
    second_word3: tl.int32,
    c_word3: tl.int32,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ECO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    E5M2: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One update of a tile of w and its state; nothing is written where guard is not zero.

    slot_ptr: None if every row is compensated, or for each row its place in c, negative for none.
    """
    blocks_d = ceil_div(D, BLOCK_D)
    l0 = (tl.program_id(0) // blocks_d) * BLOCK_L
    d0 = (tl.program_id(0) % blocks_d) * BLOCK_D
    grad = gradient_tile(
        g_ptr, x_ptr, l0, d0, N, D, L, g_stride,
        BLOCK_L, BLOCK_D, BLOCK_K, EVEN_D, EVEN_K, COMPUTE, PRECISION,
    )  # fmt: skip
    grad = grad * tl.load(unit_ptr)

    outputs = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    base = l0.to(tl.int64) * D + d0
    offsets = outputs[:, None] * D + columns[None, :]
    row_mask = outputs < L - l0
    mask = row_mask[:, None] & (columns < D - d0)[None, :]
    if guard_ptr is not None:
        mask = mask & (tl.load(guard_ptr) == 0)
    rows = first_row.to(tl.int64) + l0 + outputs
    w = widen(tl.load(w_ptr + base + offsets, mask=mask, other=0))
    m = w
    v = w
    a = w
    if first_ptr is not None:
        m = widen(tl.load(first_ptr + base + offsets, mask=mask, other=0))
    if second_ptr is not None:
        v = widen(tl.load(second_ptr + base + offsets, mask=mask, other=0))
    if sum_ptr is not None:
        a = tl.load(sum_ptr + l0 + outputs, mask=row_mask, other=1.0)[:, None]
    u, m, v = direction(
        w, grad, m, v, a, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
        RULE, first_ptr is not None, NESTEROV,
    )  # fmt: skip
    words = element_words(row_keys(rows, seed, param, word2, word3), d0 + columns)
    TYPE: tl.constexpr = w_ptr.dtype.element_ty
    if c_ptr is None:
        new = rounded(w + u, words, TYPE, STOCHASTIC)
    else:
        c_words = element_words(row_keys(rows, seed, param, word2, c_word3), d0 + columns)
        if slot_ptr is None:
            s = u + loaded_compensation(tl.load(c_ptr + base + offsets, mask=mask, other=0), E5M2)
            new = rounded(w + s, words, TYPE, False)
            c = compensate(w, s, widen(new), LARGEST, HALF)
            tl.store(c_ptr + base + offsets, stored_compensation(c, c_words, E5M2), mask)
        else:
            slot = tl.load(slot_ptr + l0 + outputs, mask=row_mask, other=-1).to(tl.int64)
            kept = (slot >= 0)[:, None] & mask
            places = slot[:, None] * D + (d0 + columns)[None, :]
            s = u + loaded_compensation(tl.load(c_ptr + places, mask=kept, other=0), E5M2)
            exact = rounded(w + s, words, TYPE, False)
            c = compensate(w, s, widen(exact), LARGEST, HALF)
            tl.store(c_ptr + places, stored_compensation(c, c_words, E5M2), kept)
            new = tl.where(kept, exact, rounded(w + u, words, TYPE, STOCHASTIC))
    tl.store(w_ptr + base + offsets, new, mask)
    if first_ptr is not None:
        if ECO:
            m = with_error(m, v, error, (w + u) - widen(new), eps, RULE)
        words = element_words(row_keys(rows, seed, param, word2, first_word3), d0 + columns)
        tl.store(
            first_ptr + base + offsets, stored_state(m, words, first_ptr.dtype.element_ty), mask
        )
    if second_ptr is not None:
        words = element_words(row_keys(rows, seed, param, word2, second_word3), d0 + columns)
        tl.store(
            second_ptr + base + offsets, stored_state(v, words, second_ptr.dtype.element_ty), mask
        )
