"""Shards: heads whose outputs are spread over processes, as the other passes read heads.

Requires: a Dynamo graph (a copy: it is edited).
Ensures: where a `sharded_linear` has its weight and bias straight from the graph's inputs, it reads
these inputs, which stand for DTensors as plain tensors of the whole head's shape; they are to be
passed as this process's parts. What reads a DTensor otherwise leaves its head as it was.
Numerics: none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from elmo_compile.ops.shards import LabelShard, local_part
from elmo_compile.passes.graphs import Site, is_checkpoint, sites, tensor_of


def is_sharded_linear(node: fx.Node) -> bool:
    """Whether a node is the product of a sharded head."""
    return node.target is torch.ops.elmo.sharded_linear.default


def shard_of(node: fx.Node) -> LabelShard | None:
    """How the outputs of a product are spread; None where this process has them all."""
    return LabelShard.decode(str(node.args[4])) if is_sharded_linear(node) else None


def localize(module: fx.GraphModule) -> frozenset[int]:
    """Let sharded heads read the graph's inputs. Edits `module`.

    Returns:
        Positions of inputs to be passed as this process's part of a DTensor.
    """
    found = [(s, n) for s in sites(module) for n in s.graph.nodes if is_sharded_linear(n)]
    if not found:
        return frozenset()
    left = set[fx.Node]()
    outer = {node: [_source(site, arg) for arg in node.args[1:3] if arg] for site, node in found}
    for _, node in found:
        parts = [part.args[0] for part in node.args[1:3] if part and part.target is local_part]
        if None in outer[node] or not all(map(_read_by_heads, [*outer[node], *parts])):
            left.update(source for source in outer[node] if source is not None)
    inputs = list(module.graph.find_nodes(op="placeholder"))
    positions = set[int]()
    for site, node in found:
        if None in outer[node] or left.intersection(outer[node]):
            continue
        positions.update(inputs.index(source) for source in outer[node])
        _read_inputs(site, node)
    for site in sites(module):
        site.module.recompile()
    return frozenset(positions)


def reads_dtensors(node: fx.Node) -> bool:
    """Whether `localize` left a sharded head's product as it was."""
    return is_sharded_linear(node) and getattr(node.args[1], "target", None) is local_part


def _source(site: Site, part: Any) -> fx.Node | None:
    """The top-level input whose local part a node is, or None."""
    whole = part.args[0] if part.target is local_part else None
    if not isinstance(whole, fx.Node) or whole.op != "placeholder":
        return None
    return site.outer(whole)


def _read_by_heads(whole: Any) -> bool:
    """Whether nothing but products of sharded heads reads a DTensor input, bodies included."""
    for user in whole.users:
        if is_checkpoint(user):
            continue  # what its body does with it is looked at there
        if user.target is not local_part or not all(map(is_sharded_linear, user.users)):
            return False
    return True


def _read_inputs(site: Site, node: fx.Node) -> None:
    """Let one product read the inputs of its graph in place of their local parts."""
    shard = shard_of(node)
    assert shard is not None
    args = list(node.args)
    for i, part in enumerate(args[1:3], 1):
        if isinstance(part, fx.Node):
            args[i] = whole = part.args[0]
            _stand_in(site, whole, part, shard.num_outputs)
    node.args = tuple(args)
    for part in {p for p in site.graph.nodes if p.target is local_part and not p.users}:
        site.graph.erase_node(part)


def _stand_in(site: Site, whole: Any, part: fx.Node, num_outputs: int) -> None:
    """A plain fake tensor of the whole head's shape as the value of an input."""
    local = tensor_of(part)
    assert local is not None
    trains = bool(whole.meta["example_value"].requires_grad)
    with torch.no_grad(), local.fake_mode:  # type: ignore[attr-defined]
        fake = torch.empty(
            (num_outputs, *local.shape[1:]), dtype=local.dtype, device=local.device
        ).requires_grad_(trains)
    for node in {whole, site.outer(whole) or whole}:
        node.meta["example_value"] = fake
