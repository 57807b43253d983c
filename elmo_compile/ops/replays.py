"""Updates of a weight that CUDA graphs hold: what their replays do, the host does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.numerics.capture import capturing


class Replays:
    """How often graphs have updated one weight, counted on its device."""

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._captured = False

    def prepare(self, device: torch.device) -> None:
        """Before any capture: make what a graph will count in."""
        if self._count is None and device.type == "cuda" and not capturing(device):
            self._count = torch.zeros((), dtype=torch.int64, device=device)

    def captured(self) -> None:
        """An update is being captured: each replay counts."""
        if self._count is not None:
            self._captured = True
            self._count.add_(1)

    def made(self) -> int:
        """Updates by replays so far; the host waits, if there are graphs at all. 0 in a capture."""
        if self._count is None or not self._captured or capturing(self._count.device):
            return 0
        return int(self._count)
