"""Updates from gradients that exist, on the kernels of each tensor's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elmo_compile.numerics.update import Update

Item = tuple[Tensor, Tensor, Update, Tensor | None]


def update_matrices(items: Sequence[Item], guard: Tensor | None = None) -> None:
    """Update contiguous matrices [R, D] in place from their gradients.

    On CUDA all matrices that one kernel can take go in one launch for each kind of update; on a
    CPU each is one compiled loop.

    Args:
        items: (weight, gradient, update, None or a scalar that multiplies the gradient); the
            update's state is shaped like the weight.
        guard: None, or one int32 on the device (CUDA): not zero leaves everything as it is.

    Raises:
        FusedUpdateError: a CUDA graph is being captured, and a matrix is for no kernel. Nothing
            was modified.
    """
    by_device: dict[torch.device, list[Item]] = {}
    for item in items:
        if item[0].numel():
            by_device.setdefault(item[0].device, []).append(item)
    for device, group in by_device.items():
        if device.type == "cuda":
            from elmo_compile.kernels.triton.parameters import update_parameters

            group = update_parameters(group, None if guard is None else guard.to(device))
        from elmo_compile.kernels.aten.chunk_update import update_rows

        for w_RD, grad_RD, update, factor in group:
            update = update.on_host()
            update_rows(w_RD, grad_RD, update, 1.0 if factor is None else float(factor))


def update_some_rows(w_RD: Tensor, rows_K: Tensor, grad_KD: Tensor, update: Update) -> None:
    """Update rows of a matrix in place from a gradient of these rows alone.

    Args:
        rows_K: int64, distinct.
    """
    from elmo_compile.kernels.aten.chunk_update import update_given_rows

    update_given_rows(w_RD, rows_K, grad_KD, update)
