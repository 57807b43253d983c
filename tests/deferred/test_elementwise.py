"""Every operation that the tables say stays deferred: values and gradients, with no logits made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import L, N, outcome
from test_documented import name, title
from torch import Tensor

from elmo_compile.deferred import tables

ROW, VECTOR = torch.linspace(0.5, 1.5, N)[:, None], torch.linspace(0.1, 0.9, L)
BINARY = ("mul", "div", "add", "sub", "pow", "gt", "ge", "lt", "le", "eq", "ne")
ARGUMENTS: dict[str, list[Any]] = {
    **{binary: [(2.5,), (ROW,), (VECTOR,)] for binary in BINARY},
    "maximum": [(ROW,)],
    "minimum": [(VECTOR - 0.5,)],
    "clamp": [(-0.1, 0.1)],
    "clip": [(-0.1, 0.1)],
    "clamp_min": [(0.05,)],
    "clamp_max": [(0.05,)],
    "masked_fill": [(VECTOR < 0.2, -3.0)],
    "where": [(VECTOR < 0.2, torch.zeros(()))],
    "scatter": [(1, torch.tensor([[n, L - 1 - n] for n in range(N)]), -4.0)],
    "index_fill": [(1, torch.tensor([3, L - 1]), -4.0)],
    "softmax": [(-1,)],
    "log_softmax": [(-1,)],
}
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("log", "log1p", "sqrt", "rsqrt", "pow"), torch.sigmoid),
    **{whether: lambda z: z > 0 for whether in ("logical_not", "bitwise_not")},
}
METHODS = [one for one in tables.OTHER_VALUES if one is not getattr(torch, one.__name__, None)]


@pytest.mark.parametrize("function", sorted(METHODS, key=title), ids=title)
def test_as_in_torch(function: Any) -> None:
    key = name(function)
    for arguments in ARGUMENTS.get(key, [()]):

        def use(z: Tensor, y: Tensor, arguments: Any = arguments) -> Tensor:
            made = function(BEFORE.get(key, lambda z: z)(z), *arguments)
            if not made.is_floating_point():
                return made.sum(-1)  # type: ignore[no-any-return]
            loss = F.smooth_l1_loss(made, torch.zeros(()).expand(made.shape))
            loss.backward()
            return loss

        theirs, their_grads, _ = outcome(use, compiled=False)
        mine, my_grads, z = outcome(use, compiled=True)
        assert z._state.values is None  # type: ignore[attr-defined]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for my_grad, their_grad in zip(my_grads, their_grads):
            if my_grad is None or their_grad is None:
                assert my_grad is None
                assert their_grad is None
            else:
                torch.testing.assert_close(my_grad, their_grad, rtol=1e-3, atol=1e-6)
