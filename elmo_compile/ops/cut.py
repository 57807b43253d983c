"""`elmo::cut`: a value no gradient passes, as an operation that a retrace cannot lose.

`Tensor.detach` leaves no trace in a graph that is traced again with its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("elmo::cut", mutates_args=(), schema="(Tensor x) -> Tensor")
def cut(x: Tensor) -> Tensor:
    return x.clone()


@cut.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


cut.register_autograd(lambda ctx, grad: None, setup_context=_setup)
