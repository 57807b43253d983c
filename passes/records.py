"""What the stages hand to each other: frozen records that name nodes and hold no tensors.

Shapes: N rows, D features, L outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.fx as fx

from elmo_compile.config import LossValue
from elmo_compile.numerics.losses import LossSpec
from elmo_compile.passes.graphs import Site, ancestors, tensor_of
from elmo_compile.planner import Plan
from elmo_compile.programs.record import Program

Autocast = tuple[tuple[Any, ...], ...]
"""Each autocast context around a node, outermost first: (device, dtype, enabled, cache)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Everything between a head's product and the first results that are no longer huge."""

    site: Site
    seed: fx.Node
    """The product with the weight: the first huge node."""
    nodes: tuple[fx.Node, ...]
    """In graph order."""
    inputs: tuple[fx.Node, ...]
    """Read by the region, made outside it."""
    outputs: tuple[fx.Node, ...]
    """Made by the region, read outside it."""
    num_outputs: int
    autocast: Autocast
    grad_enabled: bool | None
    """Whether autograd records the region; None where the graph switches it inside."""
    tail: tuple[fx.Node, ...] = ()
    """The last nodes, where they are sums, means, casts and scalings behind the loss."""


@dataclasses.dataclass(frozen=True, eq=False)
class AtenRegion:
    """A region retraced to pre-dispatch ATen; its placeholders are `region.inputs`, in order."""

    region: Region
    module: fx.GraphModule

    def origin(self, placeholder: fx.Node) -> fx.Node:
        """The Dynamo node that a placeholder of the retraced graph stands for."""
        position = list(self.module.graph.find_nodes(op="placeholder")).index(placeholder)
        return self.region.inputs[position]

    def requires_grad(self, node: fx.Node) -> bool:
        """Whether a gradient may be asked of a node (the retraced values themselves do not say)."""
        reached = ancestors(node, differentiable=True)
        leaves = (leaf for leaf in reached if leaf.op == "placeholder")
        tensors = (tensor_of(self.origin(leaf)) for leaf in leaves)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class RowOp:
    """An ATen op on the rows of the logits, applied to x instead: it commutes with the product."""

    op: Any
    args: tuple[Any, ...]
    """Arguments after the first; nodes belong to the retraced graph."""


class Matched:
    """What every kind of match knows of its region and of its (first) weight."""

    aten: AtenRegion
    weight: Any

    @property
    def region(self) -> Region:
        return self.aten.region

    @property
    def output(self) -> fx.Node:
        """The first Dynamo node a result replaces."""
        return self.region.outputs[0]

    @property
    def weight_origin(self) -> fx.Node:
        """The Dynamo node of the weight, in the region's own graph."""
        return self.aten.origin(self.weight)

    @property
    def weight_placeholder(self) -> fx.Node | None:
        """The top-level placeholder of the weight, or None if the weight is computed."""
        origin = self.weight_origin
        return self.region.site.outer(origin) if origin.op == "placeholder" else None


@dataclasses.dataclass(frozen=True, eq=False)
class HeadMatch(Matched):
    """A region understood: a linear head and its loss. Nodes belong to the retraced graph."""

    aten: AtenRegion
    loss: LossSpec
    x: fx.Node
    row_ops: tuple[RowOp, ...]
    """Applied to x in order; afterwards x is reshaped to [N, D]."""
    target_ops: tuple[RowOp, ...]
    """Applied to the target in order."""
    weight: fx.Node
    """A placeholder of the retraced graph, [L, D]."""
    bias: fx.Node | None
    target: fx.Node
    target_aux: fx.Node | None
    scale: float
    divisors: tuple[Any, ...]
    """What the loss is divided by: ints, symbolic nodes, or "rows" for N."""
    num_features: int
    compute_dtype: torch.dtype
    """What the program's own product computes in."""
    logits_upcast: bool
    target_built: torch.dtype | None
    """Dtype of the multi-hot matrix that the program builds and the rewrite does not; else None."""
    rows: Any
    """N: int or SymInt, as the trace knows it."""

    @property
    def kept(self) -> set[fx.Node]:
        """The nodes of the retraced graph that the rewrite still computes (the weight's not)."""
        arguments: list[fx.Node] = []
        rows = [op.args for op in (*self.row_ops, *self.target_ops)]
        fx.map_arg((rows, self.divisors), arguments.append)
        return ancestors(self.x, self.bias, self.target, self.target_aux, *arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramMatch(Matched):
    """A region understood as a program over the logits of one or more heads.

    Nodes belong to the retraced graph, whose placeholders are the program's inputs.
    """

    aten: AtenRegion
    program: Program
    loss: LossSpec
    """Its name; the rest says nothing of a program."""
    xs: tuple[fx.Node, ...]
    """Features of each product."""
    weights: tuple[fx.Node, ...]
    """Placeholders, [L, D] each."""
    num_features: int
    """Of the first product, as all of the following."""
    compute_dtype: torch.dtype
    logits_upcast: bool
    rows: Any
    """N: int or SymInt, as the trace knows it."""
    bias: fx.Node | None

    @property
    def x(self) -> fx.Node:
        """Features of the first product."""
        return self.xs[0]

    @property
    def weight(self) -> fx.Node:
        """Weight of the first product."""
        return self.weights[0]

    @property
    def kept(self) -> set[fx.Node]:
        """The nodes of the retraced graph that the rewrite still computes (no weight's)."""
        return ancestors(*self.xs)


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedHead:
    """A match with everything the rewrite needs decided, but for whether its update is fused."""

    match: HeadMatch | ProgramMatch
    plan: Plan
    fused_plan: Plan
    """The same head with its update fused."""
    compute_dtype: torch.dtype
    weight_dtype: torch.dtype
    weight_input: int | None
    """Position of the weight among the graph's inputs; None if the weight is computed."""
    carried: bool
    """A converted head: unfused, its gradient leaves through a float32 carrier."""
    gradients: tuple[bool, bool, bool]
    """Whether features, weight and bias may be asked for a gradient."""
    loss_value: LossValue
    """Of a fused update: computed in forward, or left to the backward."""
    loss_output: int | None
    """Position of the loss among the graph's outputs; None if it is not returned as it is."""
    unfusable: str
    """Why this head's update may never be fused in this graph; empty if it may."""
    notes: tuple[str, ...] = ()
    shard: str = ""
    """How the outputs are spread over processes (`LabelShard.encode`); empty for a whole head."""

    @property
    def deferred(self) -> bool:
        """Whether a fused update leaves the loss value to the backward."""
        return self.loss_value != "exact"


Source = tuple[Literal["input", "output", "carrier"], int]
"""Where a recipe's input comes from at run time: an input of the graph, a result of it, or the
float32 carrier of an input."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredOutput:
    """Logits that were taken out of a graph's results, and how to make them."""

    position: int
    """Among the graph's results, where it now returns None."""
    recipe: fx.GraphModule
    """Makes the logits from `sources`; carriers come last and may be left out."""
    sources: tuple[Source, ...]
    requires_grad: bool
    autocast: Autocast
    added_from: int
    """Position from which on the graph's results are what recipes read."""
    seed: fx.Node
    """The product, in the graph as it was."""
    top: Region
    """A graph of its own: the logits' argmax, and the largest values of each row with indices."""
    shared: frozenset[int] = frozenset()
    """Sources, by position, whose memory the caller has: he may write into it."""
    read_again: frozenset[int] = frozenset()
    """Inputs of the graph that the recipe reads, and what is left of the graph as well."""


@dataclasses.dataclass(frozen=True)
class ExtraInput:
    """An input the rewrite adds to the graph."""

    kind: Literal["carrier", "anchor", "handle", "sink"]
    weight_input: int
    """Position of the weight it stands for among the original inputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rewritten:
    """One variant of a graph: which heads are fused, and how to call it."""

    module: fx.GraphModule
    dropped: frozenset[int]
    """Original inputs the variant no longer takes (fused weights)."""
    detached: frozenset[int]
    """Original inputs to be passed detached (carried weights)."""
    extras: tuple[ExtraInput, ...]
    """Appended after the original inputs, in order."""
