"""Regions that one op can stand for: nothing outside them is both made from them and read by them.

Requires: a graph in topological order.
Ensures: the graph is only read.
Numerics: none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch.fx as fx


def between(graph: fx.Graph, inside: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes outside a region on a way from it back into it, in graph order."""
    made: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node not in inside and any(a in made or a in inside for a in node.all_input_nodes):
            made[node] = None
    read: set[fx.Node] = set()
    for node in reversed(made):
        if any(user in inside or user in read for user in node.users):
            read.add(node)
    return [node for node in made if node in read]


def entangled(region: Collection[fx.Node], others: Iterable[Collection[fx.Node]]) -> bool:
    """Whether a region, and others that become one op each, need each other's results."""
    group = {node: other for other in others for node in other}
    if any(node in group for node in region):
        return True
    seen: set[fx.Node] = set()
    work = [user for node in region for user in node.users if user not in region]
    while work:
        node = work.pop()
        if node in region:
            return True
        if node not in seen:
            whole = group.get(node, (node,))
            seen.update(whole)
            work += [user for member in whole for user in member.users if user not in seen]
    return False
