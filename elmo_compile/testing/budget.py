"""Error budgets: an implementation may err about as much as torch at the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
"""How many times the error of the same formula in torch is allowed."""


def assert_within_budget(
    actual: Tensor, exact_f64: Tensor, same_precision: Tensor, *, what: str, ulps: float = 1.0
) -> None:
    """Check that `actual` is about as near to the truth as torch is at the same precision.

    `max |actual - exact| <= 2 max |same - exact| + ulps ulp`, likewise for root mean squares, with
    the ulp of `same_precision`'s dtype at the largest (the mean square) exact value. Element by
    element would be too strict: torch may be exact by luck.

    Args:
        actual: result under test, any floating dtype.
        exact_f64: the same quantity computed in float64.
        same_precision: the same formula in plain torch, at the precision meant.
        what: names the quantity in the message.
        ulps: how many ulps are allowed on top.

    Raises:
        AssertionError: shapes differ, a value is not finite where the exact one is, or the error is
            over the budget; the message gives error, budget and where the worst element is.
    """
    for name, other in (("the exact result", exact_f64), ("torch's result", same_precision)):
        if actual.shape != other.shape:
            raise AssertionError(
                f"{what}: shape {tuple(actual.shape)}, but {name} has {tuple(other.shape)}"
            )
    if actual.numel() == 0:
        return
    exact = exact_f64.double()
    error, allowed = (actual.double() - exact).abs(), (same_precision.double() - exact).abs()
    if not bool(error.isfinite().all()):
        raise AssertionError(f"{what}: {int((~error.isfinite()).sum())} values are not finite")
    eps = torch.finfo(same_precision.dtype).eps
    for name, norm in (("largest", _largest), ("root mean square", _root_mean_square)):
        budget = FACTOR * norm(allowed) + ulps * eps * norm(exact)
        if norm(error) > budget:
            worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{what}: {name} error {norm(error):.3e} is over the budget {budget:.3e} (torch's "
                f"own error is {norm(allowed):.3e}); worst at {worst}: got "
                f"{float(actual[worst])}, exact {float(exact[worst])}"
            )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
