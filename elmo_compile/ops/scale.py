"""`elmo::scale_`: gradients that a loss's forward made, times the upstream gradient, in place.

That factor is 1 unless the loss is scaled after the compiled function, and then nothing is to be
read or written: a weight gradient of gigabytes is otherwise read and written once more. Put into
backward graphs by `lowering.scale_in_place`, where the tensor is the backward's own.
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
