"""Forward: the loss of each row and, for cross entropy, its log-sum-exp, in one launch.

Legend: N rows, D features, L outputs, P programs a block of rows. A program takes every P-th tile
of outputs for its rows and folds them: float32 within a tile, float64 across tiles. The [P, N]
partial results are combined by torch; nothing here depends on the chunk size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.configs import batch_block
from elmo_compile.kernels.triton.device_math import ceil_div, exp, tile_max, tile_sum
from elmo_compile.kernels.triton.launch import Call, prepare_targets
from elmo_compile.kernels.triton.product import logits_tile, whole_steps
from elmo_compile.kernels.triton.targets import bce_tile, class_hits, dense_tile
from elmo_compile.numerics.losses import two_parts


@triton.jit
def _bce_rows_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    b_ptr,
    target_ptr,
    target_n,
    target_l,
    rows_ptr,
    cols_ptr,
    values_ptr,
    bounds_ptr,
    partial_ptr,
    N,
    D,
    L,
    P,
    first_output: tl.int64,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """partial[p, n] = the BCE of row n over the tiles p, p + P, ..."""
    blocks = ceil_div(N, BLOCK_N)
    n0 = (tl.program_id(0) % blocks) * BLOCK_N
    p = tl.program_id(0) // blocks
    total = tl.full((BLOCK_N,), 0.0, tl.float64)
    for tile in tl.range(p, ceil_div(L, BLOCK_L), P, num_stages=1):
        l0 = tile * BLOCK_L
        z = logits_tile(
            x_ptr, x_scale_ptr, w_ptr, b_ptr, n0, l0, N, D, L,
            BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION,
        )  # fmt: skip
        _, value = bce_tile(
            z, target_ptr, target_n, target_l, rows_ptr, cols_ptr, values_ptr, bounds_ptr,
            tile, n0, l0, first_output, N, L, BLOCK_L, BLOCK_N, TARGETS,
        )  # fmt: skip
        total += value.to(tl.float64)
    rows = tl.arange(0, BLOCK_N)
    base = partial_ptr + p.to(tl.int64) * N + n0
    tl.store(base + rows, total, mask=rows < N - n0)


@triton.jit
def _ce_rows_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    b_ptr,
    target_ptr,
    target_n,
    target_l,
    maximum_ptr,
    total_ptr,
    at_target_ptr,
    N,
    D,
    L,
    P,
    ignore_index: tl.int64,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """maximum[p, n] and total[p, n] = sum exp(z - maximum) over the tiles p, p + P, ...

    `classes`: at_target[n], the logit of the row's class, is written by the one program whose tiles
    hold it. `dense`: at_target[p, n] is the sum of y z over the program's tiles.
    """
    blocks = ceil_div(N, BLOCK_N)
    n0 = (tl.program_id(0) % blocks) * BLOCK_N
    p = tl.program_id(0) // blocks
    rows = tl.arange(0, BLOCK_N)
    highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_N,), 0.0, tl.float64)
    weighted = tl.full((BLOCK_N,), 0.0, tl.float64)
    for tile in tl.range(p, ceil_div(L, BLOCK_L), P, num_stages=1):
        l0 = tile * BLOCK_L
        z = logits_tile(
            x_ptr, x_scale_ptr, w_ptr, b_ptr, n0, l0, N, D, L,
            BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION,
        )  # fmt: skip
        real = (tl.arange(0, BLOCK_L) < L - l0)[None, :]
        if TARGETS == "dense":
            y = dense_tile(target_ptr, target_n, target_l, n0, l0, N, L, BLOCK_L, BLOCK_N)
            weighted += tile_sum(tl.where(real, y * z, 0.0), 1).to(tl.float64)
        else:
            hit, here, _ = class_hits(target_ptr, n0, l0, 0, N, ignore_index, BLOCK_L, BLOCK_N)
            at_class = tile_sum(tl.where(hit, z, 0.0), 1)
            tl.store(at_target_ptr + n0 + rows, at_class, mask=here)
        z = tl.where(real, z, float("-inf"))
        raised = tl.maximum(highest, tile_max(z, 1))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        total *= exp(highest - shift).to(tl.float64)
        total += tile_sum(exp(z - shift[:, None]), 1).to(tl.float64)
        highest = raised
    real = rows < N - n0
    base = p.to(tl.int64) * N + n0
    tl.store(maximum_ptr + base + rows, highest, mask=real)
    tl.store(total_ptr + base + rows, total, mask=real)
    if TARGETS == "dense":
        tl.store(at_target_ptr + base + rows, weighted, mask=real)


def _geometry(c: Call) -> tuple[int, int, int, dict]:
    """(programs a block of rows, grid, tile of outputs, launch arguments)."""
    N, D, L = c.shape
    tile = c.logits_tile(value=True)
    block_n = batch_block(tile.rows, N)
    blocks = -(-N // block_n)
    programs = max(1, min(-(-L // tile.columns), -(-4 * c.processors // max(1, blocks))))
    arguments = {
        "N": N,
        "D": D,
        "L": L,
        "P": programs,
        "BLOCK_L": tile.columns,
        "BLOCK_N": block_n,
        "BLOCK_K": tile.inner,
        "EVEN_K": whole_steps(D, tile.inner),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **c.constants,
    }
    return programs, programs * blocks, tile.columns, arguments


def bce_rows(c: Call) -> Tensor:
    """float32 [N]: BCE of each row, summed over outputs."""
    N, _, L = c.shape
    programs, grid, block, arguments = _geometry(c)
    partial_PN = c.x_ND.new_zeros((programs, N), dtype=torch.float64)
    arguments |= prepare_targets(c, L, block).arguments(0, 0)
    _bce_rows_kernel[(grid,)](
        c.logits_x_ND, c.x_scale_N, c.w_LD, c.b_L, partial_ptr=partial_PN, **arguments
    )
    return partial_PN.sum(0).float()


def ce_rows(c: Call) -> tuple[Tensor, Tensor]:
    """float32 [N] losses (0 where ignored) and float32 [2, N] log-sum-exps in two parts.

    A class outside [0, L) that is not the ignored one gives NaN.
    """
    N, _, L = c.shape
    programs, grid, block, arguments = _geometry(c)
    targets = prepare_targets(c, L, block)
    dense = targets.kind == "dense"
    maximum_PN = c.x_ND.new_empty((programs, N), dtype=torch.float32)
    total_PN = c.x_ND.new_empty((programs, N), dtype=torch.float64)
    at_target = c.x_ND.new_full((programs, N) if dense else (N,), float("nan"), dtype=torch.float64)
    given = targets.arguments(0, 0)
    _ce_rows_kernel[(grid,)](
        c.logits_x_ND, c.x_scale_N, c.w_LD, c.b_L,
        given["target_ptr"], given["target_n"], given["target_l"],
        maximum_PN, total_PN, at_target,
        ignore_index=c.problem.loss.ignore_index, TARGETS=targets.kind, **arguments,
    )  # fmt: skip
    lse_N = torch.logsumexp(maximum_PN + total_PN.log(), 0)
    if dense:
        rows_N = targets.mass() * lse_N - at_target.sum(0)
    else:
        rows_N = lse_N - at_target
        rows_N = rows_N.masked_fill_(targets.target == c.problem.loss.ignore_index, 0.0)
    return rows_N.float(), two_parts(lse_N, torch.float32)
