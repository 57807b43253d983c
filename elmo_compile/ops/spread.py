"""A head whose outputs are spread over processes, and what these tell each other in a call.

Every process has rows of its own (features, targets, losses) and outputs of its own (the rows of
weight and bias). A call gathers the features and targets of all processes, forms the logits of all
rows and its own outputs, and adds up what is of all outputs: row losses, log-sum-exp, dx. Each
process gets back what belongs to its rows. The gradient of weight and bias is the mean over the
processes, as DistributedDataParallel makes that of the other parameters.

Shapes: N rows of this process, A of all, D features, L outputs of the head, R of this process, W
processes, M positives.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.problem import Forward, HeadProblem
from elmo_compile.numerics.losses import CE, Positives, two_parts
from elmo_compile.ops.collectives import exchange, gather_rows, swap
from elmo_compile.ops.shards import FAILED, Agreement, LabelShard

_IGNORED = -100
"""What rows that cross entropy ignores have as their class, whatever `ignore_index` says: that
number may be the place of a label among a process's own outputs."""
_ELSEWHERE = -1
"""The class of a row whose label is another process's output."""


class Spread(Protocol):
    """How one call of a head is spread over processes. In this order: `agreed`, `gathered`, the
    kernels, what combines their results."""

    num_outputs: int
    """L."""

    def agreed(
        self, device: torch.device, asked: Any, make: Callable[[], HeadProblem]
    ) -> HeadProblem:
        """What `make` returns, of this process's rows. Where it raises, all processes do.

        Args:
            device: of the tensors.
            asked: what is called, and for what: the same in all processes.
        """

    def gathered(self, p: HeadProblem) -> HeadProblem:
        """The same for the rows of all processes and this one's outputs."""

    def gathered_rows(self, stats_2N: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics of the rows of all processes, and the scales of their mean."""

    def combined(self, made: Forward) -> Forward:
        """Losses and statistics of this process's rows, from those over each one's outputs."""

    def row_losses(self, rows_A: Tensor) -> Tensor:
        """Losses of this process's rows, from the sums over each one's outputs."""

    def features(self, dx_AD: Tensor) -> Tensor:
        """dx of this process's rows."""

    def any(self, flag: Tensor) -> Tensor:
        """Whether `flag` (bool) is set in some process."""


class Whole:
    """A head that this process has whole: nothing is told, nothing changes."""

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def agreed(
        self, device: torch.device, asked: Any, make: Callable[[], HeadProblem]
    ) -> HeadProblem:
        return make()

    def gathered(self, p: HeadProblem) -> HeadProblem:
        return p

    def gathered_rows(self, stats_2N: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        return stats_2N, scale_N

    def combined(self, made: Forward) -> Forward:
        return made

    def row_losses(self, rows_A: Tensor) -> Tensor:
        return rows_A

    def features(self, dx_AD: Tensor) -> Tensor:
        return dx_AD

    def any(self, flag: Tensor) -> Tensor:
        return flag


class Sharded:
    """A head whose outputs are spread over processes."""

    def __init__(self, shard: LabelShard) -> None:
        self.shard, self.num_outputs = shard, shard.num_outputs
        self._rows: list[int] = []
        self._pairs: list[int] = []
        self._target: Any = None

    def agreed(
        self, device: torch.device, asked: Any, make: Callable[[], HeadProblem]
    ) -> HeadProblem:
        with Agreement(self.shard.group, device) as agreement:
            p = make()
            pairs = p.target.rows_M.numel() if isinstance(p.target, Positives) else 0
            same = asked, _same(p, self.num_outputs)
            agreement.tell(p.x_ND.shape[0], pairs, same=same)
        self._rows, self._pairs = agreement.told(0), agreement.told(1)
        return p

    def gathered(self, p: HeadProblem) -> HeadProblem:
        self._target, loss = self._targets(p), p.loss
        if loss.targets == "classes":
            loss = dataclasses.replace(loss, ignore_index=_IGNORED)
        return dataclasses.replace(p, x_ND=self._of_all(p.x_ND), target=self._target, loss=loss)

    def gathered_rows(self, stats_2N: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        if stats_2N.dim() == 2:
            stats_2N = self._of_all(stats_2N.t()).t().contiguous()
        return stats_2N, self._of_all(scale_N) / self.shard.world

    def combined(self, made: Forward) -> Forward:
        dtype = made.rows_N.dtype
        rows_A, stats_2N = made.rows_N.double(), made.stats_2N
        if stats_2N.dim() == 2:
            own_A = stats_2N.double().sum(0)
            world, group = self.shard.world, self.shard.group
            of_each = gather_rows(own_A, [len(own_A)] * world, group)
            lse_A = torch.stack(of_each).logsumexp(0)
            # A row's loss is known where its label is; elsewhere the kernels' is none.
            here_A = (self._target >= 0) & (self._target < self.shard.count)
            rows_A = torch.where(here_A, rows_A + (lse_A - own_A), 0.0)
            stats_2N = two_parts(self._own(lse_A), stats_2N.dtype)
        return Forward(self._own(self.shard.sum_(rows_A)).to(dtype), stats_2N)

    def row_losses(self, rows_A: Tensor) -> Tensor:
        return self._own(self.shard.sum_(rows_A.double())).to(rows_A.dtype)

    def features(self, dx_AD: Tensor) -> Tensor:
        # The scales were divided by the number of processes for the mean of dw and db.
        return self._own(self.shard.sum_(dx_AD.contiguous())) * self.shard.world

    def any(self, flag: Tensor) -> Tensor:
        return self.shard.sum_(flag.to(torch.int32)) > 0

    def _of_all(self, t: Tensor) -> Tensor:
        return torch.cat(gather_rows(t, self._rows, self.shard.group))

    def _own(self, t: Tensor) -> Tensor:
        """The part of this process's rows, in memory of its own."""
        first = sum(self._rows[: self.shard.rank])
        return t[first : first + self._rows[self.shard.rank]].clone()

    def _targets(self, p: HeadProblem) -> Tensor | Positives:
        """The targets of all rows among this process's outputs."""
        first, count = self.shard.first, self.shard.count
        if isinstance(p.target, Positives):
            return self._positives(p.target)
        if p.loss.targets == "dense":
            return self.shard.to_outputs(p.target, self._rows)
        class_A = self._of_all(p.target)
        own_A = (class_A >= first) & (class_A < first + count)
        place_A = torch.where(own_A, class_A - first, _ELSEWHERE)
        return torch.where(class_A == p.loss.ignore_index, _IGNORED, place_A)

    def _positives(self, mine: Positives) -> Positives:
        first, count, group = self.shard.first, self.shard.count, self.shard.group
        rows = gather_rows(mine.rows_M, self._pairs, group)
        above = [sum(self._rows[:rank]) for rank in range(len(rows))]
        rows_M = torch.cat([of_one + start for of_one, start in zip(rows, above)])
        cols_M = torch.cat(gather_rows(mine.cols_M, self._pairs, group))
        own_M = (cols_M >= first) & (cols_M < first + count)
        cols_M, order = torch.where(own_M, cols_M - first, count).sort(stable=True)
        values_M = None
        if mine.values_M is not None:
            values_M = torch.cat(gather_rows(mine.values_M, self._pairs, group))[order]
        return Positives(rows_M[order], cols_M, values_M)


def _same(p: HeadProblem, num_outputs: int) -> Any:
    """What must be the same in all processes."""
    if isinstance(p.target, Positives):
        form: Any = "pairs", p.target.values_M is None
    else:
        form = p.loss.targets, p.target.dtype
    loss = (p.loss.name, p.loss.ignore_index) if p.loss.name == CE else p.loss.name
    return (
        loss, form, num_outputs, p.x_ND.shape[1], p.x_ND.dtype, p.w_LD.dtype, p.compute_dtype,
        p.fp8_features, None if p.b_L is None else p.b_L.dtype,
    )  # fmt: skip


def spread_of(shard: str, weight: Tensor) -> Spread:
    """How a call of a head is spread.

    Args:
        shard: `LabelShard.encode`d; empty where this process has the head whole.
        weight: this process's rows of it.
    """
    return Sharded(LabelShard.decode(shard)) if shard else Whole(weight.shape[0])


class Exchange:
    """What the processes of a program's product send each other (`kernels.aten.spread_programs`).

    To be entered around all of a call: the processes tell each other before each walk, and at the
    end, that they go on; where one raised, so do the others.
    """

    def __init__(self, shard: LabelShard, x: Tensor, same: Any) -> None:
        self.shard = shard
        self._device, self._own = x.device, x[..., 0].numel()
        self._same = (shard.num_outputs, x.shape[-1], x.dtype, same)
        self._rows: list[int] = []
        self._told = False
        """Another process has failed, or this one has said that it did."""

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.agree()
        elif not self._told:
            self._told = True
            exchange(FAILED, self._device, self.shard.group)

    def agree(self, number: int = 0) -> int:
        """All go on, or all raise InputError; the smallest number of all."""
        must = (
            "the loss, dtypes, what a gradient is asked of, and how the loss is planned (for some "
            "losses another way in a process with less than two rows: give it more)"
        )
        agreement = Agreement(self.shard.group, self._device, must=must)
        agreement.tell(self._own, number, same=self._same)
        try:
            agreement.close()
        except InputError:
            self._told = True
            raise
        self._rows = agreement.told(0)
        return min(agreement.told(1))

    def of_all(self, x_ND: Tensor) -> Tensor:
        """[A, D]."""
        return torch.cat(gather_rows(x_ND, self._rows, self.shard.group))

    def to_rows(self, z_AC: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """[N, C] of each process's outputs, from [A, C] of every process's own.

        Args:
            widths: C of each process.
        """
        shapes = [(self._own, width) for width in widths]
        return swap(torch.split(z_AC, self._rows), shapes, self.shard.group)

    def to_outputs(self, pieces: Sequence[Tensor], width: int) -> Tensor:
        """[A, C] of own outputs, from [N, C] of each process's."""
        return torch.cat(swap(pieces, [(n, width) for n in self._rows], self.shard.group))

    def own_sum(self, dx_AD: Tensor) -> Tensor:
        """[N, D]: the sum over processes, of this one's rows."""
        total = self.shard.sum_(dx_AD.contiguous())
        return torch.split(total, self._rows)[self.shard.rank].clone()

    def any(self, flag: Tensor) -> Tensor:
        """Whether `flag` (bool) is set in some process."""
        return self.shard.sum_(flag.to(torch.int32)) > 0


def exchange_of(shard: str, x: Tensor, same: Any) -> contextlib.AbstractContextManager[Any]:
    """An `Exchange` for a call of a program, or what gives None where the head is whole.

    Args:
        shard: `LabelShard.encode`d, or empty.
        x: this process's features.
        same: what must have one `repr` in all processes.
    """
    if not shard:
        return contextlib.nullcontext()
    return Exchange(LabelShard.decode(shard), x, same)
