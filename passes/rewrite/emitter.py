"""Writing the nodes that stand for a region into the copied graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import tensor_of
from elmo_compile.passes.records import PlannedHead, RowOp

aten = torch.ops.aten


class Emitter:
    """Writes nodes into the copied graph, in front of the region's output."""

    def __init__(self, head: PlannedHead, mapping: dict[fx.Node, fx.Node], output: fx.Node) -> None:
        self.head = head
        self.match: Any = head.match
        self.graph = output.graph
        self.mapping = mapping
        self.meta = {"stack_trace": head.match.region.seed.meta.get("stack_trace")}
        self.copied: dict[fx.Node, fx.Node] = {}

    def call(self, op: Any, *args: Any) -> fx.Node:
        """A call of an op, with the user's line of the head."""
        node = self.graph.call_function(op, args)
        node.meta.update({key: value for key, value in self.meta.items() if value})
        return node

    def node(self, aten_node: fx.Node) -> fx.Node:
        """A node of the retraced graph in the copied graph: an input, or its small computation."""
        if aten_node.op == "placeholder":
            return self.mapping[self.match.aten.origin(aten_node)]
        if aten_node not in self.copied:
            self.copied[aten_node] = self.graph.node_copy(aten_node, self.node)
            self.copied[aten_node].meta = dict(self.meta)
        return self.copied[aten_node]

    def row_ops(self, node: fx.Node, ops: tuple[RowOp, ...]) -> fx.Node:
        """Operations on rows, in order."""
        for op in ops:
            node = self.call(op.op, node, *fx.map_arg(op.args, self.node))
        return node

    def targets(self) -> tuple[fx.Node, fx.Node | None]:
        """The target and its companion, as the op takes them."""
        match = self.match
        target = self.node(match.target)
        aux = None if match.target_aux is None else self.node(match.target_aux)
        if match.loss.targets == "pairs":
            assert aux is not None
            both = self.call(torch.broadcast_tensors, target, aux)
            target, aux = (
                self.call(aten.reshape.default, self.call(operator.getitem, both, i), [-1])
                for i in (0, 1)
            )
            return target, aux
        return self.row_ops(target, match.target_ops), aux

    def divisor(self, flat: fx.Node) -> Any:
        """The product of everything the loss is divided by: an int, or a symbolic node."""
        known, result = 1, None
        for item in self.match.divisors:
            if isinstance(item, int):
                known *= item
                continue
            node = self._rows(flat) if isinstance(item, str) else self.node(item)
            if isinstance(node, int):
                known *= node
            else:
                result = node if result is None else self.call(operator.mul, result, node)
        if result is None:
            return known
        return result if known == 1 else self.call(operator.mul, result, known)

    def _rows(self, flat: fx.Node) -> Any:
        rows = self.match.rows
        return rows if isinstance(rows, int) else self.call(aten.sym_size.int, flat, 0)

    def finish(self, loss: fx.Node, x: fx.Node) -> fx.Node:
        """The op's loss in the shape and dtype of the program's."""
        out = tensor_of(self.match.region.outputs[0])
        assert out is not None
        wide = torch.float64 if self.head.compute_dtype == torch.float64 else torch.float32
        if self.match.loss.reduction == "none" and out.ndim != 1:
            shape = [
                size if isinstance(size, int) else self.call(aten.sym_size.int, x, dim)
                for dim, size in enumerate(out.shape)
            ]
            loss = self.call(aten.reshape.default, loss, shape)
        return loss if out.dtype == wide else self.call(aten.to.dtype, loss, out.dtype)
