"""Canonicalize: retrace one region to pre-dispatch ATen, where every spelling looks the same.

Requires: a region whose inputs carry fake values of one fake mode.
Ensures: a fresh ATen graph with one placeholder per region input; the Dynamo graph is only read.
Numerics: none; autocast is replayed around the region, so that dtypes come out as in the program.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from elmo_compile.passes.graphs import source_of, tensor_of, value_of
from elmo_compile.passes.records import AtenRegion, Region
from elmo_compile.report.records import Code, Refusal


def retrace(region: Region) -> AtenRegion | Refusal:
    """The region in ATen, or why it could not be traced."""
    sub = extract(region)
    values = [value_of(node) for node in region.inputs]
    if not all(isinstance(value, torch.Tensor | torch.SymInt | int | float) for value in values):
        return _failed(region, "one of its inputs is neither a tensor nor a number")
    tensors: list[Any] = [tensor_of(node) for node in region.inputs]
    modes = {tensor.fake_mode for tensor in tensors if hasattr(tensor, "fake_mode")}
    if len(modes) != 1:
        return _failed(region, f"its inputs belong to {len(modes)} fake modes")
    try:
        with (
            modes.pop(),
            torch.fx.traceback.preserve_node_meta(),
            # Under a checkpoint's hooks the trace's own saved tensors would count as the program's.
            torch.autograd.graph.saved_tensors_hooks(_same, _same),
            torch.autocast("cpu", enabled=False),
            _no_cuda_autocast(),
        ):
            traced = make_fx(torch.fx.Interpreter(sub).run, pre_dispatch=True)(*values)
    except Exception as error:  # any failure of the trace is a refusal: the graph stays as it was
        return _failed(region, f"{type(error).__name__}: {error}")
    return AtenRegion(region, traced)


def extract(region: Region) -> fx.GraphModule:
    """The region alone, as a graph module with its inputs as placeholders."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        new[node] = graph.placeholder(node.name)
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    entered = [graph.call_function(enter, context) for context in region.autocast]
    for node in region.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    for context in reversed(entered):
        graph.call_function(leave, (context,))
    graph.output(tuple(new[node] for node in region.outputs))
    return fx.GraphModule(region.site.module, graph)


def _same(saved: torch.Tensor) -> torch.Tensor:
    return saved


def _no_cuda_autocast() -> Any:
    return (
        torch.autocast("cuda", enabled=False)
        if torch.cuda.is_available()
        else contextlib.nullcontext()
    )


def _failed(region: Region, why: str) -> Refusal:
    return Refusal(
        code=Code.RETRACE_FAILED,
        node=region.seed.name,
        source=source_of(region.seed),
        reason=f"the region could not be traced to ATen ({why})",
        remedy="please report it with this text; plain Inductor compiles the graph as it is",
    )
