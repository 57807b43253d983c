"""Weights stored by features, [D, L]: the head is given a copy stored by outputs.

Requires: a Dynamo graph (a copy: it is edited).
Ensures: where a product takes a graph input [D, L] as it is, it takes the transpose of a contiguous
transpose; gradients return the same way. Nothing else changes.
Numerics: none.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from elmo_compile.passes.find import seed_outputs
from elmo_compile.passes.graphs import hints, tensor_of

_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__"})


def store_by_outputs(module: fx.GraphModule, min_outputs: int) -> bool:
    """Edit `module`; whether anything was changed."""
    changed = False
    for node in list(module.graph.nodes):
        outputs = seed_outputs(node, min_outputs)
        if outputs is None or node.target not in _PRODUCTS or len(node.args) < 2:
            continue
        weight, fake = node.args[1], tensor_of(node.args[1])
        if not isinstance(weight, fx.Node) or weight.op != "placeholder" or fake is None:
            continue
        if fake.ndim != 2 or hints(fake.shape)[0] == outputs:
            continue
        with module.graph.inserting_before(node):
            made = weight
            for method in ("t", "contiguous", "t"):
                made, before = module.graph.call_method(method, (made,)), made
                made.meta = {**node.meta, "example_value": _apply(method, before)}
        node.replace_input_with(weight, made)
        changed = True
    return changed


def _apply(method: str, node: fx.Node) -> torch.Tensor:
    fake = tensor_of(node)
    assert fake is not None
    made: torch.Tensor = getattr(fake, method)()
    return made
