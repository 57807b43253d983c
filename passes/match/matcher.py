"""Walk a retraced region once, giving every huge node a meaning or naming the first without one.

Requires: an ATen region from `retrace`.
Ensures: a HeadMatch that accounts for every node of the region, or a Refusal naming the first
blocking node; nothing is modified.
Numerics: none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import hint, tensor_of
from elmo_compile.passes.match import linear, losses, rows, targets
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.match.state import Kind, Logits, Loss
from elmo_compile.passes.records import AtenRegion, HeadMatch, Region
from elmo_compile.report.records import Code, Refusal

Rule = Callable[[fx.Node, dict[fx.Node, Kind], int], Kind | None]
RegionRule = Callable[[fx.Node, dict[fx.Node, Kind], int, AtenRegion], Kind | None]

LINEAR_RULES: tuple[Rule, ...] = (
    linear.weight_view,
    linear.linear_head,
    linear.add_bias,
    rows.rearranged_rows,
)
LOSS_RULES: tuple[RegionRule, ...] = (
    targets.zeros,
    targets.multi_hot,
    targets.scattered,
    targets.put,
    targets.one_hot,
    targets.one_hot_sum,
    targets.clamped,
    losses.softmax_cross_entropy,
    losses.sigmoid_bce,
    losses.reduced,
    losses.scaled,
)


def match_region(aten: AtenRegion) -> HeadMatch | Refusal:
    """What the region computes, or the first node that stands in the way."""
    region = aten.region
    try:
        _check_region(region)
        return _finish(aten, *_walk(aten))
    except NoMatch as no:
        return no.refusal(region.seed)


def _check_region(region: Region) -> None:
    if region.grad_enabled is None:
        raise NoMatch(
            Code.UNKNOWN_LOSS, region.seed, "gradients are switched on or off inside this region",
            "keep the head and its loss in one grad mode: what reads logits made under no_grad "
            "belongs into the no_grad block",
        )  # fmt: skip
    if len(region.outputs) != 1:
        names = ", ".join(f"`{node.name}`" for node in region.outputs)
        first = region.outputs[0] if region.outputs else region.seed
        raise NoMatch(
            Code.LOGITS_ESCAPE, first,
            f"more than the loss is computed from these logits ({names})",
            "compute other quantities from the logits outside the compiled function",
        )  # fmt: skip


def _walk(aten: AtenRegion) -> tuple[Loss, dict[fx.Node, Kind]]:
    """What the region's output is, and what every node on the way is."""
    L = aten.region.num_outputs
    kinds: dict[fx.Node, Kind] = {}
    for node in aten.module.graph.nodes:
        if node.op == "output":
            (result,) = node.args[0]
            loss = kinds.get(result)
            if not isinstance(loss, Loss):
                raise _blocked(aten, result)
            return loss, kinds
        if node.op != "call_function" or _is_autocast(node):
            continue
        kind = _kind(node, kinds, L, aten)
        if kind is not None:
            kinds[node] = kind
            continue
        if _writes(node):
            raise NoMatch(
                Code.MUTATION, node, "this write in place is not understood",
                "write out of place, or before the compiled function",
            )  # fmt: skip
        if any(isinstance(kinds.get(arg), Logits | Loss) for arg in node.all_input_nodes):
            raise _blocked(aten, node)
    raise _blocked(aten, None)


def _kind(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, aten: AtenRegion) -> Kind | None:
    for rule in LINEAR_RULES:
        kind = rule(node, kinds, L)
        if kind is not None:
            return kind
    for region_rule in LOSS_RULES:
        kind = region_rule(node, kinds, L, aten)
        if kind is not None:
            return kind
    return None


def _blocked(aten: AtenRegion, node: fx.Node | None) -> NoMatch:
    reader = node if node is not None else aten.region.seed
    return NoMatch(
        Code.UNKNOWN_LOSS,
        reader,
        "this use of the logits is not understood (known: casts, views, row slices, a bias, then "
        "cross_entropy with class ids or binary_cross_entropy_with_logits)",
        "use one of those losses, or leave the head to Inductor",
    )


def _is_autocast(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in ("_enter_autocast", "_exit_autocast")


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _finish(aten: AtenRegion, result: Loss, kinds: dict[fx.Node, Kind]) -> HeadMatch:
    logits, region = result.logits, aten.region
    weight, x = tensor_of(logits.weight), tensor_of(logits.x)
    assert weight is not None
    assert x is not None
    if logits.weight.op != "placeholder":
        raise NoMatch(
            Code.WEIGHT_COMPUTED, region.seed, "the head's weight is computed next to the head",
            "use a plain Parameter of shape [num_outputs, num_features]",
        )  # fmt: skip
    out = tensor_of(region.outputs[0])
    if result.extent == "elements" or out is None:
        raise NoMatch(
            Code.UNKNOWN_LOSS, region.outputs[0], "the loss keeps one value for every output",
            "reduce it over the outputs inside the compiled function",
        )  # fmt: skip
    # Under autocast only Dynamo knows the product's dtype: the pre-dispatch trace sits above it.
    seed = tensor_of(region.seed)
    compute = logits.compute_dtype if seed is None else seed.dtype
    if compute not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NoMatch(
            Code.UNSUPPORTED_DTYPE, region.seed, f"products in {compute}", "use bfloat16 or float32"
        )
    for size in weight.shape:
        int(size)  # A symbolic one becomes a constant that Dynamo guards.
    match = HeadMatch(
        aten=aten,
        loss=result.spec,
        x=logits.x,
        row_ops=logits.row_ops,
        target_ops=result.target_ops,
        weight=logits.weight,
        bias=logits.bias,
        target=result.target,
        target_aux=result.target_aux,
        scale=result.scale,
        divisors=result.divisors,
        num_features=hint(x.shape[-1]),
        compute_dtype=compute,
        logits_upcast=logits.upcast,
        target_built=result.built,
        rows=result.rows,
    )
    _check_operands(match, kinds)
    return match


def _check_operands(match: HeadMatch, kinds: dict[fx.Node, Kind]) -> None:
    """What the rewrite keeps of the region must not need what it removes."""
    for node in match.kept:
        if isinstance(kinds.get(node), Logits | Loss):
            raise NoMatch(
                Code.LOGITS_ESCAPE, node, "the loss's other operands are made from the logits",
                "compute them without the logits",
            )  # fmt: skip
        if node.op == "get_attr" or torch.Tag.nondeterministic_seeded in _tags(node):
            raise NoMatch(
                Code.UNSUPPORTED_TARGET, node,
                "random numbers or constants are made between the head and its loss",
                "make them before the head",
            )  # fmt: skip


def _tags(node: fx.Node) -> list[torch.Tag]:
    return list(getattr(node.target, "tags", ()))
