"""Hazards around a region: reasons to leave it alone that need no look inside.

Requires: a region of a Dynamo graph.
Ensures: a Refusal if another reader needs the logits or none does, if something outside the region
is made from them and read by it, if the rewrite would move something past a write in place or out
of its autocast context (`order.py`), or if the region runs under a functorch transform; else None.
The graph is only read.
Numerics: none.
"""

from __future__ import annotations

import torch.fx as fx

from elmo_compile.passes.convex import between
from elmo_compile.passes.find import is_huge
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.order import check_order
from elmo_compile.passes.records import Region
from elmo_compile.passes.shards import reads_dtensors
from elmo_compile.report.records import Code, Refusal

_RANDOM = ("rand", "bernoulli", "multinomial", "normal_", "uniform", "exponential", "gumbel")
_TRANSFORMS = ("_grad", "_vmap", "_jvp", "_functionalization")


def check_hazards(region: Region, min_outputs: int) -> Refusal | None:
    """The first hazard of a region, or None.

    Args:
        min_outputs: outputs of a product that is a head.
    """
    no = (
        _read_as_dtensor(region)
        or _escaping_logits(region)
        or _unread(region)
        or _detour(region)
        or check_order(region, min_outputs)
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


def may_draw(node: fx.Node) -> bool:
    """Whether a call draws random numbers; by name, since Dynamo's graphs hold Python functions."""
    name = str(getattr(node.target, "__name__", node.target)).lower()
    if "dropout" in name:
        return not any(value is False for value in (*node.args[2:3], node.kwargs.get("training")))
    return any(part in name for part in _RANDOM)


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
