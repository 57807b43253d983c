"""What a graph with a rewritten head keeps of its forward for its backward.

Uses private APIs: `torch._functorch.config`, `torch._functorch.partitioners`,
`torch._inductor.config` and `torch._inductor.custom_graph_pass` (tried on torch 2.11, 2.13, 2.15).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch._functorch import config, partitioners
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

_settings: Any = config
_RATIOS = (2, 4, 8, 16, 32)
"""Of what the products of a layer make at least to what is kept for it, tried in this order."""
_PASS = "joint_custom_post_pass"
"""Inductor's option for a pass over forward and backward before they are taken apart."""


@contextlib.contextmanager
def few_activations(patches: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Around a compilation: keep no activation for the backward that element-wise operations make
    again from others that are kept, and otherwise what `BeforePartition` says.

    AOTAutograd keeps such a one by default where the backward hands it to a product, which saves
    writing it a second time: the outputs of activation functions and of norms, a third of what a
    transformer keeps. Whoever has set `ban_recompute_materialized_backward`, to whatever value, in
    `torch._functorch.config` is not overruled.

    Args:
        patches: to Inductor's config.

    Yields:
        The patches to compile with.
    """
    with contextlib.ExitStack() as reverts:

        def change(**changes: Any) -> None:
            # `config.patch` would leave behind that someone has set it.
            reverts.callback(_settings._make_closure_patcher(**changes)())

        name = "ban_recompute_materialized_backward"
        if hasattr(_settings, name) and _settings._is_default(name):
            change(**{name: False})
        budget = float(_settings.activation_memory_budget)
        settled = functools.partial(change, activation_memory_budget=1.0)
        own = BeforePartition(budget, settled, _passes_of_the_user(patches))
        yield {**patches, _PASS: own}


def _passes_of_the_user(patches: dict[str, Any]) -> list[Any]:
    """What is to run over joint graphs by given patches, or else by Inductor's config."""
    given = patches.get(_PASS, getattr(inductor_config, _PASS))
    return list(given) if isinstance(given, list | tuple) else [given] if given else []


class BeforePartition(CustomGraphPass):
    """Marks in a joint graph what is kept for the backward and what is made again.

    Below an `activation_memory_budget` of 1 AOTAutograd weighs products one by one, and no longer
    bans recomputing long chains. It keeps results of products inside the layers rather than the
    stream between them, which is as large but made of all of them: the backward of the last layer
    makes it again for every layer, and each waits for its own layer's backward. That takes more
    memory than to keep all (measured in benchmarks/NOTES.md). Here what is alive at narrow places
    between layers is kept, and the layers between two such places are kept as without a budget, or
    made again, as in `torch.utils.checkpoint`. The first layers, since theirs are made again when
    what the others kept is free. A graph with checkpointed regions of the user's, or without narrow
    places, is left to torch.

    Args:
        budget: kept bytes, as a part of what is kept without a budget.
        settled: called before marking layers; torch's own way must then see no budget.
        others: passes of the user's that run before.
    """

    def __init__(
        self, budget: float, settled: Callable[[], None], others: Sequence[Any] = ()
    ) -> None:
        self._budget, self._settled, self._others = budget, settled, others

    def __call__(self, graph: fx.Graph) -> None:
        """Mark the nodes."""
        for other in self._others:
            other(graph)
        regions = any(node.meta.get("recompute") for node in graph.nodes)
        keep_what_is_overwritten(graph)
        again = [] if regions or self._budget >= 1 else layers_to_recompute(graph, self._budget)
        if again:
            self._settled()
        for layer in again:
            for node in layer.nodes:
                node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        for layer in again:
            for node in (*layer.begin, *layer.end):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """For Inductor's caches; None, which keeps a graph out of them, as a user's pass has it."""
        others = [getattr(other, "uuid", lambda: None)() for other in self._others]
        return None if None in others else (_digest(), self._budget, *others)


@functools.cache
def _digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def keep_what_is_overwritten(joint: fx.Graph) -> None:
    """Let all read a copy of an input that the forward writes to, where that reaches the backward.

    There the input (a buffer) has its new value, and what torch makes again is made of that one:
    gradients are wrong (pytorch/pytorch#197039; seen in 2.11, 2.13 and 2.15). Cheap for what is
    kept instead of what is made of it, and nothing is copied that only the forward reads.
    """
    reaching: set[fx.Node] = set()
    work = list(_backward_of(joint))
    while work:
        node = work.pop()
        if node not in reaching:
            reaching.add(node)
            work.extend(node.all_input_nodes)
    for write in joint.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written = write.args[0]
        if written.op != "placeholder" or reaching.isdisjoint(set(written.users) - {write}):
            continue
        with joint.inserting_after(list(joint.find_nodes(op="placeholder"))[-1]):
            kept = joint.call_function(torch.ops.aten.clone.default, (written,))
        kept.meta = {"val": written.meta["val"].clone(), "recompute": CheckpointPolicy.MUST_SAVE}
        readers = (kept, write)
        written.replace_all_uses_with(kept, lambda user, readers=readers: user not in readers)


class Layer(NamedTuple):
    """What a forward does between two narrow places."""

    nodes: list[fx.Node]
    """Operations whose results may be made again."""
    begin: list[fx.Node]
    """Values alive before the first; none at the graph's begin."""
    end: list[fx.Node]
    """Values alive after the last."""
    made: int
    """Bytes that products make in it."""
    needs: int
    """Bytes of `begin` that are not alive before the layer before, too."""


def layers_to_recompute(joint: fx.Graph, budget: float) -> list[Layer]:
    """Of the forward of a joint graph the first layers, as many as the budget asks for.

    Layers are as short as the budget allows, since what one makes again takes memory too; for a
    budget that no layers meet, those with which the two together take least.

    Args:
        joint: forward and backward, as AOTAutograd partitions it.
        budget: bytes kept, as a part of those that all layers' products make.
    """
    best, least = list[Layer](), math.inf
    for ratio in _RATIOS:
        *layers, _head = layers_of(joint, ratio)
        kept = sum(layer.made for layer in layers)
        most = budget * kept
        again: list[Layer] = []
        for layer in layers:
            if kept <= most:
                break
            kept += layer.needs - layer.made
            again.append(layer)
        together = kept + max((layer.made for layer in again), default=0)
        if together < least:
            best, least = again, together
        if kept <= most:
            break
    return best


def layers_of(joint: fx.Graph, ratio: float) -> list[Layer]:
    """The forward of a joint graph, taken apart at narrow places.

    A place is narrow if no more bytes are alive there than at its neighbours; there is one between
    two products that follow each other.

    Args:
        joint: forward and backward.
        ratio: bytes that a layer's products make at least, over those of the values that are alive
            after it and not before.
    """
    kinds = partitioners.get_default_op_list()
    forward = _forward_of(joint)
    alive = _alive_after(forward, kinds)
    made = [_size(node) if kinds.is_compute_intensive(node) else 0 for node in forward]
    products = [at for at, size in enumerate(made) if size]
    places = [
        min(range(first, second), key=lambda at: (sum(map(_size, alive[at])), -at))
        for first, second in itertools.pairwise(products)
    ]
    widths = [sum(map(_size, alive[at])) for at in places]
    layers: list[Layer] = []
    start, begin, needs = 0, list[fx.Node](), 0

    def end_at(stop: int, end: list[fx.Node]) -> None:
        nonlocal start, begin, needs
        nodes = _repeatable(forward[start:stop], kinds)
        layers.append(Layer(nodes, begin, end, sum(made[start:stop]), needs))
        needs = sum(_size(node) for node in end if node not in begin)
        start, begin = stop, end

    neighbours = zip([math.inf, *widths], [*widths[1:], math.inf])
    for at, width, beside in zip(places, widths, neighbours):
        new = sum(_size(node) for node in alive[at] if node not in begin)
        if width <= min(beside) and sum(made[start : at + 1]) >= ratio * new:
            end_at(at + 1, alive[at])
    end_at(len(forward), [])
    return layers


def _repeatable(nodes: Sequence[fx.Node], kinds: Any) -> list[fx.Node]:
    """Those that make the same twice and write nothing; of what is made of the others' results
    alone (a mask of random numbers) the partitioner may keep what is smallest."""
    others: set[fx.Node] = set()
    for node in nodes:
        inputs = [used for used in node.all_input_nodes if used.op == "call_function"]
        if not _is_repeatable(node, kinds) or (inputs and others.issuperset(inputs)):
            others.add(node)
    return [node for node in nodes if node not in others]


def _is_repeatable(node: fx.Node, kinds: Any) -> bool:
    operation, made = node.target, node.meta.get("val")
    if not isinstance(made, torch.Tensor | tuple | list):
        return False  # a size, which is kept as it is
    if not isinstance(operation, torch._ops.OpOverload):
        return operation is operator.getitem
    ours = operation.namespace in ("aten", "prims") and not operation._schema.is_mutable
    if not ours or kinds.is_random(node):
        return False
    return torch.Tag.nondeterministic_seeded not in operation.tags or _drops_nothing(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a node is an attention whose dropout is off."""
    arguments: Any = node.target
    names = [argument.name for argument in arguments._schema.arguments]
    given = {**dict(zip(names, node.args)), **node.kwargs}
    return "dropout_p" in names and given.get("dropout_p", 0.0) == 0.0


def _backward_of(joint: fx.Graph) -> set[fx.Node]:
    """What is made of tangents, which are included."""
    found: set[fx.Node] = set()
    for node in joint.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found - {joint.find_nodes(op="output")[0]}


def _forward_of(joint: fx.Graph) -> list[fx.Node]:
    """The operations that a joint graph's results without tangents are made of, in order; none
    where there are no tangents."""
    backward = _backward_of(joint)
    if not backward:
        return []
    output = joint.find_nodes(op="output")[0]
    wanted = [node for node in output.all_input_nodes if node not in backward]
    needed: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in needed:
            needed.add(node)
            wanted.extend(node.all_input_nodes)
    return [node for node in joint.nodes if node in needed and node.op == "call_function"]


def _alive_after(forward: Sequence[fx.Node], kinds: Any) -> list[list[fx.Node]]:
    """After each operation the values that later ones read, a view as what it is a view of."""
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(forward):
        owner[node] = node
        of = node.all_input_nodes[0] if kinds.is_view(node) else node
        if node.target is not operator.getitem or kinds.is_view(of):  # not of several results
            owner[node] = owner.get(of, of)
        for used in node.all_input_nodes:
            last[owner.get(used, used)] = at
    found: list[list[fx.Node]] = []
    alive: list[fx.Node] = []
    for at, node in enumerate(forward):
        results = [user for user in node.users if user.target is operator.getitem]
        made = results if isinstance(node.meta.get("val"), tuple | list) else [node]
        new = [one for one in made if owner.get(one) is one and _size(one) and one not in alive]
        alive = [value for value in (*alive, *new) if last.get(value, -1) > at]
        found.append(alive)
    return found


def _size(node: fx.Node) -> int:
    """Bytes of a tensor, 0 of anything else; of symbolic sizes those that were traced."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    return int(partitioners._size_of(node))
