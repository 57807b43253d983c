"""`elmo::scaled` and `elmo::scale_`: gradients that a loss's forward made, times the upstream one.

That factor is 1 unless the loss is scaled after the compiled function, and then nothing is to be
read or written: a weight gradient of gigabytes is otherwise read and written once more. `scale_`
works in place: put into backward graphs by `lowering.scale_in_place`, where the tensor is the
backward's own.

What is exactly 0 stays 0 whatever the factor: eager leaves a row out before it multiplies. So a
batch of ignored labels only, whose mean has an infinite upstream gradient, has gradients of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "elmo::scale_", mutates_args=("made",), schema="(Tensor(a!) made, Tensor factor) -> ()"
)
def scale_(made: Tensor, factor: Tensor) -> None:
    """Multiply `made` (any shape, contiguous) by a 0-d `factor` of the same device."""
    from elmo_compile import kernels

    kernels.select(made.device).scale_(made, factor)


@scale_.register_fake
def _(made: Tensor, factor: Tensor) -> None:
    return None


@torch.library.custom_op(
    "elmo::scaled", mutates_args=(), schema="(Tensor made, Tensor factor) -> Tensor"
)
def scaled(made: Tensor, factor: Tensor) -> Tensor:
    """As `scale_`, of a copy."""
    copy = made.clone(memory_format=torch.contiguous_format)
    scale_(copy, factor)
    return copy


@scaled.register_fake
def _(made: Tensor, factor: Tensor) -> Tensor:
    return torch.empty(made.shape, dtype=made.dtype, device=made.device)


def scaled_small(made: Tensor, factor: Tensor) -> Tensor:
    """As `scaled`, in operations that Inductor merges with others."""
    return torch.where(made == 0, made, made * factor)
