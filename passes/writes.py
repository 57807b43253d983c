"""Writes in place, and what tells the memories of a graph's tensors apart.

Requires: a Dynamo graph whose nodes carry fake values.
Ensures: the graph is only read.
Numerics: none.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import tensor_of, value_of

_IN_PLACE_OPERATORS = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
     operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
     operator.imatmul, operator.ilshift, operator.irshift}
)  # fmt: skip


class Memory:
    """What tells the memories of a graph's tensors apart.

    Inputs of a graph count as one: two of them may share memory without the graph showing it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._inputs = {
            _storage(tensor)
            for node in graph.find_nodes(op="placeholder")
            if (tensor := tensor_of(node)) is not None and tensor.ndim > 0
        } - {None}

    def of(self, nodes: Iterable[fx.Node]) -> set[Any]:
        """The memories of all tensors of these nodes; None is one that cannot be told."""
        found = {_storage(tensor) for node in nodes for tensor in _tensors(value_of(node))}
        return {"inputs" if place in self._inputs else place for place in found}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def shares_memory(node: fx.Node, others: Iterable[fx.Node]) -> bool:
    """Whether a node's tensor lies in the memory of one of the others."""
    memory = _storage(tensor_of(node))
    return memory is not None and any(_storage(tensor_of(other)) == memory for other in others)


def written_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose tensors a call writes into."""
    if node.op not in ("call_function", "call_method"):
        return
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(value)
    elif (
        node.target in _IN_PLACE_OPERATORS
        or (name.endswith("_") and not name.endswith("__"))
        or _asked_in_place(node)
    ):
        yield from _nodes(node.args[:1] or tuple(node.kwargs.values())[:1])
    yield from _nodes(node.kwargs.get("out"))


def _asked_in_place(node: fx.Node) -> bool:
    """`F.relu(x, inplace=True)` and its like."""
    if node.kwargs.get("inplace"):
        return True
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    return "inplace" in names and node.args[names.index("inplace") :][:1] == (True,)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _storage(tensor: torch.Tensor | None) -> int | None:
    """What tells two fake tensors' memories apart; None where that cannot be asked."""
    if tensor is None:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None
