"""E4M3 weights decoded to matrix operands."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from elmo_compile.kernels.aten.lanes import e4m3_bits, e4m3_bytes, pack_bf16


def quads_(out: Tensor, words: Tensor) -> None:
    """bf16 words [C, D/2] of E4M3 words [C, D/4], columns in `halves_order`. Exact."""
    bits = [e4m3_bits(byte) for byte in e4m3_bytes(words)]
    left, right = pack_bf16(bits[0], bits[1]), pack_bf16(bits[2], bits[3])
    out.copy_(torch.cat((left, right), 1))


def table_(out: Tensor, stored: Tensor) -> None:
    """out <- stored, by looking up the 256 values of E4M3: faster than an eager cast."""
    codes = stored.view(torch.uint8).to(torch.int32).view(-1)
    torch.index_select(_table(out.dtype), 0, codes, out=out.view(-1))


@functools.lru_cache(maxsize=8)
def _table(dtype: torch.dtype) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(dtype)
