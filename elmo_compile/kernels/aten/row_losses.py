"""Row losses and row statistics, streamed over chunks of logits.

Sums are in arithmetic precision within a chunk and in float64 across chunks. Shapes: N rows, C
outputs of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.kernels.aten import pieces
from elmo_compile.kernels.aten.compiled import piece
from elmo_compile.kernels.aten.head import Head
from elmo_compile.kernels.problem import Forward


class BinaryRows:
    """Row losses of BCE: all outputs as negatives, then the targets' share."""

    def __init__(self, head: Head) -> None:
        self._loss, self._work = head.loss, head.work
        self._rows_N = torch.zeros(head.num_rows, dtype=torch.float64)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits."""
        self._rows_N += self._loss.negatives(z_CN, start, stop)
        picked = self._loss.target_logits(z_CN, start, stop)
        if picked is not None:
            picked.add_values_(self._rows_N)

    def result(self) -> Forward:
        """Row losses, and no statistics."""
        return Forward(self._rows_N.to(self._work), torch.empty(0))


class TargetScores:
    """`sum_l y_nl z_nl` of each row for cross entropy: the logit of its class, or a dense dot."""

    def __init__(self, head: Head) -> None:
        self._head, self._loss = head, head.loss
        self.score_N = torch.zeros(head.num_rows, dtype=torch.float64)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits."""
        y_CN = self._loss.dense_of(start, stop)
        if y_CN is not None:
            run = piece(pieces.dense_dot_rows, self._loss.fast)
            self.score_N += run(z_CN, self._loss.bias(start, stop), y_CN)[0].double()
            return
        picked = self._loss.target_logits(z_CN, start, stop)
        if picked is not None:
            self.score_N[picked.rows_M] = picked.z_M.double()

    def losses(self, lse_N: Tensor) -> Tensor:
        """Row losses `(sum y) lse - sum y z`, 0 where ignored."""
        p, lse_N = self._head.p, lse_N.double()
        if self._loss.total_N is not None:
            rows_N = self._loss.total_N * lse_N - self.score_N
        else:
            assert isinstance(p.target, Tensor)
            rows_N = torch.where(p.target == p.loss.ignore_index, 0.0, lse_N - self.score_N)
        return rows_N.to(self._head.work)


class SoftmaxRows:
    """Streaming log-sum-exp: running maximum and sum of `e^(z - maximum)`."""

    def __init__(self, head: Head) -> None:
        self._head, self._loss = head, head.loss
        self._top_N = torch.full((head.num_rows,), -torch.inf, dtype=head.work)
        self._sum_N = torch.zeros(head.num_rows, dtype=torch.float64)
        self._scores = TargetScores(head)

    def add(self, z_CN: Tensor, start: int, stop: int) -> None:
        """Add a chunk's logits."""
        loss, bias = self._loss, self._loss.bias(start, stop)
        words = loss.words(z_CN)
        maxima = piece(pieces.row_maxima, loss.fast, lanes=loss.lanes)(words, bias)
        top_N = torch.maximum(self._top_N, loss.join(maxima))
        # A row of -inf alone keeps its maximum out of the exponents.
        safe_N = torch.where(top_N == -torch.inf, 0.0, top_N)
        run = piece(pieces.row_exp_sums, loss.fast, lanes=loss.lanes)
        sums_N = loss.join(run(words, bias, *loss.split(safe_N, 0.0))).double()
        self._sum_N = self._sum_N * torch.exp((self._top_N - safe_N).double()) + sums_N
        self._top_N = top_N
        self._scores.add(z_CN, start, stop)

    def result(self) -> Forward:
        """Row losses and log-sum-exp."""
        lse_N = self._top_N.double() + self._sum_N.log()
        return Forward(self._scores.losses(lse_N), lse_N.to(self._head.work))
