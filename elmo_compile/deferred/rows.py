"""Deferred logits with their dimensions in another order, and rows of them part by part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.deferred.nodes import derive
from elmo_compile.deferred.origin import FAKES
from elmo_compile.deferred.state import Root, State
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.tensor import Deferred

FEWEST_ROWS = 16
"""Of a part that is worth a pass of its own over the weight."""


def order_of(func: Any, ndim: int, rest: Any, named: Any) -> tuple[int, ...] | None:
    """The order in which an operation puts `ndim` dimensions; None if it raises."""
    sizes = tuple(range(2, 2 + ndim))
    try:
        with FAKES, torch.no_grad():
            made: Tensor = func(torch.empty(sizes), *rest, **named)
    except Exception:  # The operation itself raises it better.
        return None
    return tuple(sizes.index(size) for size in made.shape)


def parts_of(func: Any, logits: Deferred, rest: Any, named: Any) -> Any:
    """Rows by parts, each deferred.

    Not where the weight gets a gradient: that of every part would be as large as the weight.
    """
    state = logits._state
    root, _ = state.recipe()
    outputs = state.outputs
    dim = named.get("dim", (*rest, *([0] * 2))[0 if func.__name__ == "unbind" else 1])
    by_rows = isinstance(dim, int) and logits.ndim > 1 and dim % logits.ndim != logits.ndim - 1
    if not (by_rows and state.fake.shape[-1] == outputs) or _trained(logits, root):
        return NotImplemented
    try:
        with FAKES, torch.no_grad():
            made = tuple(func(state.fake, *rest, **named))
    except Exception:  # The operation itself raises it better.
        return NotImplemented
    if not made or min(part.numel() for part in made) < FEWEST_ROWS * outputs:
        return NotImplemented
    steps, start = [], 0
    for number, part in enumerate(made):
        if part.ndim < logits.ndim:
            steps.append(Step(Tensor.select, (dim, number), {}))
        else:
            steps.append(Step(Tensor.narrow, (dim, start, part.shape[dim]), {}))
            start += part.shape[dim]
    parts = tuple(derive(logits, step) for step in steps)
    return iter(parts) if func is Tensor.__iter__ else parts


def _trained(logits: Deferred, root: State) -> bool:
    """Whether a loss of these logits would give a weight its gradient."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return False
    inputs = root.inputs if isinstance(root, Root) else ()
    outputs = logits._state.outputs
    return any(
        isinstance(v, Tensor) and v.requires_grad and v.ndim > 1 and outputs in v.shape
        for v in inputs
    )
