"""The counter-example: fp8 rounding as published kernels do it, and an SGD that uses it.

They add 20 random bits to a float32 weight, clear the low 20, and cast to E4M3 to nearest. Below
2^-6 E4M3's grid is the multiples of 2^-9, coarser than what 20 cleared bits leave, so there the
cast decides, and always the same way: an update of less than half a step vanishes, every time.
`elmo_compile` rounds on the grid of the subnormals instead and is unbiased there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

E4M3_MAX = 448.0
RANDOM_BITS = 20
"""Mantissa bits that float32 has and a normal E4M3 number does not."""


def paper_round_e4m3(v: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> float8_e4m3fn: random bits, truncation, then a cast that rounds to nearest."""
    bits = v.clamp(-E4M3_MAX, E4M3_MAX).view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << RANDOM_BITS, generator=generator)
    truncated = (bits + noise) & -(1 << RANDOM_BITS)
    return truncated.view(torch.float32).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class PaperSGD(torch.optim.Optimizer):
    """`w <- w - lr grad`, float8_e4m3fn parameters rounded by `paper_round_e4m3`."""

    def __init__(self, params: Iterable[Tensor], lr: float, *, seed: int) -> None:
        super().__init__(params, {"lr": lr})
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update every parameter that has a gradient; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                updated = parameter.float() - group["lr"] * parameter.grad
                if parameter.dtype == torch.float8_e4m3fn:
                    updated = paper_round_e4m3(updated, self.generator)
                parameter.copy_(updated)
