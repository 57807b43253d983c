"""Row losses and row statistics, streamed over chunks of logits.

Sums are in arithmetic precision within a chunk and in float64 across chunks. Each class takes
chunks of logits with `add`. Shapes: N rows, C outputs of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.kernels.aten import pieces
from elmo_compile.kernels.aten.chunk_loss import LONGEST_SUM, parts_of
from elmo_compile.kernels.aten.compiled import piece
from elmo_compile.kernels.aten.head import Head
from elmo_compile.kernels.problem import Forward
from elmo_compile.numerics import losses

_LONGEST_SUM_OF_FLOATS = 1024
"""Exponentials of float32 logits added in float32; sums of them are added in float64."""
_FAR = 64.0
"""How far a chunk's largest logit may be from what its exponentials are relative to: 4096 times
e^64 is far below float32's largest number, and e^-64 far above its smallest."""


class BinaryRows:
    """Row losses of BCE: all outputs as negatives, then the targets' share."""

    def __init__(self, head: Head) -> None:
        self._loss, self._work = head.loss, head.work
        self.rows_N = torch.zeros(head.num_rows, dtype=torch.float64)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits."""
        self.rows_N += self._loss.negatives(z_CN, start, stop)
        picked = self._loss.target_logits(z_CN, start, stop)
        if picked is not None:
            picked.add_values_(self.rows_N)

    def result(self) -> Forward:
        """Row losses, and no statistics."""
        return Forward(self.rows_N.to(self._work), torch.empty(0))


class TargetScores:
    """Logits at the classes, for the value of cross entropy; with dense targets `sum_l y z`."""

    def __init__(self, head: Head) -> None:
        self._head, self._loss = head, head.loss
        self._score_N = torch.zeros(head.num_rows, dtype=torch.float64)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits."""
        y_CN = self._loss.dense_of(start, stop)
        if y_CN is not None:
            bias = self._loss.bias(start, stop)
            z_CN = z_CN.to(self._head.work)
            z_CN = z_CN if bias is None else z_CN + bias
            self._score_N += (y_CN * z_CN).sum(0, dtype=torch.float64)
            return
        picked = self._loss.target_logits(z_CN, start, stop)
        if picked is not None:
            self._score_N[picked.rows_M] = picked.z_M.double()

    def losses(self, lse_N: Tensor) -> Tensor:
        """Row losses `(sum y) lse - sum y z`, 0 where ignored, from a float64 log-sum-exp."""
        p = self._head.p
        if self._loss.total_N is not None:
            rows_N = self._loss.total_N * lse_N - self._score_N
        else:
            assert isinstance(p.target, Tensor)
            rows_N = torch.where(p.target == p.loss.ignore_index, 0.0, lse_N - self._score_N)
        return rows_N.to(self._head.work)


class SoftmaxRows:
    """Streaming log-sum-exp: running maximum and sum of `e^(z - maximum)`.

    A chunk is read once: its exponentials are taken relative to the maximum so far, which is as
    good as its own while that is no more than `_FAR` above, and else once more relative to its own.
    """

    def __init__(self, head: Head) -> None:
        self._head, self._loss = head, head.loss
        self._top_N = torch.full((head.num_rows,), -torch.inf, dtype=torch.float64)
        self._sum_N = torch.zeros(head.num_rows, dtype=torch.float64)
        self._scores = TargetScores(head)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits: those of the very product that the gradient will see. Rounded in
        another order, a row's largest logit would not fit its log-sum-exp."""
        # The error of a float32 sum grows with its length; beside that of a narrow logit it is
        # nothing.
        most = LONGEST_SUM if self._loss.lanes else _LONGEST_SUM_OF_FLOATS
        for part, first, last in parts_of(z_CN, start, stop, most):
            self._add_exponentials(part, first, last)
        self._scores.add(z_CN, start, stop)

    def _add_exponentials(self, z_CN: Tensor, start: int, stop: int) -> None:
        # Before any logit, or after masked ones (-inf) alone, 0 is as good a guess as another.
        shift_N = torch.where(self._top_N == -torch.inf, 0.0, self._top_N)
        top_N, sum_N = self._exponentials(z_CN, start, stop, shift_N)
        above_N = top_N - shift_N
        far_N = above_N > _FAR
        far_N |= (self._top_N == -torch.inf) & (above_N < -_FAR) & (top_N > -torch.inf)
        if far_N.any():
            shift_N = torch.where(far_N, top_N, shift_N)
            top_N, sum_N = self._exponentials(z_CN, start, stop, shift_N)
        together_N = torch.maximum(self._top_N, top_N)
        safe_N = torch.where(together_N == -torch.inf, 0.0, together_N)
        self._sum_N = self._sum_N * torch.exp(self._top_N - safe_N)
        self._sum_N += sum_N * torch.exp(shift_N - safe_N)
        self._top_N = together_N

    def _exponentials(
        self, z_CN: Tensor, start: int, stop: int, shift_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Largest logit of each row and sum of `e^(z - shift)`, float64."""
        run = piece(pieces.row_exponentials, self._loss.fast, lanes=self._loss.lanes)
        bias = self._loss.bias(start, stop)
        made = run(self._loss.words(z_CN), bias, *self._loss.split(shift_N, 0.0))
        half = len(made) // 2
        return self._loss.join(made[:half]).double(), self._loss.join(made[half:]).double()

    def result(self) -> Forward:
        """Row losses and log-sum-exp."""
        lse_N = self._top_N + self._sum_N.log()
        return Forward(self._scores.losses(lse_N), losses.two_parts(lse_N, self._head.work))
