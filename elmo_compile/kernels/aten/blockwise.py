"""Optimizer state as it is stored: plain tensors, or torchao's block-wise 8 bits, widened by chunk.

The format is torchao's (`OptimState8bit`: a code for each element, a float32 scale a block, one
table of 256 values): made, saved and loaded by it. Here chunks of rows are decoded and encoded, to
nearest, with a block's largest magnitude as its scale.
Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (ICLR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_blockwise(state: Any) -> bool:
    """Whether a state is stored as codes, scales and a table of values."""
    return hasattr(state, "qmap") and hasattr(state, "codes")


def load(state: Any, start: int, stop: int) -> Tensor:
    """Rows [start, stop): the stored ones, or their float32 values."""
    if not is_blockwise(state):
        rows: Tensor = state[start:stop]
        return rows
    first, last = _elements(state, start, stop)
    size = state.block_size
    codes = state.codes.view(-1)[first:last].int()
    scale = state.scale[first // size : last // size]
    values: Tensor = state.qmap[codes].view(-1, size) * scale[:, None]
    return values.view(stop - start, -1)


def store(state: Any, start: int, stop: int, values: Tensor) -> None:
    """Write back what `load` gave, if that was a copy."""
    if not is_blockwise(state):
        return
    first, last = _elements(state, start, stop)
    size = state.block_size
    blocks = values.reshape(-1, size)
    scale = blocks.abs().amax(1)
    unit = blocks / scale.clamp_min(1e-12)[:, None]
    state.codes.view(-1)[first:last] = _nearest(unit, state.qmap).view(-1)
    state.scale[first // size : last // size] = scale


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 index of the entry of an ascending table nearest to each value."""
    middle = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values, middle).to(torch.uint8)


def _elements(state: Any, start: int, stop: int) -> tuple[int, int]:
    columns = state.codes.shape[-1] if state.codes.dim() > 1 else 1
    return start * columns, stop * columns
