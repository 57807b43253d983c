"""The loss of a chunk of logits: values a row, statistics, and the gradient in place of the logits.

Targets are patched in after the vector code has treated every element as a negative: a chunk's
targets are a contiguous slice of the pairs sorted by column. Shapes: C outputs of a chunk, N rows
(padded to even for bf16), M positives of a chunk. Logits are [C, N].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elmo_compile.kernels.aten import pieces
from elmo_compile.kernels.aten.compiled import piece
from elmo_compile.kernels.aten.lanes import as_words
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics import losses
from elmo_compile.numerics.losses import CE, Positives

LONGEST_SUM = 4096
"""Outputs added up by one call of a piece: longer sums err more, and Inductor compiles a reduction
once more for sizes beyond (a guard on 4096 elements, torch 2.13)."""


def parts_of(
    z_CN: Tensor, start: int, stop: int, most: int = LONGEST_SUM
) -> Iterator[tuple[Tensor, int, int]]:
    """A chunk of outputs [start, stop) in parts of at most `most`: (rows of z, start, stop)."""
    for first in range(start, stop, most):
        last = min(first + most, stop)
        yield z_CN[first - start : last - start], first, last


class ChunkLoss:
    """The loss and targets of one call, applied to its chunks of logits."""

    def __init__(self, p: HeadProblem, rows: int, lanes: bool, work: torch.dtype, fast: bool):
        self.p, self.rows, self.lanes, self.work, self.fast = p, rows, lanes, work, fast
        self.is_ce = p.loss.name == CE
        self.dense = p.target if p.loss.targets == "dense" else None
        self.bias_L1 = None if p.b_L is None else p.b_L.detach().to(work).unsqueeze(1)
        self.total_N: Tensor | None = None
        if self.is_ce and isinstance(self.dense, Tensor):
            self.total_N = self.dense.sum(1, dtype=work)
        self.positives = _sorted_targets(p)
        self._bounds = [0]
        if self.positives is not None:
            num_outputs = p.w_LD.shape[0]
            edges = torch.arange(0, num_outputs + p.chunk, p.chunk).clamp_max(num_outputs)
            self._bounds = torch.searchsorted(self.positives.cols_M, edges).tolist()
            # Where each is in its chunk's logits, counted along them: one operation to read or
            # write them. A small operation is 20 to 100 us behind a product (benchmarks/NOTES.md).
            in_chunk_M = self.positives.cols_M % p.chunk
            self._at_M = in_chunk_M * rows + self.positives.rows_M

    def bias(self, start: int, stop: int) -> Tensor | None:
        """Bias of a chunk [C, 1] in arithmetic precision."""
        return None if self.bias_L1 is None else self.bias_L1[start:stop]

    def split(self, per_row_N: Tensor, fill: float) -> tuple[Tensor, Tensor | None]:
        """One entry a row, padded, as the even rows and the odd rows where lanes want them so."""
        padded = per_row_N.to(self.work)
        if padded.shape[0] < self.rows:
            padded = torch.cat((padded, padded.new_full((self.rows - padded.shape[0],), fill)))
        if not self.lanes:
            return padded, None
        return padded[0::2].contiguous(), padded[1::2].contiguous()

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Inverse of `split`, without the padding."""
        rows = parts[0] if len(parts) == 1 else torch.stack(parts, 1).view(-1)
        return rows[: self.p.x_ND.shape[0]]

    def words(self, z_CN: Tensor) -> Tensor:
        """Logits as the pieces take them."""
        return as_words(z_CN) if self.lanes else z_CN

    def dense_of(self, start: int, stop: int) -> Tensor | None:
        """Dense targets of a chunk, [C, N]."""
        return None if self.dense is None else self.dense[:, start:stop].t()  # type: ignore[call-overload, union-attr]

    def negatives(self, z_CN: Tensor, start: int, stop: int) -> Tensor:
        """BCE summed over a chunk as if every target not dense were 0, in float64 [N]."""
        total_N = torch.zeros(self.p.x_ND.shape[0], dtype=torch.float64)
        for part, first, last in parts_of(z_CN, start, stop):
            bias, y_CN = self.bias(first, last), self.dense_of(first, last)
            if y_CN is not None:
                rows = piece(pieces.bce_dense_rows, self.fast)(part, bias, y_CN)
            else:
                rows = piece(pieces.bce_rows, self.fast, lanes=self.lanes)(self.words(part), bias)
            total_N += self.join(rows).double()
        return total_N

    def target_logits(self, z_CN: Tensor, start: int, stop: int) -> _Picked | None:
        """The logits, bias included, at the targets of a chunk."""
        if self.positives is None:
            return None
        first, last = self._bounds[start // self.p.chunk], self._bounds[start // self.p.chunk + 1]
        if first == last:
            return None
        rows_M, cols_M, values_M = self.positives
        at_M = self._at_M[first:last]
        z_M = torch.take(z_CN, at_M).to(self.work)
        bias = self.bias(start, stop)
        if bias is not None:
            z_M = z_M + torch.take(bias, cols_M[first:last] - start)
        values_M = None if values_M is None else values_M[first:last]
        return _Picked(at_M, rows_M[first:last], z_M, values_M)

    def gradient_(
        self,
        z_CN: Tensor,
        start: int,
        stop: int,
        stats: tuple[Tensor, Tensor] | None,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """z_CN <- dloss/dz, unscaled, rounded to z's dtype.

        With `rows_N` (float64, BCE with sparse targets), the chunk's share of each row's loss is
        added to it in the same pass.
        """
        picked = self.target_logits(z_CN, start, stop)
        bias, y_CN = self.bias(start, stop), self.dense_of(start, stop)
        if rows_N is not None:
            run = piece(pieces.bce_rows_gradient_, self.fast, lanes=self.lanes)
            for part, first, last in parts_of(z_CN, start, stop):
                rows_N += self.join(run(self.words(part), self.bias(first, last))).double()
            if picked is not None:
                picked.add_values_(rows_N)
        elif stats is None and y_CN is None:
            piece(pieces.bce_gradient_, self.fast, lanes=self.lanes)(self.words(z_CN), bias)
        elif stats is None:
            piece(pieces.bce_dense_gradient_, self.fast)(z_CN, bias, y_CN)
        elif y_CN is None:
            run = piece(pieces.ce_gradient_, self.fast, lanes=self.lanes)
            run(self.words(z_CN), bias, *stats)
        else:
            run = piece(pieces.ce_dense_gradient_, self.fast)
            run(z_CN, bias, *stats, self.total_N, y_CN)
        if picked is not None:
            at_targets_M = self._target_gradient(picked, stats).to(z_CN.dtype)
            _put_(z_CN, picked.at_M, at_targets_M)
        return z_CN

    def _target_gradient(self, picked: _Picked, stats: tuple[Tensor, Tensor] | None) -> Tensor:
        """Gradient at the targets, formed in arithmetic precision without cancellation."""
        if stats is None:
            return losses.positive_gradient(picked.z_M, picked.values_M)
        first, second = stats
        if self.lanes:
            lse_N = torch.stack((first, second), 1).view(-1)
            return losses.ce_target_gradient(picked.z_M - lse_N[picked.rows_M])
        log_p_M = picked.z_M - first[picked.rows_M] - second[picked.rows_M]
        return losses.ce_target_gradient(log_p_M)


class _Picked:
    """Targets of one chunk: where they are in its logits and what these are."""

    def __init__(self, at_M: Tensor, rows_M: Tensor, z_M: Tensor, values_M: Tensor | None):
        self.at_M, self.rows_M, self.z_M, self.values_M = at_M, rows_M, z_M, values_M

    def add_values_(self, rows_N: Tensor) -> None:
        """rows_N -= sum of `y z` over the chunk's targets (float64)."""
        yz_M = self.z_M if self.values_M is None else self.z_M * self.values_M
        rows_N.index_add_(0, self.rows_M, -yz_M.double())


def _put_(z_CN: Tensor, at_M: Tensor, values_M: Tensor) -> None:
    """Write into logits, each place once."""
    if not torch.are_deterministic_algorithms_enabled():
        z_CN.put_(at_M, values_M)
    else:  # then put_ raises, since a place might be named twice
        rows = z_CN.shape[1]
        z_CN[at_M // rows, at_M % rows] = values_M


def _sorted_targets(p: HeadProblem) -> Positives | None:
    """Targets as pairs sorted by column; ignored rows have column L. None for dense targets."""
    if isinstance(p.target, Positives):
        return p.target
    if p.loss.targets == "dense":
        return None
    num_outputs = p.w_LD.shape[0]
    cols_N = torch.where(p.target == p.loss.ignore_index, num_outputs, p.target)
    sorted_N = cols_N.sort(stable=True)
    return Positives(sorted_N.indices, sorted_N.values, None)
