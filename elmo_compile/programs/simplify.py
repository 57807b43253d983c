"""Rewrite a traced program so that its reductions over outputs need few walks.

- A sum of a linear expression is the expression of sums; a sum of what is spread or scattered is
  known without the outputs. Picking single outputs commutes with everything element by element.
- So `gather(z - lse, y)` becomes `gather(z, y) - lse`: both reductions are made in one walk.
- A reduction over rows and outputs becomes one over outputs, then one over rows.
- Equal computations are done once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx as fx

from elmo_compile.programs.extent import (
    COPIES,
    VIEWS,
    Extents,
    dims_of,
    is_pointwise,
    is_tensor,
    keeps_dims,
    shape_of,
)

aten = torch.ops.aten

_SPLITS = {
    aten.sum.dim_IntList: aten.sum.dim_IntList,
    aten.sum.default: aten.sum.dim_IntList,
    aten.amax.default: aten.amax.default,
    aten.amin.default: aten.amin.default,
    aten.logsumexp.default: aten.logsumexp.default,
}
_LINEAR = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.mul.Tensor,
                     aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})  # fmt: skip


def simplify(graph: fx.Graph, num_outputs: int, logits: list[fx.Node], mode: Any) -> Extents:
    """Rewrite `graph` in place; its extents afterwards."""
    with mode, torch.no_grad():
        _once(graph)
        writer = _Writer(graph, Extents(graph, num_outputs, logits))
        for node in list(graph.nodes):
            if node.op == "call_function" and writer.extents.reduces(node):
                with graph.inserting_before(node):
                    new = writer.split(node)
                    new = writer.reduced(new) if new is not None else writer.reduced(node)
                if new is not None:
                    node.replace_all_uses_with(new)
        graph.eliminate_dead_code()
        _once(graph)
    return Extents(graph, num_outputs, logits)


def _once(graph: fx.Graph) -> None:
    """Compute equal things once; leave out copies that change nothing."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in VIEWS:  # values have strides of their own where a program runs
            node.target = aten.reshape.default
        if node.target in (aten.alias.default, aten.detach.default, aten.clone.default) and (
            is_tensor(node.args[0])
        ):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        known = seen.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(_frozen(v) for v in value)
    return (type(value), value) if isinstance(value, int | float | bool) else value


class _Writer:
    """Makes nodes, with their fake values and extents."""

    def __init__(self, graph: fx.Graph, extents: Extents) -> None:
        self.graph, self.extents = graph, extents

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        tensors = [a for a in node.all_input_nodes if self.extents.huge(a)]
        self.extents.add(node, self.extents._call(node) if tensors else None)
        return node

    def split(self, node: fx.Node) -> fx.Node | None:
        """A reduction over outputs alone, kept as a dimension of 1, then over the rest."""
        target = _SPLITS.get(cast(Any, node.target))
        if target is None:
            return None
        source: Any = node.args[0]
        place = len(shape_of(source)) + self.extents.dim(source)
        dims, keep = dims_of(node), keeps_dims(node)
        if dims == (place,):
            return None
        dtype = {"dtype": node.kwargs["dtype"]} if node.kwargs.get("dtype") else {}
        first = self.reduced(self.call(target, source, [place], True, **dtype))
        assert first is not None
        return self.call(target, first, list(dims), keep, **dtype)

    def reduced(self, node: fx.Node) -> fx.Node | None:
        """A simpler equal of a sum or a pick over outputs; the node itself where there is none."""
        if not self.extents.reduces(node):
            return node
        if node.target is aten.sum.dim_IntList:
            source: Any = node.args[0]
            total = self.total(source, node.meta["val"].dtype)
            if total is None:
                return node
            if keeps_dims(node):
                return total
            place = len(shape_of(source)) + self.extents.dim(source)
            return self.call(aten.squeeze.dims, total, [place])
        if node.target is aten.gather.default:
            return self.gathered(node)
        if node.target is aten.index.Tensor:
            as_gather = self._rowwise(node)
            return node if as_gather is None else as_gather
        return node

    def total(self, node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
        """The sum of a huge value over outputs, kept as a 1, without a reduction of its own form.

        None where nothing is gained.
        """
        if node.meta["val"].dtype != dtype or not dtype.is_floating_point:
            return None
        args: Any = node.args
        ext = self.extents
        if node.target is aten.expand.default and not ext.huge(args[0]):
            small = shape_of(args[0])
            at = len(small) + ext.dim(node)
            if at < 0 or small[at] == 1:
                row = [1 if d == len(args[1]) + ext.dim(node) else s for d, s in enumerate(args[1])]
                return self.call(
                    aten.mul.Scalar, self.call(aten.expand.default, args[0], row), ext.L
                )
            return None
        if node.target is aten.full.default:
            place = len(args[0]) + ext.dim(node)
            row = [1 if d == place else s for d, s in enumerate(args[0])]
            return self.call(aten.full.default, row, args[1] * ext.L, **node.kwargs)
        if node.target is aten.scatter_add.default and self._is_zero(args[0]):
            place = len(shape_of(node)) + ext.dim(node)
            same = shape_of(args[2]) == shape_of(args[3]) and _rows(shape_of(args[2]), place) == (
                _rows(shape_of(node), place)
            )
            if args[1] % len(shape_of(node)) == place and same:
                return self.call(aten.sum.dim_IntList, args[3], [place], True)
            return None
        if node.target in COPIES:
            return self._linear(node)
        if node.target in _LINEAR and not node.kwargs:
            return self._linear(node)
        return None

    def _linear(self, node: fx.Node) -> fx.Node | None:
        """`total` of an element-wise linear operation: of one huge operand, or of a sum of them."""
        ext = self.extents
        args: list[Any] = list(node.args)
        huge = [i for i, a in enumerate(args) if ext.huge(a)]
        small = [a for a in args if is_tensor(a) and not ext.huge(a)]
        cut = [a for a in small if self._has_outputs(a, node)]
        dtype = node.meta["val"].dtype
        if node.target in COPIES:
            source: Any = args[0]
            if source.meta["val"].dtype != dtype:
                return None
            return self.total(source, dtype) or self._plain(source)
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            if not all(isinstance(a, fx.Node) for a in args) or cut:
                return None
            parts = [self._part(a, node) for a in args]
            return self.call(node.target, *parts)
        if len(huge) != 1 or cut or (node.target is aten.div.Tensor and huge != [0]):
            return None
        operand: Any = args[huge[0]]
        if operand.meta["val"].dtype != dtype:
            return None
        inner = self.total(operand, dtype) or self._plain(operand)
        args[huge[0]] = inner
        return self.call(node.target, *args)

    def _part(self, operand: fx.Node, like: fx.Node) -> fx.Node:
        """The sum over outputs of one operand of an addition."""
        if self.extents.huge(operand):
            return self.total(operand, like.meta["val"].dtype) or self._plain(operand)
        return self.call(aten.mul.Scalar, operand, self.extents.L)

    def _plain(self, source: fx.Node) -> fx.Node:
        place = len(shape_of(source)) + self.extents.dim(source)
        return self.call(aten.sum.dim_IntList, source, [place], True)

    def _has_outputs(self, small: fx.Node, like: fx.Node) -> bool:
        """Whether a small operand differs from output to output."""
        shape, dim = shape_of(small), self.extents.dim(like)
        return len(shape) + dim >= 0 and shape[dim] == self.extents.L

    def _is_zero(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and bool(
            (node.target is aten.full.default and node.args[1] == 0)
            or (node.target is aten.full_like.default and node.args[1] == 0)
        )

    def gathered(self, node: fx.Node) -> fx.Node:
        """gather(f(a, b), i) -> f(gather(a, i), gather(b, i)) for element-wise f."""
        source, dim, index = node.args[:3]
        pushed = self._pushed(source, dim, index)  # type: ignore[arg-type]
        return node if pushed is None else pushed

    def _pushed(self, source: fx.Node, dim: int, index: fx.Node) -> fx.Node | None:
        shape, ext = shape_of(source), self.extents
        place = len(shape) + ext.dim(source)
        if _rows(shape, place) != _rows(shape_of(index), place):
            return None
        if source.target is aten.expand.default and not ext.huge(source.args[0]):
            small: Any = source.args[0]
            if not self._has_outputs(small, source):
                dtype = small.meta["val"].dtype
                zeros = self.call(aten.zeros_like.default, index, dtype=dtype)
                return self.call(aten.add.Tensor, small, zeros)
            return None
        if not is_pointwise(source):
            return None
        args: list[Any] = []
        for a in source.args:
            if not is_tensor(a):
                args.append(a)
            elif ext.huge(a):
                if len(shape_of(a)) != len(shape) or shape_of(a) != shape:
                    return None
                inner = self._pushed(a, dim, index)  # type: ignore[arg-type]
                args.append(inner or self.call(aten.gather.default, a, dim, index))
            elif self._has_outputs(a, source):  # type: ignore[arg-type]
                if torch.Size(shape_of(a)).numel() != ext.L:
                    return None
                flat = self.call(aten.reshape.default, a, [ext.L])
                args.append(self.call(aten.index.Tensor, flat, [index]))
            else:
                args.append(a)
        return self.call(source.target, *args, **source.kwargs)

    def _rowwise(self, node: fx.Node) -> fx.Node | None:
        """z[arange(N), y] -> gather(z, 1, y[:, None])[:, 0]."""
        args: Any = node.args
        source, indices = args[:2]
        shape = shape_of(source)
        if len(shape) != 2 or len(indices) != 2 or self.extents.dim(source) != -1:
            return None
        rows, columns = indices
        if rows is None or columns is None or shape_of(columns) != (shape[0],):
            return None
        if rows.target is not aten.arange.start_step or rows.args[0] != 0:
            return None
        if shape_of(rows) != (shape[0],) or (len(rows.args) > 2 and rows.args[2] != 1):
            return None
        column = self.call(aten.unsqueeze.default, columns, 1)
        wrapped = self.call(aten.lt.Scalar, column, 0)
        shifted = self.call(aten.add.Tensor, column, self.extents.L)
        positive = self.call(aten.where.self, wrapped, shifted, column)
        picked = self.call(aten.gather.default, source, 1, positive)
        return self.call(aten.squeeze.dims, self.gathered(picked), [1])


def _rows(shape: tuple[int, ...], place: int) -> tuple[int, ...]:
    return shape[:place] + shape[place + 1 :]
