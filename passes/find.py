"""Find: where in a Dynamo graph a huge output is made, and how far it reaches.

Requires: a graph whose nodes carry `example_value`.
Ensures: disjoint regions in graph order; the graph is only read.
Numerics: none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import Site, hint, hints, sites, tensor_of, value_of
from elmo_compile.passes.records import Region

_TAIL_FUNCTIONS = frozenset(
    {operator.truediv, operator.mul, torch.div, torch.mul, torch.sum, torch.mean, torch.true_divide}
)
_WEIGHT_VIEWS = frozenset(
    {
        "t",
        "transpose",
        "permute",
        "swapaxes",
        "to",
        "type_as",
        "float",
        "bfloat16",
        "half",
        "double",
    }
)
_TAIL_METHODS = frozenset({"sum", "mean", "div", "mul", "float", "to", "double"})


def find_regions(module: fx.GraphModule, min_outputs: int) -> tuple[Region, ...]:
    """Every region of `module` and of its checkpointed bodies."""
    regions: list[Region] = []
    inherited: dict[fx.Node, tuple[Any, ...] | None] = {}
    for site in sites(module):
        outer = inherited.get(site.path[-1]) if site.path else ambient_autocast()
        autocast = autocast_states(site.graph, outer)
        inherited.update(autocast)
        grad = grad_modes(site.graph)
        taken: set[fx.Node] = set()
        for node in site.graph.nodes:
            num_outputs = seed_outputs(node, min_outputs)
            if num_outputs is None or node in taken:
                continue
            region = grow(site, node, num_outputs, autocast[node], grad)
            taken.update(region.nodes)
            regions.append(region)
    return tuple(regions)


def ambient_autocast() -> tuple[Any, ...] | None:
    """The autocast context the caller compiles in, which is in no graph."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return (device, torch.get_autocast_dtype(device), True, None)
    return None


def autocast_states(
    graph: fx.Graph, outer: tuple[Any, ...] | None
) -> dict[fx.Node, tuple[Any, ...] | None]:
    """The innermost autocast context around each node."""
    stack: list[tuple[Any, ...] | None] = [outer]
    states: dict[fx.Node, tuple[Any, ...] | None] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_enter_autocast":
            stack.append(tuple(node.args))
        elif name == "_exit_autocast" and len(stack) > 1:
            stack.pop()
        states[node] = stack[-1]
    return states


def grad_modes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether autograd records at each node, as far as the graph itself switches it."""
    enabled = torch.is_grad_enabled()
    modes: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes


def seed_outputs(node: fx.Node, min_outputs: int) -> int | None:
    """L if `node` is a product with a 2-D weight of L >= min_outputs outputs; else None."""
    out = tensor_of(node)
    if node.op not in ("call_function", "call_method") or out is None or out.ndim == 0:
        return None
    L = hint(out.shape[-1])
    if L < min_outputs or not out.is_floating_point():
        return None
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
    autocast: tuple[Any, ...] | None,
    grad: dict[fx.Node, bool],
) -> Region:
    """The region of one seed: forward until nothing is huge, backward over what only it uses."""
    order = {node: i for i, node in enumerate(site.graph.nodes)}
    inside: set[fx.Node] = {seed}
    for node in site.graph.nodes:
        if order[node] > order[seed] and node.op != "output":
            reads = any(arg in inside and is_huge(arg, num_outputs) for arg in node.all_input_nodes)
            if reads:
                inside.add(node)
    _grow_over_weight_views(seed, inside)
    _grow_backward(inside - {seed}, inside, num_outputs)
    _grow_tail(inside, order, grad)
    nodes = tuple(sorted(inside, key=order.__getitem__))
    inputs = _unique(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    outputs = tuple(n for n in nodes if any(user not in inside for user in n.users))
    modes = {grad[node] for node in nodes}
    grad_enabled = None if len(modes) > 1 else modes.pop()
    return Region(site, seed, nodes, inputs, outputs, num_outputs, autocast, grad_enabled)


def _grow_over_weight_views(seed: fx.Node, inside: set[fx.Node]) -> None:
    """Add transposes and casts of the weight that only the product reads."""
    work = [seed]
    while work:
        for arg in work.pop().all_input_nodes:
            method = arg.op == "call_method" and arg.target in _WEIGHT_VIEWS
            attribute = (
                arg.op == "call_function"
                and arg.target is getattr
                and arg.args[1] in ("T", "mT", "H", "mH")
            )
            tensor = tensor_of(arg)
            matrix = tensor is not None and tensor.ndim == 2
            if (method or attribute) and matrix and all(user in inside for user in arg.users):
                inside.add(arg)
                work.append(arg)


def _grow_backward(start: set[fx.Node], inside: set[fx.Node], num_outputs: int) -> None:
    """Add huge operands (targets built in the graph) that nothing outside reads."""
    work = list(start)
    while work:
        node = work.pop()
        for arg in node.all_input_nodes:
            if arg in inside or arg.op in ("placeholder", "get_attr", "output"):
                continue
            writers = {user for user in arg.users if user not in inside}
            if is_huge(arg, num_outputs) and all(_writes(user, arg, inside) for user in writers):
                added = {arg, *writers}
                inside |= added
                work += added


def _writes(node: fx.Node, written: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether `node` only writes into `written` in place, for readers in the region."""
    if not node.args or node.args[0] is not written or any(u not in inside for u in node.users):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and node.target is operator.setitem


def _grow_tail(inside: set[fx.Node], order: dict[fx.Node, int], grad: dict[fx.Node, bool]) -> None:
    """Add the chain of sums, means, casts and scalings behind a region's only result."""
    while True:
        outputs = [n for n in inside if any(user not in inside for user in n.users)]
        if len(outputs) != 1 or len(outputs[0].users) != 1:
            return
        (user,) = outputs[0].users
        if user not in order or not _is_tail(user, outputs[0]) or grad[user] != grad[outputs[0]]:
            return
        inside.add(user)


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
