"""Find: where in a Dynamo graph a huge output is made, and how far it reaches.

Requires: a graph whose nodes carry `example_value`.
Ensures: disjoint regions in graph order; the graph is only read.
Numerics: none.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.convex import between
from elmo_compile.passes.graphs import Site, ancestors, hint, hints, sites, tensor_of, value_of
from elmo_compile.passes.modes import ambient_autocast, autocast_states, grad_modes
from elmo_compile.passes.records import Autocast, Region
from elmo_compile.passes.shards import is_sharded
from elmo_compile.passes.writes import shares_memory, written_nodes

_TAIL_FUNCTIONS = frozenset(
    {operator.truediv, operator.mul, torch.div, torch.mul, torch.sum, torch.mean, torch.true_divide}
)
_WEIGHT_VIEWS = frozenset(
    {"t", "transpose", "permute", "swapaxes", "to", "float", "bfloat16", "half", "double"}
)
_WEIGHT_VIEW_FUNCTIONS = frozenset(
    {torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.swapdims,
     torch.ops.aten.numpy_T, torch.ops.aten.matrix_H, torch.ops.aten.mT, torch.ops.aten.mH}
)  # fmt: skip
"""The overload packets are how torch 2.15 writes `w.T` and its like."""
_LIKE = frozenset({torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like})
_TAIL_METHODS = frozenset({"sum", "mean", "div", "mul", "float", "to", "double"})


def find_regions(module: fx.GraphModule, min_outputs: int) -> tuple[Region, ...]:
    """Every region of `module` and of its checkpointed bodies."""
    regions: list[Region] = []
    inherited: dict[fx.Node, Autocast] = {}
    for site in sites(module):
        outer = inherited.get(site.path[-1], ()) if site.path else ambient_autocast()
        autocast = autocast_states(site.graph, outer)
        inherited.update(autocast)
        grad = grad_modes(site.graph)
        taken: set[fx.Node] = set()
        for node in site.graph.nodes:
            num_outputs = seed_outputs(node, min_outputs)
            if num_outputs is None or node in taken:
                continue
            region = grow(site, node, num_outputs, autocast[node], grad, min_outputs)
            taken.update(region.nodes)
            regions.append(region)
    return tuple(regions)


def seed_outputs(node: fx.Node, min_outputs: int) -> int | None:
    """L if `node` is a product with a 2-D weight of L >= min_outputs outputs; else None."""
    out = tensor_of(node)
    if node.op not in ("call_function", "call_method") or out is None or out.ndim == 0:
        return None
    L = hint(out.shape[-1])
    if min_outputs > L or not out.is_floating_point():
        return None
    if is_sharded(node):
        return L
    rows = hints(out.shape[:-1])
    operands = [(arg, tensor_of(arg)) for arg in node.all_input_nodes]
    for weight, w in operands:
        if w is None or w.ndim != 2 or L not in hints(w.shape):
            continue
        w_shape = hints(w.shape)
        D = w_shape[1] if w_shape[0] == L else w_shape[0]
        for features, x in operands:
            if features is weight or x is None or x.ndim == 0:
                continue
            if hint(x.shape[-1]) == D and hints(x.shape[:-1]) == rows:
                return L
    return None


def largest_linear(module: fx.GraphModule) -> tuple[int, list[int]]:
    """Outputs of the largest linear layer (0 without one), and where its weight enters the graph.

    Checkpointed bodies are looked at too.
    """
    found = ((seed_outputs(n, 1), s, n) for s in sites(module) for n in s.graph.nodes)
    outputs, site, node = max(
        ((L, s, n) for L, s, n in found if L), key=lambda item: item[0], default=(0, None, None)
    )
    return outputs, weight_inputs(site, node, outputs) if site and node else []


def weight_inputs(site: Site, seed: fx.Node, num_outputs: int) -> list[int]:
    """Positions among the top-level graph's inputs of matrices that a product reads as its weight,
    views, casts and slices of it included. Of two operands that may be it, the last: features come
    first.
    """
    operands = [arg for arg in seed.all_input_nodes if is_matrix(arg, num_outputs)]
    read = ancestors(*operands[-1:])
    whole = {num_outputs, *(rows for node in read if (rows := cut_from(node)) is not None)}
    placeholders = [
        site.outer(node)
        for node in read
        if node.op == "placeholder" and any(is_matrix(node, rows) for rows in whole)
    ]
    found = [node for node in placeholders if node is not None]
    return [list(node.graph.find_nodes(op="placeholder")).index(node) for node in found]


def is_matrix(node: fx.Node, num_outputs: int) -> bool:
    """Whether a node may be the weight of a product with that many outputs."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.ndim == 2 and num_outputs in hints(tensor.shape)


def cut_from(node: fx.Node) -> int | None:
    """Of how many rows of a matrix a node is some, or None if it is no such slice."""
    part, whole = tensor_of(node), tensor_of(node.args[0]) if node.args else None
    if node.target is not operator.getitem or part is None or whole is None:
        return None
    same = part.ndim == whole.ndim == 2 and hint(part.shape[1]) == hint(whole.shape[1])
    return hint(whole.shape[0]) if same else None


def is_huge(node: Any, num_outputs: int) -> bool:
    """Whether a node's tensor has the outputs in one of its dimensions (or flattened into one)."""
    tensor = tensor_of(node)
    if tensor is None:
        return False
    shape = hints(tensor.shape)
    flat = len(shape) == 1 and shape[0] > num_outputs and shape[0] % num_outputs == 0
    return num_outputs in shape or flat


def grow(
    site: Site,
    seed: fx.Node,
    num_outputs: int,
    autocast: Autocast,
    grad: dict[fx.Node, bool],
    min_outputs: int | None = None,
) -> Region:
    """The region of one seed: forward until nothing is huge, backward over what only it uses.

    Args:
        min_outputs: outputs of a product that is a head of its own; `num_outputs` where not given.
    """
    order = {node: i for i, node in enumerate(site.graph.nodes)}
    inside: set[fx.Node] = {seed}
    for node in site.graph.nodes:
        if order[node] > order[seed] and node.op != "output":
            reads = any(
                arg in inside and (is_huge(arg, num_outputs) or _is_tuple(arg))
                for arg in node.all_input_nodes
            )
            if reads or _writes_part(node, inside, num_outputs):
                inside.add(node)
    modes = {grad[node] for node in _readers_of_values(seed, inside, order)}
    movable = _Movable(inside, grad, grad[seed])
    reading = inside - {seed}
    _grow_over_weight_views(seed, movable)
    # What makes the weight stays outside: the head takes a computed weight as it comes.
    _grow_backward(reading, movable, num_outputs, _made_from_weight(seed, num_outputs))
    _grow_between(site.graph, movable, num_outputs, min_outputs or num_outputs)
    tail = _tail(inside, order, grad)
    mode = None if len(modes) > 1 else modes.pop()
    region = close(site, seed, inside | set(tail), tail, num_outputs, autocast, mode)
    if mode is None and not any(_takes_gradient(node) for node in region.inputs):
        return dataclasses.replace(region, grad_enabled=False)  # A frozen head's, in any mode.
    return region


def _writes_part(node: fx.Node, inside: set[fx.Node], num_outputs: int) -> bool:
    """Whether a node writes in place into a few outputs of the logits: `z[:, :2].fill_(0)`."""
    parts = [part for part in written_nodes(node) if part in inside]
    huge = [value for value in inside if is_huge(value, num_outputs)] if parts else []
    return any(shares_memory(part, huge) for part in parts)


def _takes_gradient(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.requires_grad


def _is_tuple(node: fx.Node) -> bool:
    """Whether a node's result is taken apart: `topk`, `max` over outputs."""
    return isinstance(value_of(node), tuple | list)


def close(
    site: Site,
    seed: fx.Node,
    inside: set[fx.Node],
    tail: tuple[fx.Node, ...],
    num_outputs: int,
    autocast: Autocast,
    grad_enabled: bool | None,
) -> Region:
    """A region from its nodes: in graph order, with what it reads and what is read of it."""
    nodes = tuple(node for node in site.graph.nodes if node in inside)
    inputs = _unique(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    outputs = tuple(n for n in nodes if any(user not in inside for user in n.users))
    return Region(
        site, seed, nodes, inputs, outputs, num_outputs, autocast, grad_enabled, tail
    )  # fmt: skip


def without_tail(region: Region) -> Region:
    """The region up to the loss itself, for tails that turn out not to be understood; itself if it
    has no tail."""
    if not region.tail:
        return region
    inside = set(region.nodes) - set(region.tail)
    return close(
        region.site, region.seed, inside, (), region.num_outputs, region.autocast,
        region.grad_enabled,
    )  # fmt: skip


def _readers_of_values(
    seed: fx.Node, inside: set[fx.Node], order: dict[fx.Node, int]
) -> set[fx.Node]:
    """The nodes made from the values of the logits, not only from their shape."""
    found = {seed}
    for node in sorted(inside, key=order.__getitem__):
        if node.target not in _LIKE and any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


class _Movable:
    """The nodes of a growing region, and which others may be computed inside it instead."""

    def __init__(self, inside: set[fx.Node], grad: dict[fx.Node, bool], mode: bool) -> None:
        self.inside = inside
        self._grad, self._mode = grad, mode

    def add(self, *nodes: fx.Node) -> bool:
        """Add nodes, unless another grad mode would make a gradient of them appear or vanish.

        Nor parts of a tuple without the call that made it: a region's inputs are tensors and sizes.
        """
        together = self.inside.union(nodes)
        for node in nodes:
            whole = node.args[0] if node.target is operator.getitem else None
            if whole is not None and tensor_of(whole) is None and whole not in together:
                return False
            tensors = (tensor_of(arg) for arg in node.all_input_nodes)
            gradient = any(tensor is not None and tensor.requires_grad for tensor in tensors)
            if gradient and self._grad[node] != self._mode:
                return False
        self.inside.update(nodes)
        return True


def _grow_over_weight_views(seed: fx.Node, movable: _Movable) -> None:
    """Add transposes and casts of the weight that only the product reads."""
    work = [seed]
    while work:
        for arg in work.pop().all_input_nodes:
            tensor = tensor_of(arg)
            matrix = tensor is not None and tensor.ndim == 2
            alone = all(user in movable.inside for user in arg.users)
            if _is_weight_view(arg) and matrix and alone and movable.add(arg):
                work.append(arg)


def _is_weight_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _WEIGHT_VIEWS
    if node.op != "call_function":
        return False
    attribute = node.target is getattr and node.args[1] in ("T", "mT", "H", "mH")
    return attribute or node.target in _WEIGHT_VIEW_FUNCTIONS


def _made_from_weight(seed: fx.Node, num_outputs: int) -> set[fx.Node]:
    """What is computed from the weight beside products, such as its rows' norms.

    It stays outside: inside, its gradient would have to be the product's as well.
    """
    found = {
        node
        for node in ancestors(*(a for a in seed.all_input_nodes if is_matrix(a, num_outputs)))
        if is_matrix(node, num_outputs)
    }
    weights = set(found)
    work = list(found)
    while work:
        for user in work.pop().users:
            if user not in found and seed_outputs(user, num_outputs) != num_outputs:
                found.add(user)
                work.append(user)
    return {node for node in found - weights if not _is_weight_view(node)}


def _grow_backward(
    start: set[fx.Node], movable: _Movable, num_outputs: int, left: set[fx.Node]
) -> None:
    """Add huge operands (targets built in the graph) that nothing outside reads."""
    work, inside = list(start), movable.inside
    while work:
        node = work.pop()
        for arg in node.all_input_nodes:
            if arg in inside or arg in left or arg.op in ("placeholder", "get_attr", "output"):
                continue
            writers = {user for user in arg.users if user not in inside}
            only_written = all(_writes(user, arg, inside) for user in writers)
            if is_huge(arg, num_outputs) and only_written and movable.add(arg, *writers):
                work += [arg, *writers]


def _grow_between(graph: fx.Graph, movable: _Movable, num_outputs: int, min_outputs: int) -> None:
    """Add small values that are made from the logits and meet them again.

    Where they cannot be added, the region stays as it is, for `hazards` to refuse.
    """
    while path := between(graph, movable.inside):
        heads = any(seed_outputs(node, min_outputs) is not None for node in path)
        if heads or any(is_huge(node, num_outputs) for node in path):
            return
        parts = [user for node in path if _is_tuple(node) for user in node.users]
        if not movable.add(*dict.fromkeys([*path, *parts])):
            return


def _writes(node: fx.Node, written: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether `node` only writes into `written` in place, for readers in the region."""
    if not node.args or node.args[0] is not written or any(u not in inside for u in node.users):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and node.target is operator.setitem


def _tail(
    inside: set[fx.Node], order: dict[fx.Node, int], grad: dict[fx.Node, bool]
) -> tuple[fx.Node, ...]:
    """The chain of sums, means, casts and scalings behind a region's only result."""
    found: list[fx.Node] = []
    outputs = [n for n in inside if any(user not in inside for user in n.users)]
    while len(outputs) == 1 and len(outputs[0].users) == 1:
        (user,) = outputs[0].users
        if user not in order or not _is_tail(user, outputs[0]) or grad[user] != grad[outputs[0]]:
            break
        found.append(user)
        outputs = [user]
    return tuple(found)


def _is_tail(node: fx.Node, value: fx.Node) -> bool:
    known = (node.op == "call_function" and node.target in _TAIL_FUNCTIONS) or (
        node.op == "call_method" and node.target in _TAIL_METHODS
    )
    others = [arg for arg in node.all_input_nodes if arg is not value]
    scalar = all(isinstance(value_of(arg), int | float | torch.SymInt) for arg in others)
    if (
        node.target in (operator.truediv, torch.div, torch.true_divide)
        and node.args[0] is not value
    ):
        return False
    if node.target == "to" and others:
        return False
    return known and scalar


def _unique(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))
