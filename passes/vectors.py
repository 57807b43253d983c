"""Vectors: values with one element an output that are made beside the logits, computed before.

`h @ W.t() + side(item_features)`: what makes such a value may be anything, and no chunk of outputs
needs to know it. A region takes it in as it does targets; where that region is refused, it is
tried again with the vector as one of its inputs.

Requires: a region of a Dynamo graph.
Ensures: a region of some of the same nodes; the graph is only read.
Numerics: none.
"""

from __future__ import annotations

import math

import torch.fx as fx

from elmo_compile.passes.find import close, seed_outputs
from elmo_compile.passes.graphs import ancestors, hints, tensor_of
from elmo_compile.passes.records import Region
from elmo_compile.passes.writes import written_nodes


def without_vectors(region: Region) -> Region:
    """The region with vectors that are not made from logits as inputs; itself if it has none.

    Not those that are made from something as large as the logits, such as a row of labels: that
    would be made whole.
    """
    made = _from_products(region)
    written = {node for other in made for node in written_nodes(other)}
    inside, kept = set(region.nodes), set[fx.Node]()
    work = [node for node in region.nodes if node in made]
    while work:
        node = work.pop()
        kept.add(node)
        work += [arg for arg in node.all_input_nodes if arg in inside and arg not in kept
                 and (arg in made | written or not _is_vector(arg, region))]  # fmt: skip
        if not work:  # What writes into something that is kept.
            work = [
                other
                for other in region.nodes
                if other not in kept and not kept.isdisjoint(written_nodes(other))
            ]
    if kept == inside:
        return region
    return close(
        region.site, region.seed, kept, region.tail, region.num_outputs, region.autocast,
        region.grad_enabled,
    )  # fmt: skip


def _from_products(region: Region) -> set[fx.Node]:
    """The nodes of a region that are made from a head's product."""
    found = set[fx.Node]()
    for node in region.nodes:
        product = seed_outputs(node, region.num_outputs) == region.num_outputs
        product = node is region.seed or (product and _size(node) != region.num_outputs)
        if product or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_vector(node: fx.Node, region: Region) -> bool:
    """Whether a node has one element an output, and nothing that makes it in the region has rows
    of them."""
    L, inside = region.num_outputs, set(region.nodes)
    if _size(node) != L:
        return False
    return not any(
        hints(made.shape)[-1:] == (L,) and math.prod(hints(made.shape)) > L
        for other in ancestors(node) & inside
        if (made := tensor_of(other)) is not None
    )


def _size(node: fx.Node) -> int:
    tensor = tensor_of(node)
    return -1 if tensor is None else math.prod(hints(tensor.shape))
