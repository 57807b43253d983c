"""Which outputs of a head are whose, and how processes agree to go on.

A header of fixed length goes first in everything that the processes of a sharded head do together,
so that one whose input is refused does not leave the others waiting: all raise, or none does. For
it a GPU is waited for.

Shapes: N rows of this process, A of all, L outputs of the head, R of this process, W processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import ElmoError, InputError
from elmo_compile.ops.collectives import exchange, sum_over, swap
from elmo_compile.ops.dtensors import process_group_of

_groups: dict[str, Any] = {}


def note_group(param: Tensor) -> None:
    """Make the process group of a DTensor known by its name, as graphs name it."""
    _groups[process_group_of(param).group_name] = process_group_of(param)


@dataclasses.dataclass(frozen=True)
class LabelShard:
    """L outputs over the processes of a group, as `Shard(0)` places them."""

    group: Any
    num_outputs: int

    @classmethod
    def of(cls, weight: Any) -> LabelShard:
        """How the rows of a DTensor weight lie."""
        return cls(process_group_of(weight), weight.shape[0])

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
        return sum_over(t, self.group)


FAILED = (1, 0, 0, 0)
"""The header of a process that does not go on."""


class Agreement:
    """A header of each process to all: inside the block `tell` is called once, or it raises.

    Leaving the block is collective. Where one process's block raised, all others raise.

    Args:
        device: whose tensors the group sends.
        what: the processes do together, for messages.
        must: be the same in all of them, for messages.
        error: what the others raise.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        what: str = "a call of a sharded head",
        must: str = "the loss, the form of targets, dtypes (features, targets, bias, autocast) and "
        "what a gradient is asked of",
        error: type[ElmoError] = InputError,
    ) -> None:
        self._group, self._device = group, device
        self._what, self._must, self._error = what, must, error
        self._mine = list(FAILED)
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
        if error is None:
            self.close()
        else:
            exchange(FAILED, self._device, self._group)

    def close(self) -> None:
        """Exchange the headers. Raises `error`."""
        self._every = exchange(self._mine, self._device, self._group)
        wrong = [rank for rank, header in enumerate(self._every) if header[0]]
        if wrong:
            raise self._error(
                f"{self._what} was refused in process {wrong[0]}, which says why; the others "
                "cannot go on without it. Nothing was modified"
            )
        if len({header[1] for header in self._every}) > 1:
            raise self._error(
                f"{self._what}: {self._must} must be the same in every process, and they differ. "
                "Nothing was modified"
            )


@contextlib.contextmanager
def telling(shard: str, device: torch.device) -> Iterator[None]:
    """Around what may raise in this process alone, before a call of a sharded head: then the others
    raise where they tell each other of the call. Nothing without `shard` (as for `spread_of`)."""
    try:
        yield
    except Exception:
        if shard:
            exchange(FAILED, device, LabelShard.decode(shard).group)
        raise
