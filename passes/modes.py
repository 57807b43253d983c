"""The autocast contexts and grad modes that a graph switches on and off around its nodes.

Requires: a Dynamo graph, read in the caller's own modes.
Ensures: one entry a node; the graph is only read.
Numerics: none.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from elmo_compile.passes.records import Autocast

SET_GRAD = torch._C._set_grad_enabled
"""What a Dynamo graph calls to switch autograd on or off."""


def ambient_autocast() -> Autocast:
    """The autocast contexts the caller compiles in, which are in no graph."""
    return tuple(
        (device, torch.get_autocast_dtype(device), True, None)
        for device in ("cuda", "cpu")
        if torch.is_autocast_enabled(device)
    )


def autocast_states(graph: fx.Graph, outer: Autocast) -> dict[fx.Node, Autocast]:
    """The autocast contexts around each node, outermost first."""
    stack: list[Autocast] = [outer]
    states: dict[fx.Node, Autocast] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_enter_autocast":
            stack.append((*stack[-1], tuple(node.args)))
        elif name == "_exit_autocast" and len(stack) > 1:
            stack.pop()
        states[node] = stack[-1]
    return states


def grad_modes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether autograd records at each node, as far as the graph itself switches it."""
    enabled = torch.is_grad_enabled()
    modes: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SET_GRAD:
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes
