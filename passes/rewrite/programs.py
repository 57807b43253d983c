"""Replace a planned program by its op."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import tensor_of
from elmo_compile.passes.modes import SET_GRAD, grad_modes
from elmo_compile.passes.records import PlannedHead, ProgramMatch
from elmo_compile.passes.rewrite.emitter import Emitter
from elmo_compile.passes.rewrite.inputs import Inputs

aten = torch.ops.aten


def replace_program(
    head: PlannedHead,
    fused: bool,
    grad: bool,
    emit: Emitter,
    path: tuple[fx.Node, ...],
    inputs: Inputs,
) -> list[fx.Node]:
    """The nodes that stand for the region's outputs, in order.

    Args:
        emit: writes nodes into the copied graph.
    """
    match = head.match
    assert isinstance(match, ProgramMatch)
    program = match.program
    places = list(match.aten.module.graph.find_nodes(op="placeholder"))
    tensors = [emit.node(places[i]) for i in program.tensors]
    if head.shard and match.bias is not None:
        # The program adds it to the logits of all outputs.
        bias = emit.node(match.bias)
        whole = emit.call(torch.ops.elmo.of_all_outputs.default, bias, head.shard)
        tensors = [whole if tensor is bias else tensor for tensor in tensors]
    sizes = [emit.node(places[i]) for i in program.sizes]
    xs = [emit.node(x) for x in match.xs]
    plan = head.fused_plan if fused else head.plan
    config: tuple[Any, ...] = (sizes, program.key, plan.chunk_size, head.compute_dtype)
    config += (head.shard,)
    if fused:
        assert head.weight_input is not None
        kinds = ("anchor", "handle", "sink")
        extra = [inputs.extra(kind, head.weight_input, path) for kind in kinds]
        op: Any = torch.ops.elmo.fused_head_program.default
        results = emit.call(op, xs[0], tensors, *extra, *config)
    else:
        carriers = []
        if head.carried and grad and head.weight_input is not None:
            carriers = [inputs.extra("carrier", head.weight_input, path)]
        op = torch.ops.elmo.head_program.default
        weights = [emit.node(weight) for weight in match.weights]
        results = emit.call(op, xs, weights, carriers, tensors, *config)
    made = []
    for i, node in enumerate(match.region.outputs):
        value = emit.call(operator.getitem, results, i)
        out = tensor_of(node)
        assert out is not None
        made.append(emit.call(aten.to.dtype, value, out.dtype))
    return made


def put_off(old: list[fx.Node], first: fx.Node, last: fx.Node) -> None:
    """Move behind `last` what reads the outputs of a region before its last node.

    The op that replaces the region stands where its last output stood, because it may read what
    was made since the first. What is moved keeps its grad mode.
    """
    late, modes = set(old), grad_modes(last.graph)
    after, node = last, first
    while node is not last:
        following = node.next
        if node not in late and any(arg in late for arg in node.all_input_nodes):
            late.add(node)
            after = _moved(node, after, modes[node], modes[last])
        node = following


def _moved(node: fx.Node, after: fx.Node, mode: bool, around: bool) -> fx.Node:
    """Move a node of one grad mode behind one of another; the last node behind which all stands."""
    after.append(node)
    if mode == around:
        return node
    with node.graph.inserting_before(node):
        node.graph.call_function(SET_GRAD, (mode,))
    with node.graph.inserting_after(node):
        return node.graph.call_function(SET_GRAD, (around,))
