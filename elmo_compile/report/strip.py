"""Copies of graphs that can be read and printed, and hold no tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


EXAMPLE = "elmo_example"
"""Key of a node's meta."""


class Example(NamedTuple):
    """What a value looked like when its graph was compiled: enough to make another like it."""

    shape: tuple[int, ...]
    """Of a tensor; the number alone, of a size."""
    dtype: torch.dtype | None
    """None for a size."""
    requires_grad: bool


def _number(size: Any) -> int:
    """A size as the number it was traced with."""
    return size if type(size) is int else int(getattr(size.node, "hint", None) or 1)


class Removed(nn.Module):
    """Stands where a submodule was; prints as it did."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.description = str(module)

    def extra_repr(self) -> str:
        """What the module said of itself."""
        return self.description


def strip(graph: fx.GraphModule | None) -> fx.GraphModule | None:
    """A copy with the same code whose tensors are on the meta device and whose shapes are text.

    Args:
        graph: a graph module; not changed. None gives None.
    """
    if graph is None:
        return None
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        values[node] = copy.node_copy(node, values.__getitem__)
        values[node].meta = _light_meta(node.meta)
    copy.set_codegen(graph.graph._codegen)
    root = {
        str(node.target): _light_attribute(graph, str(node.target))
        for node in graph.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    return fx.GraphModule(root, copy, class_name=type(graph).__name__)


def _light_attribute(graph: fx.GraphModule, target: str) -> Any:
    value: Any = graph
    for name in target.split("."):
        value = getattr(value, name, None)
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, fx.GraphModule):
        return strip(value)
    return Removed(value) if isinstance(value, nn.Module) else str(value)


def _light_meta(meta: dict[str, Any]) -> dict[str, Any]:
    kept = {key: meta[key] for key in KEPT_META if key in meta}
    value = meta.get("val", meta.get("example_value"))
    if EXAMPLE in meta:
        kept[EXAMPLE] = meta[EXAMPLE]
    elif isinstance(value, torch.Tensor):
        kept[EXAMPLE] = Example(tuple(map(_number, value.shape)), value.dtype, value.requires_grad)
    elif isinstance(value, int | torch.SymInt):
        kept[EXAMPLE] = Example((_number(value),), None, False)
    if isinstance(value, torch.Tensor):
        kept["tensor_meta"] = _as_text(value)
    elif "tensor_meta" in meta:
        kept["tensor_meta"] = meta["tensor_meta"]
    return kept


def _as_text(value: torch.Tensor) -> TensorMetadata:
    """Shape and dtype as FX prints them; sizes as text, since a SymInt keeps its tracer alive."""
    shape: Any = tuple(int(size) if type(size) is int else str(size) for size in value.shape)
    return TensorMetadata(
        shape=shape,
        dtype=value.dtype,
        requires_grad=value.requires_grad,
        stride=(),
        memory_format=None,
        is_quantized=False,
        qparams={},
    )
