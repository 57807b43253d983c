"""Reading FX graphs: values, sources, nested checkpoint bodies, copies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)\n\s*(?P<code>.*)')
_LIBRARY = re.compile(
    r"[/\\]torch[/\\]|[/\\]elmo_compile[/\\]|[/\\]site-packages[/\\]transformers[/\\]"
)


_OWNED = re.compile(r"\._(?:modules|parameters)\['([^']+)'\]")


def parameter_name(placeholder: fx.Node) -> str:
    """A parameter's qualified name in the model Dynamo found it in; empty where that is unknown.

    `meta["grapharg"].source` is Dynamo's own (tried on torch 2.13).
    """
    name: Any = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), "name", "")
    return ".".join(_OWNED.findall(str(name() if callable(name) else name)))


def value_of(node: Any) -> Any:
    """What Dynamo (`example_value`) or make_fx (`val`) knows about a node's result; else None."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, untyped: FX's own type is a union of twenty."""
    return node.args


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor a node stands for, or None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def hint(size: Any) -> int:
    """A symbolic size as the number it was traced with (-1 where it has none)."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    if node is None:
        return -1
    value = getattr(node, "hint", None)
    return int(value) if value is not None else -1


def hints(shape: Any) -> tuple[int, ...]:
    """`hint` of each dimension."""
    return tuple(hint(size) for size in shape)


def source_of(node: fx.Node | None) -> str:
    """The user's line that made a node, as `file:line: code`; torch's own frames are skipped."""
    if node is None:
        return ""
    trace = node.meta.get("stack_trace") or node.stack_trace
    if not trace:
        return ""
    frames = [match.groupdict() for match in _FRAME.finditer(trace)]
    own = [frame for frame in frames if not _LIBRARY.search(frame["file"])] or frames
    if not own:
        return ""
    last = own[-1]
    return f"{last['file']}:{last['line']}: {last['code'].strip()}"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One graph in which heads are looked for: the top level or a checkpointed body."""

    module: fx.GraphModule
    path: tuple[fx.Node, ...] = ()
    """The calls that lead here, outermost first; empty at the top level."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def outer(self, placeholder: fx.Node) -> fx.Node | None:
        """The top-level node that a placeholder stands for, or None if a body computes it."""
        node = placeholder
        for call in reversed(self.path):
            position = list(node.graph.find_nodes(op="placeholder")).index(node)
            argument = call.args[1 + position]
            if not isinstance(argument, fx.Node) or argument.op != "placeholder":
                return None
            node = argument
        return node


def is_checkpoint(node: fx.Node) -> bool:
    """Whether a node calls a body under activation checkpointing."""
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "tag_activation_checkpoint"
    )


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph module a checkpoint call runs."""
    body = node.args[0] if node.args else None
    if not (isinstance(body, fx.Node) and body.op == "get_attr"):
        return None
    owner = body.graph.owning_module
    module = getattr(owner, str(body.target), None)
    return module if isinstance(module, fx.GraphModule) else None


def sites(module: fx.GraphModule, path: tuple[fx.Node, ...] = ()) -> Iterator[Site]:
    """The top level and every checkpointed body, outermost first."""
    yield Site(module, path)
    for node in module.graph.nodes:
        if is_checkpoint(node):
            body = body_of(node)
            if body is not None:
                yield from sites(body, (*path, node))


def copy_module(
    module: fx.GraphModule, mapping: dict[fx.Node, fx.Node] | None = None
) -> fx.GraphModule:
    """A copy that may be edited: nodes and checkpointed bodies are new, parameters are not.

    Args:
        mapping: filled with old node -> new node, bodies included.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    new_output = graph.output(output)
    new = fx.GraphModule(module, graph)
    old_output = next(iter(module.graph.find_nodes(op="output")))
    new_output.meta.update(old_output.meta)
    copied[old_output] = new_output
    if mapping is not None:
        mapping.update(copied)
    for node in module.graph.nodes:
        body = body_of(node) if is_checkpoint(node) else None
        if body is not None:
            setattr(new, str(node.args[0].target), copy_module(body, mapping))
    return new


_CUTS = frozenset(
    {torch.ops.aten.detach.default, torch.ops.aten.zeros_like.default,
     torch.ops.aten.ones_like.default, torch.ops.aten.full_like.default}
)  # fmt: skip
"""Operations no gradient passes."""


def ancestors(*nodes: Any, differentiable: bool = False) -> set[fx.Node]:
    """The nodes that these are computed from, themselves included.

    Args:
        differentiable: only those that a gradient of them could reach.
    """
    work = [node for node in nodes if isinstance(node, fx.Node)]
    found = set(work)
    while work:
        node = work.pop()
        if differentiable and node.target in _CUTS:
            continue
        fresh = [arg for arg in node.all_input_nodes if arg not in found]
        found.update(fresh)
        work += fresh
    return found


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; where both are symbolic, for every call (Dynamo guards it)."""
    return hint(a) == hint(b) and hint(a) >= 0 and bool(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """`same_size` of each dimension."""
    return len(a) == len(b) and all(map(same_size, a, b))
