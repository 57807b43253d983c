"""`elmo::multi_hot`: label indices to 0/1 targets, which the pass replaces by the indices.

A custom op with a fake, so that its checks do not break a full graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.numerics.losses import BCE, LossSpec
from elmo_compile.ops.call import assert_labels


@torch.library.custom_op(
    "elmo::multi_hot",
    mutates_args=(),
    schema="(Tensor indices, int num_classes, Tensor? offsets) -> Tensor",
)
def _multi_hot(indices: Tensor, num_classes: int, offsets: Tensor | None) -> Tensor:
    from elmo_compile.kernels.targets import positives_of

    check_labels(indices, num_classes, offsets)
    spec, num_rows = _form(offsets), _num_rows(indices, offsets)
    rows_M, cols_M, _ = positives_of(spec, indices, offsets, num_rows, num_classes)
    # Padding and repeats carry the column `num_classes`; they go to one number behind the matrix.
    size = num_rows * num_classes
    at_M = torch.where(cols_M == num_classes, size, rows_M * num_classes + cols_M)
    y = torch.zeros(size + 1, dtype=torch.float32, device=indices.device)
    y[at_M] = 1.0
    return y[:size].view(num_rows, num_classes)


@_multi_hot.register_fake
def _(indices: Tensor, num_classes: int, offsets: Any) -> Tensor:
    return indices.new_empty(_num_rows(indices, offsets), num_classes, dtype=torch.float32)


def _form(offsets: Tensor | None) -> LossSpec:
    return LossSpec(name=BCE, targets="padded" if offsets is None else "flat")


def _num_rows(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.shape[0] if offsets is None else offsets.shape[0] - 1


def check_labels(indices: Tensor, num_classes: int, offsets: Tensor | None) -> None:
    """Raise InputError (on a GPU: stop the program) where an id is out of range."""
    from elmo_compile.kernels.targets import check_targets

    check = check_targets if indices.device.type == "cpu" else assert_labels
    check(_form(offsets), indices, offsets, _num_rows(indices, offsets), num_classes)


def check_multi_hot(indices: Tensor, num_classes: int, offsets: Tensor | None) -> None:
    """Raise InputError unless `elmo::multi_hot` takes such arguments. No values are read."""
    for name, given in (("indices", indices), ("offsets", offsets)):
        if given is not None and not isinstance(given, Tensor):
            raise InputError(f"multi_hot: {name} must be a tensor, got {type(given).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise InputError(f"multi_hot: indices must be int64, got {indices.dtype}")
    if indices.ndim != (2 if offsets is None else 1):
        raise InputError(
            "multi_hot: indices must be [N, P] padded with -1, or [M] together with offsets "
            f"[N + 1]; got shape {tuple(indices.shape)} and "
            f"{'no offsets' if offsets is None else 'offsets'}"
        )
    if offsets is not None and (
        offsets.ndim != 1
        or offsets.shape[0] == 0
        or offsets.dtype not in (torch.int64, torch.int32)
    ):
        raise InputError(
            f"multi_hot: offsets must be int64 [N + 1], got {offsets.dtype} {tuple(offsets.shape)}"
        )
    whole = isinstance(num_classes, int | torch.SymInt) and not isinstance(num_classes, bool)
    if not whole or num_classes < 1:
        raise InputError(f"multi_hot: num_classes must be a positive int, got {num_classes!r}")
