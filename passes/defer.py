"""Defer: logits that leave a graph are taken out of it, with the recipe that makes them.

Requires: a Dynamo graph (a copy: it is edited).
Ensures: where a huge node is returned and can be made again from the graph's inputs and from rows,
the graph returns None in its place, whatever its recipe reads is returned behind the results, and
what only the logits needed is gone. Everything else is left as it was.
Numerics: none; a recipe is the program's own nodes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.config import Options
from elmo_compile.ops.kept import KEPT
from elmo_compile.passes.find import find_regions, grow
from elmo_compile.passes.graphs import Site, ancestors, hint, hints, tensor_of, value_of
from elmo_compile.passes.hazards import may_draw
from elmo_compile.passes.modes import ambient_autocast, autocast_states
from elmo_compile.passes.records import (
    Autocast,
    DeferredOutput,
    HeadMatch,
    PlannedHead,
    Region,
    Source,
)
from elmo_compile.passes.shards import is_sharded
from elmo_compile.passes.writes import shares_memory, written_nodes

aten = torch.ops.aten

_SAME_LOGITS = frozenset(
    {"float", "to", "double", "bfloat16", "half", "view", "reshape", "contiguous", "flatten"}
)
"""Methods that cast or view; none does anything else under autocast."""
_SAME_ROWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default,
     aten.clone.default, aten.alias.default, aten.to.dtype, aten.flatten.using_ints}
)  # fmt: skip


def same_logits(output: DeferredOutput, head: PlannedHead) -> bool:
    """Whether the loss pass of a head runs over the very logits that were taken out: the same
    product, in the same dtype, with nothing but views behind it on either side."""
    match, seed = head.match, output.seed
    if not isinstance(match, HeadMatch) or match.region.seed is not seed:
        return False
    product = tensor_of(seed)
    assert product is not None
    return (
        bare_product(output)
        and product.dtype == head.compute_dtype
        and (match.bias is None or product.dtype == torch.float32)
        and all(op.op in _SAME_ROWS for op in match.row_ops)
    )


def bare_product(output: DeferredOutput) -> bool:
    """Whether logits that were taken out are a product as it is, but for views."""
    nodes = list(output.recipe.graph.nodes)
    behind = nodes[[node.name for node in nodes].index(output.seed.name) + 1 : -1]
    made, product = tensor_of(nodes[-1].args[0]), tensor_of(output.seed)
    assert made is not None
    assert product is not None
    return made.dtype == product.dtype and all(node.target in _SAME_LOGITS for node in behind)


@dataclasses.dataclass(frozen=True, eq=False)
class _Slice:
    """The nodes that make one output, and what they read."""

    region: Region
    node: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    autocast: Autocast


def defer_outputs(
    module: fx.GraphModule, options: Options, keep: Collection[int] = ()
) -> tuple[DeferredOutput, ...]:
    """Take huge results out of `module`.

    Args:
        keep: positions of results to leave in the graph.

    Returns:
        What was taken out, by position among the results.
    """
    (output,) = module.graph.find_nodes(op="output")
    results = output.args[0]
    if options.deferred_logits is False or not isinstance(results, tuple | list):
        return ()
    found: dict[int, _Slice] = {}
    for region in find_regions(module, options.min_outputs):
        if is_sharded(region.seed):
            continue  # who read the logits of a sharded head would wait for the other processes
        for position, node in enumerate(results):
            if region.site.path or position in keep or node not in region.nodes:
                continue
            made = _slice(region, node)
            if made is not None:
                found[position] = made
    if not found:
        return ()
    returned: list[Any] = [None if i in found else node for i, node in enumerate(results)]
    deferred = tuple(
        _take_out(position, made, returned, len(results)) for position, made in found.items()
    )
    output.args = (tuple(returned),)
    for made in found.values():
        for node in reversed(made.nodes):
            if not node.users:
                module.graph.erase_node(node)
    module.recompile()
    return tuple(_with_readers(made, module.graph) for made in deferred)


def _with_readers(made: DeferredOutput, graph: fx.Graph) -> DeferredOutput:
    """With what both the recipe and the rest of the graph read."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    inputs = {position for kind, position in made.sources if kind == "input"}
    read = (p for p in inputs if any(user.op != "output" for user in placeholders[p].users))
    return dataclasses.replace(made, read_again=frozenset(read))


def _slice(region: Region, node: fx.Node) -> _Slice | None:
    """How to make `node` again, or None where that would not be the same."""
    tensor = tensor_of(node)
    if tensor is None or not tensor.is_floating_point() or region.grad_enabled is None:
        return None
    if tensor.ndim < 2 or hint(tensor.shape[-1]) != region.num_outputs:
        return None
    needed = ancestors(node) & set(region.nodes)
    nodes = tuple(n for n in region.nodes if n in needed)
    inputs = tuple(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in needed))
    states = autocast_states(region.site.graph, ambient_autocast())
    # Accelerate casts what a model under autocast returns, outside of it.
    same_modes = len({states[n] for n in nodes if n.target not in _SAME_LOGITS}) == 1
    movable = all(isinstance(value_of(n), torch.Tensor | torch.SymInt | int) for n in inputs)
    # Elements that are compared with a matrix of targets are no logits: that loss is refused.
    movable = movable and not any(_as_large(n, tensor) for n in inputs)
    if not same_modes or not movable or any(may_draw(n) for n in nodes):
        return None
    for other in region.site.graph.nodes:
        if any(shares_memory(written, (*nodes, *inputs)) for written in written_nodes(other)):
            return None
    return _Slice(region, node, nodes, inputs, states[region.seed])


def _as_large(node: fx.Node, logits: torch.Tensor) -> bool:
    tensor = tensor_of(node)
    if tensor is None or tensor.ndim < 2:
        return False
    return hints(tensor.shape[-2:]) == hints(logits.shape[-2:])


def _take_out(position: int, made: _Slice, returned: list[Any], added_from: int) -> DeferredOutput:
    """The record of one output; what its recipe reads is appended to `returned`."""
    placeholders = list(made.node.graph.find_nodes(op="placeholder"))
    graph, copies = _copy(made)
    sources: list[Source] = []
    for node in made.inputs:
        if node.op == "placeholder":
            sources.append(("input", placeholders.index(node)))
            continue
        if node not in returned:
            returned.append(node)
        sources.append(("output", returned.index(node)))
    for node in made.nodes:
        weight = node.args[1] if node.target is torch.ops.elmo.lowp_linear.default else None
        if isinstance(weight, fx.Node) and weight.op == "placeholder":
            sources.append(("carrier", placeholders.index(weight)))
            _take_carrier(graph, copies[node])
    graph.output(copies[made.node])
    tensor = tensor_of(made.node)
    assert tensor is not None
    theirs = [*placeholders, *(n for n in returned[:added_from] if isinstance(n, fx.Node))]
    shared = (i for i, n in enumerate(made.inputs) if n in theirs or shares_memory(n, theirs))
    return DeferredOutput(
        position=position,
        recipe=fx.GraphModule(made.region.site.module, graph),
        sources=tuple(sources),
        requires_grad=tensor.requires_grad,
        autocast=made.autocast,
        added_from=added_from,
        seed=made.region.seed,
        top=_largest(made),
        shared=frozenset(shared),
    )


def _copy(made: _Slice) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in made.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in made.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, copies


def _take_carrier(graph: fx.Graph, linear: fx.Node) -> None:
    """A last input that stands for a converted weight where its gradient is asked for."""
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        carrier = graph.placeholder(f"{linear.name}_carrier", default_value=None)
    linear.args = (*linear.args[:3], carrier)


def _largest(made: _Slice) -> Region:
    """A graph that makes the logits' argmax and largest values, as a region of its own."""
    graph, copies = _copy(made)
    logits, seed = copies[made.node], copies[made.region.seed]
    fake: Any = tensor_of(made.node)
    with torch.no_grad(), fake.fake_mode:
        largest = graph.call_function(torch.topk, (logits, KEPT, -1))
        largest.meta["example_value"] = torch.topk(fake, KEPT, -1)
        first = graph.call_function(torch.argmax, (logits, -1))
        first.meta["example_value"] = torch.argmax(fake, -1)
    parts = [graph.call_function(operator.getitem, (largest, i)) for i in range(2)]
    for i, part in enumerate(parts):
        part.meta["example_value"] = largest.meta["example_value"][i]
    graph.output((first, *parts))
    site = Site(fx.GraphModule(made.region.site.module, graph))
    grad = dict.fromkeys(graph.nodes, False)
    return grow(site, seed, made.region.num_outputs, made.autocast, grad)
