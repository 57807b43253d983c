"""What a program is once it is scheduled, and the registry that ops find it in.

A program travels through a graph as its key, a digest of its text; the pass that made it registers
it in the process, every time the graph is compiled, so that compiled artefacts on disk may name it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch.fx as fx

Combine = Literal[
    "sum", "max", "min", "any", "all", "logsumexp", "argmax", "argmin", "topk", "slice"
]
"""How a walk's partial results become one: `slice` writes a chunk's piece of an [.., L] result."""


class Unsupported(Exception):
    """Raised while a program is made: which node stands in the way, why, and what to do."""

    def __init__(self, node: fx.Node | None, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.node, self.reason, self.remedy = node, reason, remedy


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One value a walk produces."""

    name: str
    """Of the node it is the value of."""
    combine: Combine
    parts: int
    """How many of the chunk graph's outputs belong to it."""
    dim: int
    """Of the outputs in the chunk's value (of `slice`) or in the reduced one, from the end."""
    meta: Any
    """Fake value of the node: dtype, and shape where it is static."""
    largest: bool = True
    k: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """One pass over all chunks of outputs."""

    graph: fx.GraphModule
    """(z chunks of the products it needs, start, *arguments) -> parts of each result, and the
    gradients of the logits where it is the last walk of a backward."""
    products: tuple[int, ...]
    """Which products' logits the chunk graph takes."""
    arguments: tuple[tuple[str, int | None], ...]
    """Values it reads: name, and the dimension (from the end) along which a chunk of it is cut."""
    results: tuple[Result, ...]
    gradients: tuple[int, ...] = ()
    """The products whose logits' gradients are the chunk graph's last outputs."""
    numbers: tuple[tuple[str, int], ...] = ()
    """Values that number outputs, and the lowest number allowed: checked before the walk."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Alternating small computations and walks."""

    inputs: tuple[str, ...]
    """Names of the values it is given, in order."""
    steps: tuple[Walk | tuple[fx.Node, ...], ...]
    """Walks, and between them nodes over whole (not huge) values, in order."""
    outputs: tuple[str | None, ...]
    """Names of what it returns; None for a gradient that is zero."""

    @property
    def walks(self) -> tuple[Walk, ...]:
        """The passes over the outputs."""
        return tuple(step for step in self.steps if isinstance(step, Walk))

    @property
    def products(self) -> int:
        """How many logits' products its walks compute."""
        return sum(len(walk.products) for walk in self.walks)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A loss (and whatever else is computed from logits), with its gradient."""

    key: str
    name: str
    """The loss, as a report names it."""
    num_outputs: int
    forward: Schedule
    """(inputs) -> outputs, then the values saved for the backward."""
    num_results: int
    """How many of the forward's outputs are the program's own."""
    differentiable: tuple[int, ...]
    """The results that take an upstream gradient."""
    backward: Schedule | None
    """(inputs, saved, upstream gradients) -> gradients of `wanted`; None without autograd."""
    wanted: tuple[int, ...]
    """Inputs that get a gradient."""
    trained: tuple[int, ...]
    """Products whose logits get a gradient."""
    shapes: fx.GraphModule
    """(logits, inputs) -> results and saved values, for shapes under fake tensors."""
    live: int
    """Chunk-sized values alive at once where chunk graphs run eagerly, at most."""
    tensors: tuple[int, ...]
    """Positions of the inputs that ops are given as tensors (those that anything reads)."""
    sizes: tuple[int, ...]
    """Positions of the inputs that ops are given as sizes."""
    count: int
    """Inputs in all; the others are not read."""

    @property
    def outline(self) -> tuple[Any, ...]:
        """The loss and what each walk multiplies and forms: programs of several processes take
        part in one another's walks, if this is the same in all."""
        schedules = (self.forward, self.backward)
        walks = [
            [(walk.products, walk.gradients) for walk in schedule.walks]
            for schedule in schedules
            if schedule is not None
        ]
        return self.name, walks

    def arguments(self, tensors: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """The program's inputs from what an op was given."""
        made: list[Any] = [None] * self.count
        for position, value in (*zip(self.tensors, tensors), *zip(self.sizes, sizes)):
            made[position] = value
        return made

    def wanted_of(self, tensors: Sequence[Any]) -> list[Any]:
        """The tensors among an op's inputs that get a gradient."""
        return [tensors[self.tensors.index(position)] for position in self.wanted]

    def spread(self, grads: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
        """Gradients for all of an op's tensor inputs; None for those that get none."""
        made: list[Any] = [None] * len(self.tensors)
        for position, grad in zip(self.wanted, grads):
            at = self.tensors.index(position)
            made[at] = grad if needed[at] else None
        return made


_programs: dict[str, Program] = {}


def register(program: Program) -> None:
    """Make a program known in this process."""
    _programs[program.key] = program


def find(key: str) -> Program:
    """The program of a key. Raises KeyError if no pass in this process has made it."""
    return _programs[key]
