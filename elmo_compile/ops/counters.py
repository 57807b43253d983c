"""What rounding does to a weight, counted on a sample of its rows now and then.

Cheap enough to be always on: some rows are copied before an update and compared after it. Nothing
waits for a device; numbers are read when they are asked for. Replays of a CUDA graph are not
counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.formats import format_of, is_narrow

_EVERY, _ROWS = 64, 256


class Counters:
    """Shares of sampled elements (that are not NaN): unchanged by an update, saturated, zero."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._before: Tensor | None = None

    def before(self, w_LD: Tensor, updates: int) -> None:
        """Look at the weight that update number `updates` is about to change."""
        wanted = updates % _EVERY == 0 and is_narrow(w_LD.dtype) and w_LD.numel() > 0
        wanted = wanted and not capturing(w_LD.device)
        self._before = _sample(w_LD).clone() if wanted else None

    def after(self, w_LD: Tensor) -> None:
        """Look at the weight after that update."""
        before, self._before = self._before, None
        if before is None:
            return
        now, largest = _sample(w_LD).to(torch.float32), format_of(w_LD.dtype).max
        counts = (now == before.to(torch.float32), now.abs() >= largest, now == 0, now == now)
        found = torch.stack([count.sum() for count in counts]).to(torch.float64)
        self._sums = found if self._sums is None else self._sums.to(found.device) + found

    def shares(self, updates: int) -> dict[str, float]:
        """Everything counted so far; NaN before the first sample."""
        made = {"updates": float(updates)}
        sums = [float("nan")] * 4 if self._sums is None else self._sums.tolist()
        for name, total in zip(("unchanged", "saturated", "zero"), sums):
            made[name] = total / sums[3]
        return made


def _sample(w_LD: Tensor) -> Tensor:
    """Some rows, evenly spread: a view."""
    return w_LD.detach()[:: max(1, w_LD.shape[0] // _ROWS)]
