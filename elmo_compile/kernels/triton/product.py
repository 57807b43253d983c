"""The matrix product: the one loop that every kernel of this family uses.

Legend: N rows, D features, L outputs of the chunk; BLOCK_* a tile's sides, BLOCK_K its inner step.
Row and column numbers within a tile are 32-bit; a tile's first row enters the 64-bit base pointer.
"""

import triton
import triton.language as tl

from elmo_compile.kernels.triton.storage import INTERPRETED, operand, widen


def whole_steps(size: int, step: int) -> bool:
    """Whether the loop over `size` takes whole steps, and any: its loads need no mask."""
    return size > 0 and size % step == 0


@triton.jit
def _load(ptr, offsets, side_real, inner_real, SIDE_AXIS: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of an operand, masked only where it has to be; SIDE_AXIS is the one to expand at."""
    if side_real is None and EVEN_K:
        return tl.load(ptr + offsets)
    elif side_real is None:
        return tl.load(ptr + offsets, mask=tl.expand_dims(inner_real, 1 - SIDE_AXIS), other=0.0)
    elif EVEN_K:
        return tl.load(ptr + offsets, mask=tl.expand_dims(side_real, SIDE_AXIS), other=0.0)
    else:
        real = tl.expand_dims(side_real, SIDE_AXIS) & tl.expand_dims(inner_real, 1 - SIDE_AXIS)
        return tl.load(ptr + offsets, mask=real, other=0.0)


@triton.jit
def product(
    a_ptr,
    a_row,
    a_inner,
    b_ptr,
    b_inner,
    b_column,
    rows_M,
    rows_real,
    columns_N,
    columns_real,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    RUNS: tl.constexpr = False,
):
    """float32 [M, N]: `sum_k A[rows[m], k] B[k, columns[n]]` over k in [0, K).

    `*_row`, `*_inner`, `*_column` are strides. Rows are readable as they are (clamped by the
    caller) where `rows_real` is None, else only where it is true, and so for columns: clamping a
    direction of stride 1 would hide from the compiler that loads along it can be wide.
    EVEN_K: BLOCK_K divides K, which is not 0 (`whole_steps`). Hopper adds products of fp8 in fewer
    than float32's bits: what it added is brought into float32 after each inner step.
    RUNS: the compiler is to see that the loop runs: around one that may not, ptxas serializes
    Hopper's products (of some kernels; a column of results/cubins.json tells). Where it is not
    needed it costs registers.
    """
    inner = tl.arange(0, BLOCK_K)
    a_offsets = rows_M[:, None] * a_row + inner[None, :] * a_inner
    b_offsets = inner[:, None] * b_inner + columns_N[None, :] * b_column
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    end = K
    if RUNS:
        end = tl.maximum(K, 1)  # with K = 0 every element is masked
    for k in range(0, end, BLOCK_K):
        a = _load(a_ptr, a_offsets, rows_real, inner < K - k, 1, EVEN_K)
        b = _load(b_ptr, b_offsets, columns_real, inner < K - k, 0, EVEN_K)
        acc = tl.dot(
            operand(a, COMPUTE), operand(b, COMPUTE), acc=acc, input_precision=PRECISION,
            max_num_imprecise_acc=BLOCK_K if tl.float8e4nv == COMPUTE else None,
        )  # fmt: skip
        a_ptr += BLOCK_K * a_inner
        b_ptr += BLOCK_K * b_inner
    return acc


@triton.jit
def logits_tile(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    b_ptr,
    n0,
    l0,
    N,
    D,
    L,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_L]: the logits `x w^T + b` of rows n0.. and outputs l0...

    x [N, D] and w [L, D] are contiguous; x_scale_ptr [N]: of x in codes of E4M3, None for x as it
    is. Rows past N and outputs past L repeat the last one. Rows are the tile's rows, so that a
    row's sums and statistics stay within a warp.
    """
    outputs = tl.minimum(tl.arange(0, BLOCK_L), L - 1 - l0)
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
    if x_scale_ptr is not None and not INTERPRETED:
        # As pointers to E4M3, not bytes cast after the load: the product then reads both operands
        # from shared memory as they came in.
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        w_ptr = w_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    z = product(
        x_ptr + n0.to(tl.int64) * D,
        D,
        1,
        w_ptr + l0.to(tl.int64) * D,
        1,
        D,
        rows,
        None,
        outputs,
        None,
        D,
        BLOCK_N,
        BLOCK_L,
        BLOCK_K,
        EVEN_K,
        COMPUTE if x_scale_ptr is None else tl.float8e4nv,
        PRECISION,
        RUNS=tl.float16 == COMPUTE,
    )
    if x_scale_ptr is not None:
        z *= tl.load(x_scale_ptr + n0 + rows)[:, None]
    if b_ptr is not None:
        z += widen(tl.load(b_ptr + l0 + outputs))[None, :]
    return z


@triton.jit
def gradient_tile(
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
        RUNS=True,
    )
