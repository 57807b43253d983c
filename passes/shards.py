"""Shards: heads whose outputs are spread over processes, as the other passes read heads.

Requires: a Dynamo graph (a copy: it is edited).
Ensures: where a `sharded_head` has weight and bias straight from the graph's inputs, and nothing
else reads these, it becomes `elmo::sharded_linear` of these inputs, which stand for DTensors as
plain tensors of the whole head's shape and are to be passed as this process's parts. Other calls
are left as they were.
Numerics: none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from elmo_compile import ops
from elmo_compile.ops.sharded_linear import sharded_head
from elmo_compile.ops.shards import LabelShard
from elmo_compile.passes.graphs import Site, is_checkpoint, sites, tensor_of

ops.load()


def is_sharded(node: fx.Node) -> bool:
    """Whether a node is the product of a sharded head."""
    return node.target in (torch.ops.elmo.sharded_linear.default, sharded_head)


def reads_dtensors(node: fx.Node) -> bool:
    """Whether `localize` left a sharded head's product as it was."""
    return node.target is sharded_head


def shard_of(node: fx.Node) -> LabelShard | None:
    """How the outputs of a product are spread; None where this process has them all."""
    return LabelShard.decode(str(node.args[-1])) if is_sharded(node) else None


def localize(module: fx.GraphModule) -> frozenset[int]:
    """Let sharded heads read the graph's inputs as plain tensors. Edits `module`.

    Returns:
        Positions of inputs to be passed as this process's part of a DTensor.
    """
    found = [(s, n) for s in sites(module) for n in s.graph.nodes if reads_dtensors(n)]
    left = set[fx.Node]()
    sources = {node: [_source(site, part) for part in _parts(node)] for site, node in found}
    for _, node in found:
        read = [source for source in sources[node] if source is not None]
        whole = len(read) == len(sources[node])
        if not whole or not all(map(_read_by_heads, [*read, *_parts(node)])):
            left.update(read)
    inputs = list(module.graph.find_nodes(op="placeholder"))
    positions = set[int]()
    for site, node in found:
        if None in sources[node] or left.intersection(sources[node]):
            continue
        positions.update(inputs.index(source) for source in sources[node])
        _read_inputs(site, node)
    return frozenset(positions)


def _parts(node: fx.Node) -> list[Any]:
    """Weight and, if there is one, bias of a `sharded_head`."""
    return [part for part in node.args[1:3] if part is not None]


def _source(site: Site, part: Any) -> fx.Node | None:
    """The top-level input that a node is, or None."""
    return site.outer(part) if part.op == "placeholder" else None


def _read_by_heads(part: fx.Node) -> bool:
    """Whether nothing but sharded heads reads an input. What a checkpoint's body does with it is
    looked at there."""
    return all(reads_dtensors(user) or is_checkpoint(user) for user in part.users)


def _read_inputs(site: Site, node: fx.Node) -> None:
    """Let one product be the op, of inputs that stand for whole tensors."""
    for part in _parts(node):
        _stand_in(site, part, node)
    x, weight, bias, shard = node.args
    node.args = (x, weight, bias, None, shard)
    node.target = torch.ops.elmo.sharded_linear.default


def _stand_in(site: Site, part: Any, product: fx.Node) -> None:
    """A plain fake tensor in the place of a fake DTensor."""
    fake: Any = tensor_of(product)
    mode = fake.fake_mode
    for node in {part, site.outer(part) or part}:
        sharded: Any = tensor_of(node)
        with torch.no_grad(), mode:
            plain = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
        node.meta["example_value"] = plain.requires_grad_(sharded.requires_grad)
