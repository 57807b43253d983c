"""Sparse targets in the one form kernels read, and the check that their labels are in range.

Shapes: N rows, L outputs, P positives a row (padded), M positives in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.numerics.losses import LossSpec, Positives

PADDING = -1
"""The column that stands for "no label" in `padded` targets."""


def positives_of(
    spec: LossSpec, target: Tensor, aux: Tensor | None, num_rows: int, num_outputs: int
) -> Positives:
    """Positives of a batch, sorted by (column, row), each (row, column) pair at most once.

    Args:
        spec: says how targets are given and what a repeated label means.
        target: int64; `padded` [N, P] (-1 is padding), `indices` [N, P], `flat` labels [M], `pairs`
            rows [M], where negative numbers count from the end.
        aux: int64; `flat` offsets [N + 1], `pairs` columns [M], otherwise None.
        num_rows: N.
        num_outputs: L; padding and repeats get this column, and so sort last.

    Returns:
        Positives; `values_M` counts repeats for `duplicates="count"` and is None for "once".

    Only torch operations of fixed shapes: no host synchronisation on a device.
    """
    rows_M, cols_M = _coordinates(spec, target, aux, num_rows)
    if spec.targets == "pairs":
        rows_M = torch.where(rows_M < 0, rows_M + num_rows, rows_M)
        cols_M = torch.where(cols_M < 0, cols_M + num_outputs, cols_M)
    padding_M = (cols_M < 0) | (cols_M >= num_outputs)
    # One integer a pair, in the order wanted; a padding entry sorts behind every label.
    last = num_outputs * num_rows
    key_M = torch.where(padding_M, last, cols_M * num_rows + rows_M).sort().values
    first_M = torch.ones_like(key_M, dtype=torch.bool)
    first_M[1:] = key_M[1:] != key_M[:-1]
    values_M = None
    if spec.duplicates == "count":
        group_M = first_M.cumsum(0) - 1
        counts_M = torch.zeros_like(key_M).index_add_(0, group_M, torch.ones_like(key_M))
        values_M = counts_M[group_M].to(torch.float32)
    key_M, order_M = torch.where(first_M, key_M, last).sort()
    if values_M is not None:
        values_M = values_M[order_M]
    rows = max(num_rows, 1)
    return Positives(key_M % rows, torch.div(key_M, rows, rounding_mode="floor"), values_M)


def check_targets(
    spec: LossSpec, target: Tensor, aux: Tensor | None, num_rows: int, num_outputs: int
) -> None:
    """Raise InputError for a label out of range. Reads values: for tensors on a CPU.

    Args:
        spec, target, aux, num_rows, num_outputs: as for `positives_of`; also `classes` [N], where
            `ignore_index` is accepted, and `dense`, which has no labels to check.
    """
    if spec.targets == "dense" or target.numel() == 0:
        return
    if spec.targets == "classes":
        wrong = (target != spec.ignore_index) & ((target < 0) | (target >= num_outputs))
        accepted = f"0 <= class < {num_outputs}, or ignore_index={spec.ignore_index}"
        _refuse(wrong, torch.arange(target.numel()), target, accepted)
        return
    if spec.targets == "flat":
        _check_offsets(target, aux, num_rows)
    rows_M, cols_M = _coordinates(spec, target, aux, num_rows)
    lowest = {"padded": PADDING, "pairs": -num_outputs}.get(spec.targets, 0)
    accepted = f"{lowest} <= label < {num_outputs}"
    if spec.targets == "padded":
        accepted = f"0 <= label < {num_outputs}, or {PADDING} for padding"
    _refuse((cols_M < lowest) | (cols_M >= num_outputs), rows_M, cols_M, accepted)
    if spec.targets == "pairs":
        wrong = (rows_M < -num_rows) | (rows_M >= num_rows)
        accepted = f"{-num_rows} <= row < {num_rows}"
        _refuse(wrong, torch.arange(rows_M.numel()), rows_M, accepted, "row")


def _coordinates(
    spec: LossSpec, target: Tensor, aux: Tensor | None, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Row and column of every entry, int64 [M], padding still in it."""
    if spec.targets in ("padded", "indices"):
        rows_NP = torch.arange(num_rows, device=target.device).unsqueeze(1).expand_as(target)
        return rows_NP.reshape(-1), target.reshape(-1)
    if spec.targets in ("flat", "pairs") and aux is None:
        needs = "offsets [N + 1]" if spec.targets == "flat" else "columns [M]"
        raise InputError(f"targets given as {spec.targets!r} need their {needs} as well")
    if spec.targets == "flat":
        # Entry m belongs to the last row whose offset is not past m.
        position_M = torch.arange(target.numel(), device=target.device)
        assert aux is not None
        return torch.searchsorted(aux[1:].contiguous(), position_M, right=True), target
    if spec.targets == "pairs":
        assert aux is not None
        return target, aux
    raise InputError(
        f"targets given as {spec.targets!r} have no sparse form; accepted: padded, indices, "
        "flat, pairs"
    )


def _check_offsets(labels: Tensor, offsets: Tensor | None, num_rows: int) -> None:
    """Raise InputError unless offsets rise from 0 to the number of labels, one a row and one."""
    if offsets is None:
        return
    if offsets.numel() != num_rows + 1:
        raise InputError(
            f"offsets have {offsets.numel()} entries for {num_rows} rows; accepted: rows + 1"
        )
    if offsets[0] != 0 or offsets[-1] != labels.numel() or bool((offsets.diff() < 0).any()):
        raise InputError(
            f"offsets must rise from 0 to the number of labels, {labels.numel()}; they go from "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )


def _refuse(
    wrong: Tensor, rows: Tensor, values: Tensor, accepted: str, what: str = "label"
) -> None:
    """Raise InputError naming the first wrong entry, if there is one."""
    if not bool(wrong.any()):
        return
    first = int(wrong.to(torch.uint8).argmax())
    where = f"entry {int(rows[first])}" if what == "row" else f"row {int(rows[first])}"
    raise InputError(
        f"{what} {int(values[first])} at {where} is out of range ({int(wrong.sum())} such "
        f"entries); accepted: {accepted}"
    )
