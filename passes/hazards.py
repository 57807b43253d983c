"""Hazards around a region: reasons to leave it alone that need no look inside.

Requires: a region of a Dynamo graph.
Ensures: a Refusal if another reader needs the logits or none does, if something outside the region
is made from them and read by it, if something the region has read is written in place before the
loss (the rewrite computes everything where the loss was), or if the region runs under a functorch
transform; else None. The graph is only read.
Numerics: none.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.convex import between
from elmo_compile.passes.find import is_huge
from elmo_compile.passes.graphs import tensor_of
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.records import Region
from elmo_compile.passes.shards import reads_dtensors
from elmo_compile.report.records import Code, Refusal

_IN_PLACE_OPERATORS = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
     operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
     operator.imatmul, operator.ilshift, operator.irshift}
)  # fmt: skip
_RANDOM = ("rand", "bernoulli", "multinomial", "normal_", "uniform", "exponential", "gumbel")
_TRANSFORMS = ("_grad", "_vmap", "_jvp", "_functionalization")


def check_hazards(region: Region) -> Refusal | None:
    """The first hazard of a region, or None."""
    no = (
        _read_as_dtensor(region)
        or _escaping_logits(region)
        or _unread(region)
        or _detour(region)
        or _written_inputs(region)
        or _transformed(region)
    )
    return None if no is None else no.refusal(region.seed)


def _read_as_dtensor(region: Region) -> NoMatch | None:
    if not reads_dtensors(region.seed):
        return None
    return NoMatch(
        Code.WEIGHT_SHARED, region.seed,
        "something else in the graph reads the weight or bias of this sharded head",
        "read it outside the compiled function",
    )  # fmt: skip


def _escaping_logits(region: Region) -> NoMatch | None:
    for node in region.outputs:
        if is_huge(node, region.num_outputs):
            reader = next(user for user in node.users if user not in region.nodes)
            what = "they are returned" if reader.op == "output" else f"`{reader.name}` reads them"
            return NoMatch(
                Code.LOGITS_ESCAPE,
                node if reader.op == "output" else reader,
                f"the logits are needed outside the loss: {what}",
                "compute the loss inside the compiled function and return only the loss",
            )
    return None


def _unread(region: Region) -> NoMatch | None:
    if region.outputs:
        return None
    return NoMatch(
        Code.UNKNOWN_LOSS, region.seed, "nothing is made from the values of these logits",
        "leave out the product, or return what is computed from it",
    )  # fmt: skip


def _detour(region: Region) -> NoMatch | None:
    """Whether something outside the region is made from it and read by it."""
    path = between(region.site.graph, set(region.nodes))
    if not path:
        return None
    return NoMatch(
        Code.UNKNOWN_LOSS, path[0],
        "what is made from the logits here meets them again, and is another head's, as large as "
        "they are, or computed in another grad mode",
        "compute it in the same grad mode, detached, or in a compiled function of its own",
    )  # fmt: skip


def _written_inputs(region: Region) -> NoMatch | None:
    """A write between the region's first node and its last into memory that the region has read by
    then: what it reads later, it reads after the write as it did."""
    graph_inputs = {
        _storage(tensor)
        for node in region.site.graph.find_nodes(op="placeholder")
        if (tensor := tensor_of(node)) is not None and tensor.ndim > 0
    }
    inside, read = set(region.nodes), set()
    reordered = len(region.outputs) > 1
    for node in _from_first_to_last(region):
        if node in inside:
            given = (n for n in node.all_input_nodes if n not in inside)
            read |= {_storage(tensor_of(n)) for n in given} - {None}
            continue
        # Two inputs of a graph may share memory without the graph showing it.
        suspects = read | (graph_inputs if read & graph_inputs else set())
        if reordered and any(True for _ in written_nodes(node)):
            return NoMatch(
                Code.MUTATION, node,
                "this writes in place between two results that are made from the logits",
                "write before the head or after the loss, or out of place",
            )  # fmt: skip
        for written in written_nodes(node):
            if _storage(tensor_of(written)) in suspects:
                return NoMatch(
                    Code.MUTATION, node,
                    "this writes in place, between the head's product and its loss, into memory "
                    "that the head may read",
                    "write before the head or after the loss, or out of place",
                )  # fmt: skip
    return None


def _from_first_to_last(region: Region) -> Iterator[fx.Node]:
    """Nodes of the graph from the region's first to its last."""
    node = region.nodes[0]
    while node is not region.nodes[-1]:
        yield node
        node = node.next


def shares_memory(node: fx.Node, others: Iterable[fx.Node]) -> bool:
    """Whether a node's tensor lies in the memory of one of the others."""
    memory = _storage(tensor_of(node))
    return memory is not None and any(_storage(tensor_of(other)) == memory for other in others)


def may_draw(node: fx.Node) -> bool:
    """Whether a call draws random numbers; by name, since Dynamo's graphs hold Python functions."""
    name = str(getattr(node.target, "__name__", node.target)).lower()
    if "dropout" in name:
        return not any(value is False for value in (*node.args[2:3], node.kwargs.get("training")))
    return any(part in name for part in _RANDOM)


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


def _transformed(region: Region) -> NoMatch | None:
    """Whether the region runs under `torch.func.grad`, `vmap` or `jvp`."""
    depth = 0
    for node in region.site.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name.startswith(_TRANSFORMS) and name.endswith("increment_nesting"):
            depth += 1
        elif name.startswith(_TRANSFORMS) and name.endswith("decrement_nesting"):
            depth -= 1
        if node is region.seed:
            break
    if depth <= 0:
        return None
    return NoMatch(
        Code.UNKNOWN_LOSS, region.seed, "the head runs under a torch.func transform",
        "take gradients with backward() or torch.autograd.grad outside the compiled function",
    )  # fmt: skip
