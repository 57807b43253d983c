"""A tensor times a factor that lies on the device, in place; nothing is read where that is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.configs import chip_of
from elmo_compile.kernels.triton.storage import narrow, widen

_BLOCK, _WARPS = 4096, 4
_PROGRAMS = 8
"""A multiprocessor: enough to fill the memory's queues, few enough to cost nothing."""


@triton.jit
def _scale_kernel(made_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """made[i] = made[i] * factor, to nearest, unless factor is 1 or made[i] is 0."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < count
            value = widen(tl.load(made_ptr + offsets, mask=mask, other=0.0))
            value = tl.where(value == 0.0, value, value * factor)
            tl.store(made_ptr + offsets, narrow(value, made_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
def scale_(made: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous float32, bf16 or float16 tensor by a 0-d one (float64: by ATen)."""
    if made.dtype == torch.float64:
        made.copy_(torch.where(made == 0, made, made * factor))
        return
    assert made.is_contiguous()
    count = made.numel()
    _, processors = chip_of(made.device)
    grid = (max(1, min(triton.cdiv(count, _BLOCK), _PROGRAMS * processors)),)
    with torch.cuda.device_of(made):
        _scale_kernel[grid](made, factor, count, BLOCK=_BLOCK, num_warps=_WARPS)
