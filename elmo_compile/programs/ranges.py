"""Ranges of outputs, `z[:, a:b]`, in the terms that a chunk knows: masks, and numbers of outputs.

What is written into a range is chosen by a mask where it is the same for each output of the range,
and else put by number. A range that is read is picked by number, if it is a small part of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from elmo_compile.programs.extent import is_tensor, shape_of

aten = torch.ops.aten

_PART = 8
"""A range of at most 1 / _PART of the outputs is read by number: it is held for all rows."""


def rewrite_ranges(graph: fx.Graph, num_outputs: int) -> None:
    """Rewrite slices and slice-scatters along the outputs, in place.

    Args:
        graph: functional; before autograd, which knows the gradients of what is written here.
        num_outputs: L: a dimension of this size is that of the outputs.
    """
    for node in list(graph.nodes):
        if node.target not in (aten.slice.Tensor, aten.slice_scatter.default):
            continue
        with graph.inserting_before(node):
            new = _rewritten(graph, node, num_outputs)
        if new is not None:
            if "val" not in new.meta:
                new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _rewritten(graph: fx.Graph, node: fx.Node, num_outputs: int) -> fx.Node | None:
    """What a slice or slice-scatter becomes; None if it stays."""
    writes = node.target is aten.slice_scatter.default
    source: Any = node.args[0]
    if not is_tensor(source):
        return None
    dim, *bounds = _range(node, writes)
    shape = shape_of(source)
    if shape[dim] != num_outputs or not all(isinstance(n, int | None) for n in bounds):
        return None
    numbers = range(num_outputs)[slice(*bounds)]
    writer = _Writer(graph, source, dim % len(shape), numbers)
    if writes and not numbers:
        return source  # type: ignore[no-any-return]
    if writes:
        what: Any = node.args[1]
        return what if len(numbers) == num_outputs else writer.write(what)
    small = 0 < _PART * len(numbers) <= num_outputs
    return writer.read() if small else None


def _range(node: fx.Node, writes: bool) -> list[Any]:
    """Dimension, start, stop and step of a slice or slice-scatter."""
    given = list(node.args[1 + writes :])
    usual = {"dim": 0, "start": None, "end": None, "step": 1}
    return given + [node.kwargs.get(n, value) for n, value in [*usual.items()][len(given) :]]


class _Writer:
    """Nodes for one range of the outputs of `source`, which are along `dim`."""

    def __init__(self, graph: fx.Graph, source: fx.Node, dim: int, numbers: range) -> None:
        self.graph, self.source, self.dim, self.numbers = graph, source, dim, numbers
        self.value = source.meta["val"]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def read(self) -> fx.Node:
        return self.call(aten.index.Tensor, self.source, self._indices())

    def write(self, what: fx.Node) -> fx.Node:
        same = self._same_for_all(what)
        if same is None:
            return self.call(aten.index_put.default, self.source, self._indices(), what)
        return self.call(aten.where.self, self._mask(), same, self.source)

    def _same_for_all(self, what: fx.Node) -> fx.Node | None:
        """What is written to each output of the range, if that is the same, to be broadcast."""
        args: Any = what.args
        if what.target is aten.full.default:
            kwargs = {"dtype": self.value.dtype, "device": self.value.device}
            return self.call(aten.full.default, [], args[1], **kwargs)
        if what.target is aten.expand.default and is_tensor(args[0]):
            behind = self.value.dim() - self.dim
            shape = shape_of(args[0])
            if len(shape) < behind or shape[len(shape) - behind] == 1:
                return args[0]  # type: ignore[no-any-return]
        return None

    def _indices(self) -> list[fx.Node | None]:
        numbers = self.numbers
        chosen = self.call(
            aten.arange.start_step, numbers.start, numbers.stop, numbers.step,
            dtype=torch.int64, device=self.value.device,
        )  # fmt: skip
        return [*[None] * self.dim, chosen]

    def _mask(self) -> fx.Node:
        """Which outputs are in the range: bool, to be broadcast with `source`."""
        numbers = self.numbers
        every = self.call(
            aten.arange.start_step, 0, self.value.shape[self.dim],
            dtype=torch.int64, device=self.value.device,
        )  # fmt: skip
        mask = self.call(aten.ge.Scalar, every, numbers.start)
        before = self.call(aten.lt.Scalar, every, numbers.stop)
        mask = self.call(aten.logical_and.default, mask, before)
        if numbers.step != 1:
            since = self.call(aten.sub.Tensor, every, numbers.start)
            steps = self.call(aten.remainder.Scalar, since, numbers.step)
            mask = self.call(aten.logical_and.default, mask, self.call(aten.eq.Scalar, steps, 0))
        behind = self.value.dim() - self.dim - 1
        return self.call(aten.reshape.default, mask, [-1, *[1] * behind]) if behind else mask
