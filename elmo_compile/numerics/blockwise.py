"""8-bit state: a code for each element, a float32 scale a block, one table of 256 values.

The format of torchao and bitsandbytes. Chunks of rows are decoded to float32 and encoded to
nearest, with a block's largest magnitude as its scale; blocks do not cross rows.
Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (ICLR 2022).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_TINY = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Blockwise:
    """A tensor shaped like a weight [L, D] in 8 bits."""

    codes: Tensor
    """uint8, shaped like the weight."""
    scale: Tensor
    """float32 [blocks], blocks counted along the rows, one row after the other."""
    table: Tensor
    """float32 [256], ascending: the value of each code, for a scale of 1."""

    dtype = torch.float32
    """What it is decoded to."""

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.codes.numel() // self.scale.numel()

    def load(self, start: int, stop: int) -> Tensor:
        """float32 values of rows [start, stop), as [rows, D]."""
        codes, scale = self._rows(start, stop)
        values = self.table[codes.int()].view(-1, self.block_size) * scale[:, None]
        return values.view(stop - start, -1)

    def store(self, start: int, stop: int, values: Tensor, keep: Tensor | None = None) -> None:
        """Encode rows [start, stop); nothing changes where `keep` (a bool scalar) is true."""
        codes, scale = self._rows(start, stop)
        blocks = values.reshape(-1, self.block_size)
        new_scale = blocks.abs().amax(1)
        middle = (self.table[1:] + self.table[:-1]) / 2
        unit = blocks / new_scale.clamp_min(_TINY)[:, None]
        new_codes = torch.bucketize(unit, middle).to(torch.uint8).view(codes.shape)
        if keep is not None:
            new_codes = torch.where(keep, codes, new_codes)
            new_scale = torch.where(keep, scale, new_scale)
        codes.copy_(new_codes)
        scale.copy_(new_scale)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes (flat) and scales of some rows: views."""
        columns = self.codes.shape[-1]
        first, last = start * columns, stop * columns
        size = self.block_size
        return self.codes.view(-1)[first:last], self.scale[first // size : last // size]
