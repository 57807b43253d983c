"""What an optimizer keeps for a weight, by size: reports tell it before there is any."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch


class StateSize(NamedTuple):
    """One tensor of a weight's state."""

    name: str
    """Its key in the optimizer's state."""
    dtype: torch.dtype
    """As stored; uint8 for 8-bit codes."""
    each: Fraction
    """Bytes an element; of 8-bit codes with their share of a scale."""
    rows: int | None = None
    """None: those of the weight."""
    columns: int | None = None
    """None: those of the weight."""

    @property
    def label(self) -> str:
        """Name and dtype."""
        stored = "8bit" if self.dtype == torch.uint8 else str(self.dtype).removeprefix("torch.")
        return f"{self.name} ({stored})"

    @property
    def is_rounded(self) -> bool:
        """Whether it is stored with stochastic rounding."""
        return self.dtype.is_floating_point and self.dtype.itemsize < 4
