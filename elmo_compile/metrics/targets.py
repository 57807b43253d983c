"""Sparse labels of many points, in compressed rows: the form every metric here reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_compile.errors import InputError


class SparseTargets(NamedTuple):
    """Labels of N points: row i has the labels `indices[indptr[i]:indptr[i + 1]]`, in any order.

    Build one with `sparse_targets` or `SparseTargets.from_rows`, which check it.
    """

    indptr: Tensor
    """int64 [N + 1], from 0 to M, never descending."""
    indices: Tensor
    """int64 [M], labels from 0; a label repeated within a row counts once."""

    @classmethod
    def from_rows(cls, rows: Sequence[Iterable[int]]) -> SparseTargets:
        """Targets from one collection of labels a point.

        Raises:
            InputError: a label is negative.
        """
        lists = [list(row) for row in rows]
        indptr = torch.tensor([0] + [len(row) for row in lists]).cumsum(0)
        flat = [label for row in lists for label in row]
        return sparse_targets(indptr, torch.tensor(flat, dtype=torch.int64))

    @property
    def num_points(self) -> int:
        """N."""
        return self.indptr.numel() - 1

    def counts(self) -> Tensor:
        """int64 [N], labels given for each point (repeats included)."""
        return self.indptr.diff()

    def rows(self) -> Tensor:
        """int64 [M], the point that each entry of `indices` belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_points), self.counts())

    def slice(self, start: int, stop: int) -> SparseTargets:
        """The points `[start, stop)`, without a check."""
        lo, hi = int(self.indptr[start]), int(self.indptr[stop])
        return SparseTargets(self.indptr[start : stop + 1] - lo, self.indices[lo:hi])

    def distinct(self) -> SparseTargets:
        """The same labels, ascending in each row and each given once."""
        if self.indices.numel() == 0:
            return self
        width = int(self.indices.max()) + 1
        keys = torch.unique(self.rows() * width + self.indices)
        counts = torch.bincount(keys // width, minlength=self.num_points)
        return SparseTargets(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), keys % width)


def sparse_targets(indptr: Any, indices: Any) -> SparseTargets:
    """Checked `SparseTargets` from integer tensors, numpy arrays or lists.

    Args:
        indptr: [N + 1] integers, from 0 to M, never descending (`scipy.sparse.csr_matrix.indptr`).
        indices: [M] integers, not negative (`scipy.sparse.csr_matrix.indices`).

    Raises:
        InputError: the two do not describe compressed rows.
    """
    indptr, indices = _integers("indptr", indptr), _integers("indices", indices)
    if indptr.numel() == 0 or int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel():
        ends = [] if indptr.numel() == 0 else [int(indptr[0]), int(indptr[-1])]
        raise InputError(
            f"indptr must begin with 0 and end with the number of indices, {indices.numel()}; "
            f"its ends are {ends}. Pass the indptr and indices of one CSR matrix."
        )
    if indptr.numel() > 1 and int(indptr.diff().min()) < 0:
        row = int(indptr.diff().argmin())
        raise InputError(
            f"indptr must never descend; it goes from {int(indptr[row])} to "
            f"{int(indptr[row + 1])} at row {row}."
        )
    if indices.numel() and int(indices.min()) < 0:
        entry = int(indices.argmin())
        raise InputError(
            f"labels must not be negative; entry {entry} of indices is {int(indices[entry])}. "
            "Leave padding out: a point's labels are as many as its indptr says."
        )
    return SparseTargets(indptr, indices)


def _integers(name: str, values: Any) -> Tensor:
    """`values` as an int64 CPU vector; anything that is not integers is refused."""
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0 and tensor.dim() == 1:
        return torch.empty(0, dtype=torch.int64)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise InputError(
            f"{name} must be a vector of integers; got {tensor.dtype} of shape "
            f"{list(tensor.shape)}. Label ids must never pass through a float."
        )
    return tensor.to(device="cpu", dtype=torch.int64)
