"""What the rewrite moves: past a write in place, or out of an autocast context.

One op stands for a region, where its last result was. So everything the region reads is read
there, and what reads an earlier result is put off until behind it.

Requires: a region of a Dynamo graph whose nodes carry fake values.
Ensures: a NoMatch that names the first node in the way, or None. The graph is only read.
Numerics: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.fx as fx

from elmo_compile.passes.find import seed_outputs
from elmo_compile.passes.graphs import ancestors
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.modes import ambient_autocast, autocast_states
from elmo_compile.passes.records import Region
from elmo_compile.passes.writes import Memory, written_nodes
from elmo_compile.report.records import Code


def check_order(region: Region, min_outputs: int) -> NoMatch | None:
    """The first thing that stands in the way of what the rewrite of a region moves, or None.

    Args:
        min_outputs: outputs of a product that is a head: what another head makes may be computed
            later than the graph says.
    """
    inside, results = set(region.nodes), set(region.outputs)
    memory = Memory(region.site.graph)
    put_off: dict[fx.Node, None] = {}
    touched: set[Any] = set()  # by the region, and by what is put off
    written_late: dict[Any, fx.Node] = {}
    writes: list[fx.Node] = []
    for node in _from_first_to_last(region):
        into, read = memory.of(written_nodes(node)), memory.of(node.all_input_nodes)
        if node in inside:
            late = False
            touched |= memory.of(arg for arg in node.all_input_nodes if arg not in inside)
        else:
            late = any(arg in put_off or arg in results for arg in node.all_input_nodes)
            writes += [node] if into else []
            if into & touched and not late:
                return _moved(node)
        if late:
            put_off[node] = None
            touched |= read | into
            written_late.update(dict.fromkeys(into, node))
        elif moved := [written_late[place] for place in read if place in written_late]:
            return _moved(moved[0])
    # Results that are views of each other are tensors of their own behind the rewrite.
    held = [place for result in results for place in memory.of([result])]
    twice = [node for place, node in written_late.items() if held.count(place) > 1]
    if twice:
        return _moved(twice[0])
    states = autocast_states(region.site.graph, ambient_autocast())
    for node in put_off:
        if states[node] != states[region.outputs[-1]]:
            return _other_autocast(node)
    if writes and _of_another_head(region, put_off, min_outputs):
        return _moved(writes[0])
    return None


def _of_another_head(region: Region, put_off: Iterable[fx.Node], min_outputs: int) -> bool:
    """Whether what is put off may be computed by the op of another head, which reads at its own
    place what that head's nodes read at theirs."""
    before = ancestors(*put_off).difference(region.nodes)
    return any(seed_outputs(node, min_outputs) is not None for node in before)


def _moved(node: fx.Node) -> NoMatch:
    return NoMatch(
        Code.MUTATION, node,
        "this writes in place, between the head's product and its loss, into memory that the head "
        "or what follows from it may read",
        "write before the head or after the loss, or out of place",
    )  # fmt: skip


def _other_autocast(node: fx.Node) -> NoMatch:
    return NoMatch(
        Code.UNKNOWN_LOSS, node,
        "this is computed from one result of the logits in another autocast mode, before the last "
        "of them is made",
        "compute it after the loss",
    )  # fmt: skip


def _from_first_to_last(region: Region) -> Iterator[fx.Node]:
    """Nodes of the graph from the region's first to its last."""
    node = region.nodes[0]
    while node is not region.nodes[-1]:
        yield node
        node = node.next
    yield node
