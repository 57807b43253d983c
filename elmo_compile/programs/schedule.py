"""Put a simplified program's reductions into walks over the outputs, as few as they depend on.

A reduction whose operands need the results of k earlier walks is made in walk k; small values are
computed between walks. Each walk becomes a graph of its own over one chunk of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.fx as fx

from elmo_compile.programs import emit
from elmo_compile.programs.extent import Extents, shape_of
from elmo_compile.programs.record import Schedule, Unsupported, Walk


def schedule(
    graph: fx.Graph,
    extents: Extents,
    logits: Sequence[fx.Node],
    outputs: Sequence[fx.Node | None],
    *,
    gradients: int,
    work: torch.dtype,
) -> Schedule:
    """The walks of a graph.

    Args:
        graph: simplified; its placeholders are the logits, then the inputs.
        logits: the placeholders that are logits, one a product.
        outputs: what is wanted; the first `gradients` are gradients of the logits of the products
            in order, None where there is none.
        work: dtype the logits are converted to in a chunk.
    """
    wanted = [node for node in outputs if node is not None]
    levels = _levels(graph, extents, wanted)
    at_last = [node for node in outputs[:gradients] if node is not None]
    for node in wanted:
        if extents.huge(node) and node not in at_last and _as_large(node, extents):
            raise Unsupported(
                node, "a value as large as the logits is needed outside the loss",
                "reduce it over the outputs inside the compiled function",
            )  # fmt: skip
    kept = [node for node in wanted if extents.huge(node) and node not in at_last]
    reductions: dict[int, list[fx.Node]] = {}
    for node in levels:
        if extents.reduces(node):
            reductions.setdefault(levels[node] - 1, []).append(node)
    for node in kept:
        reductions.setdefault(levels[node], []).append(node)
    last = max((levels[node] for node in at_last), default=-1)
    steps: list[Walk | tuple[fx.Node, ...]] = []
    count = max([last, *reductions, -1]) + 1
    for level in range(count + 1):
        small = tuple(
            node
            for node in levels
            if levels[node] == level and not extents.huge(node) and not extents.reduces(node)
            and node.op != "placeholder"
        )  # fmt: skip
        if small:
            steps.append(small)
        targets = list(dict.fromkeys(reductions.get(level, ())))
        ends = at_last if level == last and at_last else []
        if targets or ends:
            positions = [i for i, n in enumerate(outputs[:gradients]) if n is not None]
            found = emit.walk(
                graph, extents, list(logits), targets, ends, positions if ends else [], work
            )
            steps.append(found)
    names = tuple(n.name for n in graph.nodes if n.op == "placeholder" and n not in set(logits))
    results = tuple(None if n is None or n in at_last else n.name for n in outputs)
    return Schedule(names, tuple(steps), results)


def _levels(graph: fx.Graph, extents: Extents, wanted: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node that is needed, in graph order, how many walks must come before it."""
    needed = set(wanted)
    work = list(wanted)
    while work:
        for arg in work.pop().all_input_nodes:
            if arg not in needed:
                needed.add(arg)
                work.append(arg)
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        level = max((levels[arg] for arg in node.all_input_nodes), default=0)
        levels[node] = level + extents.reduces(node)
    return levels


def _as_large(node: fx.Node, extents: Extents) -> bool:
    return math.prod(shape_of(node)) > 4 * extents.L


def live_values(walks: Sequence[Walk]) -> int:
    """Chunk-sized values alive at once where a chunk graph runs eagerly: an upper bound."""
    most = 1
    for walk in walks:
        last: dict[fx.Node, int] = {}
        nodes = list(walk.graph.graph.nodes)
        for i, node in enumerate(nodes):
            for arg in node.all_input_nodes:
                last[arg] = i
        alive = 0
        for i, node in enumerate(nodes):
            alive += node.op == "call_function"
            most = max(most, alive)
            alive -= sum(
                1 for arg in node.all_input_nodes if arg.op == "call_function" and last[arg] == i
            )
    return most
