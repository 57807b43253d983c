"""Adding and removing graph inputs, through every checkpointed body on the way to a head."""

from __future__ import annotations

import torch.fx as fx

from elmo_compile.passes.graphs import body_of


class Inputs:
    """The inputs of one copied graph: each weight's extra inputs exist once, whoever asks."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.added: dict[tuple[str, int], fx.Node] = {}
        """(kind, weight input) -> placeholder at the top level, in order of creation."""
        self._inside: dict[tuple[fx.Graph, fx.Node], fx.Node] = {}

    def extra(self, kind: str, weight_input: int, path: tuple[fx.Node, ...]) -> fx.Node:
        """The extra input as seen from the graph at the end of `path`."""
        key = (kind, weight_input)
        if key not in self.added:
            name = f"elmo_{kind}_{weight_input}"
            self.added[key] = append_placeholder(self.module.graph, name)
        node = self.added[key]
        for call in path:
            node = self._through(call, node)
        return node

    def _through(self, call: fx.Node, outer: fx.Node) -> fx.Node:
        body = body_of(call)
        assert body is not None
        key = (body.graph, outer)
        if key not in self._inside:
            self._inside[key] = append_placeholder(body.graph, outer.name)
            call.args = (*call.args, outer)
        return self._inside[key]


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new input after the existing ones."""
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def remove_input(placeholder: fx.Node, path: tuple[fx.Node, ...]) -> None:
    """Erase an input nobody reads any more, and the arguments that carried it in."""
    node = placeholder
    for call in reversed(path):
        position = list(node.graph.find_nodes(op="placeholder")).index(node)
        outer = call.args[1 + position]
        assert isinstance(outer, fx.Node)
        node.graph.erase_node(node)
        call.args = (*call.args[: 1 + position], *call.args[2 + position :])
        node = outer
    node.graph.erase_node(node)
