"""Softmax cross entropy with the logits of a block of rows held: three products instead of four.

The products are the vendor's (torch.mm: large, plain, 16-bit or float32); two kernels do the rest
in place, over one row's stretch of logits a program. Legend: R rows of a block, D features, L
outputs, P stretches a row.

Logits are rounded to the compute type, as torch's own are. Their gradient is scaled by the rows'
factors in float32 before its one rounding, so that no factor has to be known on the host.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.problem import Gradients, HeadProblem
from elmo_compile.kernels.triton.device_math import (
    ceil_div,
    exp,
    expm1_nonpositive,
    tile_max,
    tile_sum,
)
from elmo_compile.kernels.triton.storage import narrow, widen
from elmo_compile.numerics.losses import two_parts

_BLOCK, _WARPS = 2048, 4
MOST_ROUNDINGS = 16
"""Blocks, where dw is narrow: with more, its error would exceed that of one rounding much."""


@triton.jit
def _biased(z_ptr, b_ptr, columns, real):
    """float32 logits of a row, bias added; -inf past the end."""
    z = widen(tl.load(z_ptr + columns, mask=real, other=0))
    if b_ptr is not None:
        z += widen(tl.load(b_ptr + columns, mask=real, other=0))
    return tl.where(real, z, float("-inf"))


@triton.jit
def _row_sums_kernel(z_ptr, b_ptr, maximum_ptr, total_ptr, L, z_stride, R, P, BLOCK: tl.constexpr):
    """maximum[p, r] and total[p, r] = sum exp(z - maximum) over blocks p, p + P, ... of row r."""
    r = tl.program_id(0) % R
    p = tl.program_id(0) // R
    row = z_ptr + r.to(tl.int64) * z_stride
    highest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.full((1,), 0.0, tl.float64)
    for block in tl.range(p, ceil_div(L, BLOCK), P):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        z = _biased(row, b_ptr, columns, columns < L)
        raised = tl.maximum(highest, tile_max(z, 0))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        total *= exp(highest - shift).to(tl.float64)
        total += tile_sum(exp(z - shift), 0).to(tl.float64)
        highest = raised
    at = p * R + r + tl.arange(0, 1)
    tl.store(maximum_ptr + at, highest)
    tl.store(total_ptr + at, total)


@triton.jit
def _row_gradient_kernel(
    z_ptr,
    b_ptr,
    lse_ptr,
    target_ptr,
    scale_ptr,
    L,
    z_stride,
    R,
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """z[r, l] <- scale[r] (softmax(z)[r, l] - [l is the class]), rounded once; 0 if ignored."""
    r = tl.program_id(0) % R
    l0 = (tl.program_id(0) // R) * BLOCK
    row = z_ptr + r.to(tl.int64) * z_stride
    columns = l0 + tl.arange(0, BLOCK)
    real = columns < L
    t = _biased(row, b_ptr, columns, real) - tl.load(lse_ptr + r) - tl.load(lse_ptr + R + r)
    target = tl.load(target_ptr + r)
    hit = columns == target
    g = tl.where(hit, expm1_nonpositive(tl.where(hit, t, 0.0)), exp(t))
    g *= tl.load(scale_ptr + r)
    g = tl.where(target == ignore_index, 0.0, g)
    tl.store(row + columns, narrow(g, COMPUTE), mask=real)


def fits_row_blocks(p: HeadProblem, rows: int, need_dw: bool) -> bool:
    """Whether the products are plain ones and dw would be rounded seldom enough."""
    plain = p.w_LD.dtype == p.compute_dtype and p.compute_dtype in (torch.bfloat16, torch.float32)
    narrow_dw = need_dw and p.w_LD.dtype == torch.bfloat16 and not p.wide_dw
    seldom = not narrow_dw or -(-p.x_ND.shape[0] // rows) <= MOST_ROUNDINGS
    return plain and seldom and p.loss.targets == "classes"


def row_blocks(
    p: HeadProblem,
    scale_N: Tensor,
    rows: int,
    *,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> Gradients:
    """Row losses and gradients, `rows` rows at a time. Nothing waits for the device."""
    (N, D), L, x = p.x_ND.shape, p.w_LD.shape[0], p.x_ND
    x_ND = x.to(p.compute_dtype).contiguous()
    bias_L = None if p.b_L is None else p.b_L.contiguous()
    losses_N = x.new_zeros(N, dtype=torch.float32)
    dx_ND = x.new_zeros((N, D), dtype=torch.float32) if need_dx else None
    wide = torch.float32 if p.wide_dw else p.w_LD.dtype
    dw_LD = torch.zeros(p.w_LD.shape, dtype=wide, device=x.device) if need_dw else None
    db_L = x.new_zeros(L, dtype=torch.float32) if need_db else None
    held = torch.empty((min(rows, max(1, N)), L), dtype=p.compute_dtype, device=x.device)
    for start in range(0, N, rows):
        block = _Block(p, x_ND[start : start + rows], bias_L, start, held)
        stop = start + block.rows
        losses_N[start:stop] = block.losses()
        g_RL = block.gradient_(scale_N[start:stop])
        if dx_ND is not None:
            dx_ND[start:stop] = _product(g_RL, p.w_LD)
        if db_L is not None:
            db_L += g_RL.sum(0, dtype=torch.float32)
        if dw_LD is not None:
            _add_product(dw_LD, g_RL.t(), block.x_RD, p.chunk)
    return Gradients(dx_ND, dw_LD, db_L, losses_N)


@dataclasses.dataclass(eq=False)
class _Block:
    """The logits of a block of rows, then their gradient."""

    p: HeadProblem
    x_RD: Tensor
    bias_L: Tensor | None
    start: int
    held: Tensor

    def __post_init__(self) -> None:
        assert isinstance(self.p.target, Tensor)
        self.rows = self.x_RD.shape[0]
        self.z_RL = torch.mm(self.x_RD, self.p.w_LD.t(), out=self.held[: self.rows])
        self.target_R = self.p.target[self.start : self.start + self.rows].contiguous()
        self.lse_2R = self._log_sum_exp()

    def _log_sum_exp(self) -> Tensor:
        R, L = self.z_RL.shape
        parts = max(1, min(-(-L // _BLOCK), -(-2048 // R)))
        maximum_PR = self.z_RL.new_empty((parts, R), dtype=torch.float32)
        total_PR = self.z_RL.new_empty((parts, R), dtype=torch.float64)
        _row_sums_kernel[(R * parts,)](
            self.z_RL, self.bias_L, maximum_PR, total_PR, L, self.z_RL.stride(0), R, parts,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        return two_parts(torch.logsumexp(maximum_PR + total_PR.log(), 0), torch.float32)

    def losses(self) -> Tensor:
        """float32 [R]: 0 where ignored, NaN where the class is out of range."""
        L, ignored_R = self.z_RL.shape[1], self.target_R == self.p.loss.ignore_index
        inside_R = (self.target_R >= 0) & (self.target_R < L)
        at_R = torch.where(inside_R, self.target_R, 0)
        z_R = self.z_RL.gather(1, at_R[:, None]).squeeze(1).double()
        if self.bias_L is not None:
            z_R += self.bias_L[at_R]
        losses_R = torch.where(inside_R, self.lse_2R.double().sum(0) - z_R, torch.nan)
        return losses_R.masked_fill(ignored_R, 0.0).float()

    def gradient_(self, scale_R: Tensor) -> Tensor:
        """The scaled gradient, in place of the logits."""
        R, L = self.z_RL.shape
        compute = tl.float32 if self.z_RL.dtype == torch.float32 else tl.bfloat16
        _row_gradient_kernel[(R * -(-L // _BLOCK),)](
            self.z_RL, self.bias_L, self.lse_2R, self.target_R, scale_R.float().contiguous(),
            L, self.z_RL.stride(0), R, ignore_index=self.p.loss.ignore_index,
            BLOCK=_BLOCK, COMPUTE=compute, num_warps=_WARPS,
        )  # fmt: skip
        return self.z_RL


def _product(a: Tensor, b: Tensor) -> Tensor:
    """float32 `a b`: CUDA's own output type; on a CPU (interpreter) from float32 operands."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _add_product(out_LD: Tensor, g_LR: Tensor, x_RD: Tensor, chunk: int) -> None:
    """out += g x: one rounding of the sum; a wide `out` chunk by chunk, through a float32 part."""
    if out_LD.dtype == x_RD.dtype:
        out_LD.addmm_(g_LR, x_RD)
        return
    for first in range(0, out_LD.shape[0], chunk):
        out_LD[first : first + chunk] += _product(g_LR[first : first + chunk], x_RD)
