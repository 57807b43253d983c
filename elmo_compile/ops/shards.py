"""A head whose outputs are spread over processes, and what these tell each other in a call.

Every process has rows of its own (features, targets, losses) and outputs of its own (the rows of
weight and bias). A call gathers the features and targets of all processes, forms the logits of all
rows and its own outputs, and adds up what is of all outputs: row losses, log-sum-exp, dx. Each
process gets back what belongs to its rows. The gradient of weight and bias is the mean over the
processes, as DistributedDataParallel makes that of the other parameters.

A header of fixed length goes first, so that a process whose input is refused does not leave the
others waiting: all raise, or none does. For it a GPU is waited for, once a forward and once a
backward.

Shapes: N rows of this process, A of all, D features, L outputs of the head, R of this process, W
processes, M positives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import ElmoError, InputError
from elmo_compile.kernels.problem import Forward, HeadProblem
from elmo_compile.numerics.losses import CE, Positives, two_parts
from elmo_compile.ops.collectives import exchange, gather_rows, swap
from elmo_compile.ops.hidden_gradients import watch

_IGNORED = -100
"""What rows that cross entropy ignores have as their class, whatever `ignore_index` says: that
number may be the place of a label among a process's own outputs."""
_ELSEWHERE = -1
"""The class of a row whose label is another process's output."""

_groups: dict[str, Any] = {}
_HEAD = "_elmo_sharded_head"


# DTensors


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # else there is none
    return tensors is not None and isinstance(t, tensors.DTensor)


def local_of(t: Tensor) -> Tensor:
    """This process's part of a DTensor, detached, in the same memory; another tensor detached."""
    t = t.detach()
    if not is_sharded(t):
        return t
    found: Any = t.to_local()  # type: ignore[attr-defined]
    local: Tensor = found.wait() if hasattr(found, "wait") else found
    return local


def local_part(t: Any) -> Tensor:
    """This process's part of a DTensor, whose gradient is the DTensor's."""
    found: Tensor = t.to_local()
    return found


def note_head(param: Tensor) -> None:
    """Remember that a DTensor [L, D] is the weight of a head that calls the ops of this package."""
    _groups[_group(param).group_name] = _group(param)
    setattr(param, _HEAD, True)  # no weak reference: torch moves such parameters by swapping them


def is_head(param: Tensor) -> bool:
    """Whether `note_head` was told of this very Parameter."""
    return bool(getattr(param, _HEAD, False))


def sum_over_shards(t: Tensor, param: Tensor) -> Tensor:
    """The sum over the processes that have parts of a parameter; `t` itself for a whole one."""
    if not is_sharded(param):
        return t
    total = t.clone()
    dist.all_reduce(total, group=_group(param))
    return total


def _group(param: Any) -> Any:
    return param.device_mesh.get_group()


class _Carrier(torch.autograd.Function):
    """A stand-in for this process's part of a weight, through which its gradient flows."""

    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        ctx.place = weight.device_mesh, weight.placements, weight.shape, weight.stride()
        local = local_of(weight)
        return torch.zeros((), dtype=dtype, device=local.device).expand(local.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = ctx.place
        grad = DTensor.from_local(
            grads[0], mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return grad, None


def carry_shard(weight: Tensor) -> Tensor:
    """The carrier [R, D] of a sharded weight: float32 where the head was converted."""
    converted = weight.dtype.itemsize == 1 or weight.grad_dtype is None
    if converted:
        if weight.is_leaf and weight.requires_grad and weight.grad_dtype is not None:
            weight.grad_dtype = None
        watch(weight)
    dtype = torch.float32 if converted else weight.dtype
    carrier: Tensor = _Carrier.apply(weight, dtype)  # type: ignore[no-untyped-call]
    return carrier


# Which outputs are whose


@dataclasses.dataclass(frozen=True)
class LabelShard:
    """L outputs over the processes of a group, as `Shard(0)` places them."""

    group: Any
    num_outputs: int

    @classmethod
    def of(cls, weight: Any) -> LabelShard:
        """How the rows of a DTensor weight lie."""
        return cls(_group(weight), weight.shape[0])

    def encode(self) -> str:
        """As `decode` takes it: a string, which a graph can hold."""
        return f"{self.group.group_name}/{self.num_outputs}"

    @classmethod
    def decode(cls, text: str) -> LabelShard:
        """Raises ElmoError where this process does not know the group."""
        name, _, outputs = text.rpartition("/")
        if name not in _groups:
            raise ElmoError(
                f"a sharded head belongs to the process group {name!r}, which this process has not "
                "made: call elmo_compile.distributed.shard_head in it"
            )
        return cls(_groups[name], int(outputs))

    @functools.cached_property
    def world(self) -> int:
        """W."""
        return dist.get_world_size(self.group)

    @functools.cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(first, one past the last) output of each process."""
        each = -(-self.num_outputs // self.world)
        edges = [min(rank * each, self.num_outputs) for rank in range(self.world + 1)]
        return list(itertools.pairwise(edges))

    @functools.cached_property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    @property
    def first(self) -> int:
        """This process's first output."""
        return self.bounds[self.rank][0]

    @property
    def count(self) -> int:
        """R."""
        first, last = self.bounds[self.rank]
        return last - first

    def to_outputs(self, t_NL: Tensor, rows: Sequence[int]) -> Tensor:
        """[A, R] from [N, L] of each process: from own rows to own outputs.

        Args:
            rows: N of each process.
        """
        parts = [t_NL[:, first:last] for first, last in self.bounds]
        received = swap(parts, [(n, self.count) for n in rows], self.group)
        return torch.cat(received)

    def to_rows(self, t_AR: Tensor, rows: Sequence[int]) -> Tensor:
        """[N, L] from [A, R] of each process: from own outputs to own rows."""
        parts = torch.split(t_AR, list(rows))
        shapes = [(rows[self.rank], last - first) for first, last in self.bounds]
        return torch.cat(swap(parts, shapes, self.group), 1)

    def sum_(self, t: Tensor) -> Tensor:
        """t <- its sum over the processes."""
        dist.all_reduce(t, group=self.group)
        return t


# One call of a head


class Spread(Protocol):
    """How one call of a head is spread over processes. In this order: `agreed`, `gathered`, the
    kernels, what combines their results."""

    num_outputs: int
    """L."""

    def agreed(self, device: torch.device, make: Callable[[], HeadProblem]) -> HeadProblem:
        """What `make` returns, of this process's rows. Where it raises, all processes do."""

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

    def agreed(self, device: torch.device, make: Callable[[], HeadProblem]) -> HeadProblem:
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

    def agreed(self, device: torch.device, make: Callable[[], HeadProblem]) -> HeadProblem:
        with Agreement(self.shard.group, device) as agreement:
            p = make()
            pairs = p.target.rows_M.numel() if isinstance(p.target, Positives) else 0
            agreement.tell(p.x_ND.shape[0], pairs, same=_same(p, self.num_outputs))
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
            received = [torch.empty_like(own_A) for _ in self._rows]
            dist.all_gather(received, own_A, group=self.shard.group)
            lse_A = torch.stack(received).logsumexp(0)
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


def spread_of(shard: str, weight: Tensor) -> Spread:
    """How a call of a head is spread.

    Args:
        shard: `LabelShard.encode`d; empty where this process has the head whole.
        weight: this process's rows of it.
    """
    return Sharded(LabelShard.decode(shard)) if shard else Whole(weight.shape[0])


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


class Agreement:
    """A header of each process to all: inside the block `tell` is called once, or it raises.

    Leaving the block is collective. Where one process's block raised, all others raise InputError.

    Args:
        device: whose tensors the group sends.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._mine = [1, 0, 0, 0]
        self._every: list[list[int]] = []

    def tell(self, *numbers: int, same: Any = None) -> None:
        """This process's header.

        Args:
            numbers: for `told`; two at most.
            same: what must have one `repr` in all processes.
        """
        self._mine = [0, zlib.crc32(repr(same).encode()), *numbers, 0, 0][:4]

    def told(self, position: int) -> list[int]:
        """A number of each process."""
        return [header[2 + position] for header in self._every]

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        mine = self._mine if error is None else [1, 0, 0, 0]
        self._every = exchange(mine, self._device, self._group)
        if error is not None:
            return
        wrong = [rank for rank, header in enumerate(self._every) if header[0]]
        if wrong:
            raise InputError(
                f"a call of a sharded head was refused in process {wrong[0]}, which says why; the "
                "others cannot go on without it. Nothing was updated"
            )
        if len({header[1] for header in self._every}) > 1:
            raise InputError(
                "a sharded head must be called with the same loss, form of targets and dtypes "
                "(features, targets, bias, autocast) in every process; they differ. Nothing was "
                "updated"
            )
