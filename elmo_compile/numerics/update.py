"""The weight update of an optimizer, as data and as one arithmetic function per rule.

All arithmetic is float32 (float64 for float64 weights) on the loaded values, with one rounding at
the store (ALGORITHMS: "updates on low-precision weights").
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

Rounding = Literal["stochastic", "nearest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One update of one weight: hyper-parameters as they are now, state, rounding counters."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    buffer: Tensor | None = None
    """Momentum, shaped like the weight, float32 or bfloat16; None without momentum."""
    rounding: Rounding = "stochastic"
    """How a weight stored in bf16 or fp8 is rounded; a float32 weight is never rounded."""
    seed: int = 0
    param_id: int = 0
    """Stable 32-bit stream of this parameter, saved in the optimizer's state."""
    step: int = 0
    """How many updates this parameter has had before this one (the first update has step 0)."""
    row_offset: int = 0
    """First row of this tensor in the unsharded stored tensor."""


def sgd(
    w: Tensor,
    grad: Tensor,
    m: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """New (weight, momentum) before rounding, in the arithmetic dtype of `w` (torch.optim.SGD).

    `grad <- grad + wd w; m <- momentum m + grad; w <- w - lr (grad + momentum m | m | grad)`.
    The momentum buffer starts at zero, which makes its first value `grad`, as in torch.
    """
    step = grad + weight_decay * w if weight_decay else grad
    if m is not None:
        m = momentum * m + step
        step = step + momentum * m if nesterov else m
    return w - lr * step, m
