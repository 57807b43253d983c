"""Which values of a program are huge, and along which dimension: where chunks of outputs are cut.

A value is huge if it is made from logits and keeps their outputs, or if it is as large as they are.
Everything else is small: it is computed whole, and cut where a huge value meets it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from elmo_compile.ops import cut, linear, multi_hot, rounded  # noqa: F401  (their ops are named below)
from elmo_compile.programs.record import Unsupported

aten = torch.ops.aten

SOURCES = frozenset(
    {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format,
     aten.empty_permuted.default, aten.new_zeros.default, aten.new_full.default,
     aten.new_ones.default, torch.ops.elmo.multi_hot.default}
)  # fmt: skip
"""Huge values made from nothing, or from labels."""
LIKE = frozenset({aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
                  aten.empty_like.default})  # fmt: skip
COPIES = frozenset(
    {aten.alias.default, aten.clone.default, aten.detach.default, torch.ops.elmo.cut.default,
     aten._to_copy.default, aten.lift_fresh_copy.default, aten.contiguous.default,
     torch.ops.elmo.rounded.default, torch.ops.prims.convert_element_type.default}
)  # fmt: skip
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
REDUCTIONS = frozenset(
    {aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim, aten.any.dims,
     aten.any.default, aten.all.dim, aten.all.default, aten.logsumexp.default, aten.argmax.default,
     aten.argmin.default, aten.max.dim, aten.min.dim, aten.topk.default, aten.sum.default}
)  # fmt: skip
PICKS = frozenset({aten.gather.default, aten.index.Tensor})
SCATTERS = frozenset(
    {aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_put.default}
)


def size(value: Any) -> int:
    """A size as the number it was traced with."""
    if isinstance(value, int):
        return value
    found = getattr(getattr(value, "node", None), "hint", None)
    return -1 if found is None else int(found)


def shape_of(node: Any) -> tuple[int, ...]:
    """Sizes of a node's tensor as numbers."""
    return tuple(size(s) for s in node.meta["val"].shape)


def is_tensor(node: Any) -> bool:
    """Whether a node stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes element by element, with broadcasting."""
    return node.target in COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def dims_of(node: fx.Node) -> tuple[int, ...]:
    """The dimensions a reduction is over, counted from 0."""
    rank = len(shape_of(node.args[0]))
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if node.target is aten.topk.default:
        given = node.args[2] if len(node.args) > 2 else -1
    if given is None or given == [] or given == ():
        return tuple(range(rank))
    return tuple(d % rank for d in ([given] if isinstance(given, int) else given)) if rank else ()


def keeps_dims(node: fx.Node) -> bool:
    """Whether a reduction keeps its dimensions as ones."""
    if node.target is aten.topk.default:
        return True
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


class Extents:
    """For each node of a graph its dimension of outputs, from the end; None if it is small."""

    def __init__(self, graph: fx.Graph, num_outputs: int, logits: Iterable[fx.Node]) -> None:
        self.L = num_outputs
        self.of: dict[fx.Node, int | None] = {}
        """Of tensors; a reduction over the outputs counts as small."""
        logits = set(logits)
        self._inputs = {n for n in graph.nodes if n.op == "placeholder" and n not in logits}
        for node in graph.nodes:
            if node in logits:
                if self.L in shape_of(node)[:-1]:
                    raise Unsupported(
                        node, "the logits have as many rows as outputs", "use another batch size"
                    )
                self.of[node] = -1
            elif node.op == "placeholder":
                self.of[node] = self._source(node)
            elif node.op == "get_attr":
                self.of[node] = None
            elif node.op == "call_function":
                self.of[node] = self._call(node)

    def add(self, node: fx.Node, dim: int | None) -> fx.Node:
        """Record a node made later."""
        self.of[node] = dim
        return node

    def huge(self, node: Any) -> bool:
        """Whether a node is cut into chunks."""
        return isinstance(node, fx.Node) and self.of.get(node) is not None

    def dim(self, node: fx.Node) -> int:
        """The dimension of outputs of a huge node, from the end."""
        found = self.of[node]
        assert found is not None
        return found

    def reduces(self, node: fx.Node) -> bool:
        """Whether a node is a reduction of a huge value over its outputs."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or self.of.get(source) is None:
            return False
        if node.target in REDUCTIONS:
            return len(shape_of(source)) + self.dim(source) in dims_of(node)
        return node.target in PICKS and self._picks(node)

    def _source(self, node: fx.Node) -> int | None:
        if not is_tensor(node):
            return None
        shape = shape_of(node)
        if shape.count(self.L) > 1 and math.prod(shape) > 4 * self.L:
            raise Unsupported(node, "a value has the outputs in two dimensions", "reshape it")
        if self.L not in shape or math.prod(shape) < 2 * self.L:
            return None
        return shape.index(self.L) - len(shape)

    def _call(self, node: fx.Node) -> int | None:
        tensors = [a for a in node.all_input_nodes if self.of.get(a) is not None]
        source = node.args[0] if node.args else None
        if node.target is operator.getitem:  # A part of what is made by a maximum over rows.
            return self.of.get(source) if isinstance(source, fx.Node) else None
        if node.target is aten.sym_size.int and source in self._inputs:
            return None
        if not tensors:
            return self._fresh(node)
        if self.reduces(node):
            shape = shape_of(node) if is_tensor(node) else ()
            if self.L in shape and math.prod(shape) >= 2 * self.L:
                raise Unsupported(
                    node, f"{node.target} rearranges the outputs of a row",
                    "rearrange the weight's rows, or the targets",
                )  # fmt: skip
            return None
        rule = self._rule(node)
        if rule is None:
            raise Unsupported(
                node,
                f"{node.target} mixes the outputs of a row in a way that cannot be done in chunks",
                "reduce the logits first, or leave the head to Inductor with min_outputs",
            )
        return rule

    def _fresh(self, node: fx.Node) -> int | None:
        """A value made from small ones: huge if it is as large as the logits."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unsupported(
                node, "random numbers are drawn between the head and its loss",
                "draw them before the head",
            )  # fmt: skip
        if not is_tensor(node):
            return None
        dim = self._source(node)
        known = (
            is_pointwise(node)
            or node.target in SOURCES | LIKE | SCATTERS
            or node.target in (aten.expand.default, aten.unsqueeze.default)
        )
        if dim is not None and not known:
            raise Unsupported(
                node, f"{node.target} makes a value as large as the logits", "make it smaller"
            )
        return dim

    def _rule(self, node: fx.Node) -> int | None:
        """Where the outputs are in a value made from huge ones; None if that is not known."""
        out = shape_of(node) if is_tensor(node) else ()
        args: Any = node.args
        source = args[0]
        if is_pointwise(node) or node.target in LIKE:
            return self._pointwise(node, out)
        if node.target is aten.cat.default:
            return self._cat(node)
        if not self.huge(source):
            return None
        dim, rank = self.dim(source), len(shape_of(source))
        place = rank + dim
        if node.target in VIEWS:
            return self._view(shape_of(source), place, out)
        if node.target in REDUCTIONS:
            removed = 0 if keeps_dims(node) else sum(d > place for d in dims_of(node))
            return dim + removed
        if node.target is aten.expand.default:
            return dim
        if node.target is aten.permute.default:
            order = [d % rank for d in args[1]]
            return order.index(place) - rank
        if node.target in (aten.t.default, aten.transpose.int):
            a, b = (0, rank - 1) if node.target is aten.t.default else (
                d % rank for d in args[1:3]
            )  # fmt: skip
            return int({a: b, b: a}.get(place, place)) - rank
        if node.target is aten.unsqueeze.default:
            at = args[1] % (rank + 1)
            return int(dim - (at > place))
        if node.target in (aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default):
            return self._view(shape_of(source), place, out)
        if node.target in (aten.slice.Tensor, aten.index_select.default, aten.slice_scatter.default,
                           aten.select.int, aten.select_scatter.default):  # fmt: skip
            at = (
                2 if node.target in (aten.slice_scatter.default, aten.select_scatter.default) else 1
            )
            along = (args[at] if len(args) > at else 0) % rank
            if along == place and node.target is aten.slice.Tensor and out != shape_of(source):
                raise Unsupported(
                    node, "some outputs of each row are cut off behind the product",
                    "slice the weight instead: F.linear(x, w[a:b], b[a:b])",
                )  # fmt: skip
            if along == place and node.target is aten.slice_scatter.default:
                raise Unsupported(
                    node, "some outputs of each row are overwritten by their place",
                    "use masked_fill or torch.where, with a mask of the outputs",
                )  # fmt: skip
            if along == place:
                return dim if node.target is aten.slice.Tensor else None
            return dim + (node.target is aten.select.int and along > place)
        if node.target is aten.index.Tensor:
            return self._index(node, dim, rank)
        if node.target in SCATTERS:
            return dim if self._can_put(node, place) else None
        return None

    def _pointwise(self, node: fx.Node, out: tuple[int, ...]) -> int | None:
        dims = {self.dim(a) for a in node.all_input_nodes if self.huge(a)}
        if len(dims) != 1:
            return None
        (dim,) = dims
        if len(out) + dim < 0 or out[dim] != self.L:
            return None
        return dim

    def _cat(self, node: fx.Node) -> int | None:
        parts: Any = node.args[0]
        dims = {self.of.get(part) for part in parts}
        along = node.args[1] if len(node.args) > 1 else 0
        if len(dims) != 1 or None in dims:
            return None
        (dim,) = dims
        rank = len(shape_of(parts[0]))
        return None if along % rank == rank + dim else dim  # type: ignore[operator]

    def _view(self, before: tuple[int, ...], place: int, after: tuple[int, ...]) -> int | None:
        behind = math.prod(before[place + 1 :])
        for at, length in enumerate(after):
            if length == self.L and math.prod(after[at + 1 :]) == behind:
                return at - len(after)
        return None

    def _index(self, node: fx.Node, dim: int, rank: int) -> int | None:
        """Indexing rows by one tensor (a boolean mask fails the trace by its unknown size)."""
        indices: Any = node.args[1]
        given = [i for i, index in enumerate(indices) if index is not None]
        if len(given) != 1 or given[0] >= rank + dim or any(self.huge(indices[i]) for i in given):
            return None
        return None if _masks(node) else dim

    def _can_put(self, node: fx.Node, place: int) -> bool:
        """Whether a scatter names its outputs by number; rows may be named by a mask."""
        if node.target is not aten.index_put.default or not _masks(node):
            return True
        indices: Any = node.args[1]
        given = [i for i, index in enumerate(indices) if index is not None]
        return len(given) == 1 and given[0] < place and len(shape_of(indices[given[0]])) == 1

    def _picks(self, node: fx.Node) -> bool:
        """Whether an indexing takes single outputs."""
        args: Any = node.args
        source = args[0]
        place = len(shape_of(source)) + self.dim(source)
        if node.target is aten.gather.default:
            return bool(args[1] % len(shape_of(source)) == place) and not self.huge(args[2])
        indices = args[1]
        given = [i for i, index in enumerate(indices) if index is not None]
        return place in given and not any(self.huge(indices[i]) for i in given) and not _masks(node)


def _masks(node: fx.Node) -> bool:
    """Whether an index is a mask: no numbers, and of unknown length."""
    indices: Any = node.args[1]
    return any(i is not None and i.meta["val"].dtype in _MASKS for i in indices)


_MASKS = (torch.bool, torch.uint8)
