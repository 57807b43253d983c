"""Replace each planned head by one op.

Requires: planned heads of one graph, and which of them are fused.
Ensures: a new module; every node of a replaced region is gone, all others are copies in order; a
fused head's weight is no longer an input; the given graph is not touched.
Numerics: none of its own; the ops' numerics are stated where they are defined.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from elmo_compile import ops
from elmo_compile.errors import ElmoError
from elmo_compile.passes.graphs import copy_module, is_checkpoint, sites, source_of, tensor_of
from elmo_compile.passes.match.linear import HEAD_OPS
from elmo_compile.passes.modes import grad_modes
from elmo_compile.passes.plan import unmatched_lowp
from elmo_compile.passes.records import ExtraInput, PlannedHead, ProgramMatch, Rewritten
from elmo_compile.passes.rewrite.emitter import Emitter
from elmo_compile.passes.rewrite.inputs import Inputs, remove_input
from elmo_compile.passes.rewrite.programs import put_off, replace_program

aten = torch.ops.aten
ops.load()

_CARRIED = (
    torch.ops.elmo.head_loss.default, torch.ops.elmo.head_loss_at_once.default,
    torch.ops.elmo.head_program.default,
    *HEAD_OPS, "detach", torch.detach,
)  # fmt: skip
"""What may read a weight that enters detached."""


def rewrite(
    module: fx.GraphModule, heads: Sequence[PlannedHead], fused: Sequence[bool], grad: bool
) -> Rewritten:
    """The graph with its heads replaced.

    Args:
        module: the graph the heads were found in.
        heads: what to replace.
        fused: for each head, whether its backward updates the weight.
        grad: whether autograd records; if not, converted weights need no carrier.
    """
    mapping: dict[fx.Node, fx.Node] = {}
    new = copy_module(module, mapping)
    inputs = Inputs(new)
    dropped: set[int] = set()
    detached: set[int] = set()
    for head, is_fused in zip(heads, fused):
        _replace(head, is_fused, grad, mapping, inputs)
        if head.weight_input is not None:
            if is_fused:
                dropped.add(head.weight_input)
            elif head.carried and grad:
                detached.add(head.weight_input)
    if grad:
        detached |= _carry_unmatched(module, heads, mapping, inputs)
    _refuse_lost_gradients(new, detached)
    for site in sites(new):
        site.graph.lint()
        site.module.recompile()
    extras = tuple(ExtraInput(kind, position) for kind, position in inputs.added)  # type: ignore[arg-type]
    return Rewritten(new, frozenset(dropped), frozenset(detached), extras)


def _replace(
    head: PlannedHead, fused: bool, grad: bool, mapping: dict[fx.Node, fx.Node], inputs: Inputs
) -> None:
    match, region = head.match, head.match.region
    path = tuple(mapping[call] for call in region.site.path)
    output = mapping[region.outputs[-1]]
    emit = Emitter(head, mapping, output)
    if isinstance(match, ProgramMatch):
        outputs = [mapping[node] for node in region.outputs]
        put_off(outputs, outputs[0], output)
        with output.graph.inserting_before(output):
            made = replace_program(head, fused, grad, emit, path, inputs)
        for old, new in zip(outputs, made):
            old.replace_all_uses_with(new)
        _erase(head, fused, mapping, path)
        mapping.update(zip(region.outputs, made))  # Another head may read them.
        return
    with output.graph.inserting_before(output):
        x = emit.row_ops(emit.node(match.x), match.row_ops)
        flat = emit.call(aten.reshape.default, x, [-1, match.num_features])
        bias = None if match.bias is None else emit.node(match.bias)
        target, aux = emit.targets()
        spec = match.loss.encode()
        divisor = emit.divisor(flat)
        plan = head.fused_plan if fused else head.plan
        config = (spec, match.scale, divisor, plan.chunk_size, head.compute_dtype)
        if fused:
            assert head.weight_input is not None
            kinds = ("anchor", "handle", "sink")
            extra = [inputs.extra(kind, head.weight_input, path) for kind in kinds]
            op = torch.ops.elmo.fused_head_loss.default
            fused_config = (*config, head.deferred, plan.holds_logits, head.shard)
            pair = emit.call(op, flat, bias, target, aux, *extra, *fused_config)
        else:
            weight = emit.node(match.weight)
            carrier = None
            if head.carried and grad and head.weight_input is not None:
                carrier = inputs.extra("carrier", head.weight_input, path)
            given = (flat, weight, bias, target, aux, carrier)
            if plan.at_once:
                at_once = torch.ops.elmo.head_loss_at_once.default
                sizes = (*config[:-1], plan.row_block, head.compute_dtype)
                pair = emit.call(at_once, *given, *sizes, *head.gradients)
            else:
                pair = emit.call(torch.ops.elmo.head_loss.default, *given, *config, head.shard)
        loss = emit.finish(emit.call(operator.getitem, pair, 0), x)
    output.replace_all_uses_with(loss)
    _erase(head, fused, mapping, path)
    mapping[region.outputs[-1]] = loss


def _erase(
    head: PlannedHead, fused: bool, mapping: dict[fx.Node, fx.Node], path: tuple[fx.Node, ...]
) -> None:
    """Remove a region that was replaced, and a fused weight's input."""
    for node in reversed(head.match.region.nodes):
        mapping[node].graph.erase_node(mapping[node])
    if fused:
        remove_input(mapping[head.match.weight_origin], path)


def _refuse_lost_gradients(new: fx.GraphModule, detached: set[int]) -> None:
    """Raise ElmoError where something else reads a weight whose gradient leaves by its carrier."""
    inputs = list(new.graph.find_nodes(op="placeholder"))
    weights = {inputs[position] for position in detached}
    for site in sites(new):
        grad = grad_modes(site.graph)
        for node in site.graph.find_nodes(op="placeholder"):
            value = tensor_of(node)
            if site.outer(node) not in weights or (value is not None and not value.requires_grad):
                continue
            for user in node.users:
                if user.target in _CARRIED or is_checkpoint(user) or not grad[user]:
                    continue
                raise ElmoError(
                    f"the weight of a converted (bf16 or fp8) head is also read by {user.name} "
                    f"({user.target}) at {source_of(user) or 'an unknown line'}, where its "
                    "gradient would be rounded to the storage dtype or lost. Read weight.detach() "
                    "there, or restore the head with elmo_compile.dequantize_head(model)"
                )


def _carry_unmatched(
    module: fx.GraphModule,
    heads: Sequence[PlannedHead],
    mapping: dict[fx.Node, fx.Node],
    inputs: Inputs,
) -> set[int]:
    """Give converted heads that stay as they are a carrier for their weight's gradient."""
    taken = {node for head in heads for node in head.match.region.nodes}
    detached: set[int] = set()
    for site in sites(module):
        path = tuple(mapping[call] for call in site.path)
        for node in unmatched_lowp(site.module, taken):
            weight: Any = node.args[1]
            outer = site.outer(weight) if isinstance(weight, fx.Node) else None
            if weight.op != "placeholder" or outer is None:
                continue
            position = list(module.graph.find_nodes(op="placeholder")).index(outer)
            carrier = inputs.extra("carrier", position, path)
            mapping[node].args = (*mapping[node].args[:3], carrier, *node.args[4:])
            detached.add(position)
    return detached
