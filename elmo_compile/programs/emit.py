"""Write one walk's graph over a chunk of outputs: sizes L become C, small values are cut."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.ops.rounded import round_through
from elmo_compile.programs import local
from elmo_compile.programs.extent import (
    LIKE,
    SOURCES,
    VIEWS,
    Extents,
    dims_of,
    is_pointwise,
    is_tensor,
    keeps_dims,
    shape_of,
)
from elmo_compile.programs.record import Combine, Result, Unsupported, Walk

aten = torch.ops.aten

_COMBINES: dict[Any, Combine] = {
    aten.sum.dim_IntList: "sum", aten.sum.default: "sum", aten.amax.default: "max",
    aten.amin.default: "min", aten.any.dim: "any", aten.any.dims: "any", aten.any.default: "any",
    aten.all.dim: "all", aten.all.default: "all", aten.logsumexp.default: "logsumexp",
    aten.argmax.default: "argmax", aten.argmin.default: "argmin", aten.max.dim: "argmax",
    aten.min.dim: "argmin", aten.topk.default: "topk", aten.gather.default: "sum",
    aten.index.Tensor: "sum",
}  # fmt: skip

_COMPILED: dict[Any, Any] = {
    torch.ops.elmo.rounded.default: round_through,
    torch.ops.elmo.cut.default: aten.clone.default,
}
"""What a chunk's graph has in place of an operation that compilers do not look into."""


def walk(
    graph: fx.Graph,
    extents: Extents,
    logits: list[fx.Node],
    targets: Sequence[fx.Node],
    ends: Sequence[fx.Node],
    gradients: Sequence[int],
    work: torch.dtype,
) -> Walk:
    """The walk that makes `targets` (reductions, or values kept chunk by chunk) and `ends`."""
    needed = _needed(extents, [*targets, *(node for node in ends if extents.huge(node))])
    writer = _Emitter(extents, work)
    products = tuple(i for i, z in enumerate(logits) if z in needed)
    for i in products:
        writer.logits(logits[i])
    writer.columns = writer.graph.placeholder("columns")
    for node in graph.nodes:
        if node in needed and node not in logits:
            writer.huge(node)
    parts: list[fx.Node] = []
    results = []
    for node in targets:
        made, result = writer.result(node)
        parts += made
        results.append(result)
    # A gradient of one row may be made whole, from the outputs that were picked.
    parts += [writer.env[n] if extents.huge(n) else writer.small(n, -1) for n in ends]
    writer.graph.output(tuple(parts))
    module = fx.GraphModule(torch.nn.Module(), writer.ordered())
    return Walk(
        module, products, tuple(writer.arguments), tuple(results), tuple(gradients),
        tuple(writer.numbers.items()),
    )  # fmt: skip


def _needed(extents: Extents, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """The huge nodes that `ends` are made from in this walk."""
    found = {node for node in ends if extents.huge(node)}
    work = list(ends)
    while work:
        for arg in work.pop().all_input_nodes:
            if extents.huge(arg) and arg not in found:
                found.add(arg)
                work.append(arg)
    return found


class _Emitter:
    """One chunk graph in the making."""

    def __init__(self, extents: Extents, work: torch.dtype) -> None:
        self.extents, self.work = extents, work
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.arguments: list[tuple[str, int | None]] = []
        self.columns: fx.Node
        self.numbers: dict[str, int] = {}
        self._made: dict[tuple[str, int | None], fx.Node] = {}
        self._size: fx.Node | None = None

    def logits(self, node: fx.Node) -> None:
        """A chunk of a product's logits, converted."""
        z = self.graph.placeholder(f"z{len(self.env)}")
        self.env[node] = z

    def ordered(self) -> fx.Graph:
        """The graph with its placeholders first, logits converted to arithmetic precision."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        zs = set(self.env.values())
        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = graph.node_copy(node)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if node in zs and node.name.startswith("z"):
                    env[node] = graph.call_function(aten.to.dtype, (env[node], self.work))
                continue
            env[node] = graph.node_copy(node, env.__getitem__)
        return graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def size(self) -> fx.Node:
        """C."""
        if self._size is None:
            self._size = self.call(aten.sym_size.int, self.columns, 0)
        return self._size

    def small(self, node: fx.Node, dim: int | None = None) -> fx.Node:
        """A small value, or the chunk of it along `dim` (from the end)."""
        if dim is not None and is_tensor(node):
            shape = shape_of(node)
            dim = dim if len(shape) + dim >= 0 and shape[dim] == self.extents.L else None
            if dim == -1 and len(shape) == 1 and _counts(node):
                return self.call(aten.to.dtype, self.columns, node.meta["val"].dtype)
        else:
            dim = None
        key = (node.name, dim)
        if key not in self._made:
            self._made[key] = self.graph.placeholder(f"a{len(self._made)}")
            self.arguments.append(key)
        return self._made[key]

    def outputs(self, node: fx.Node, lowest: int = 0) -> fx.Node:
        """A small value that numbers outputs, from `lowest`: checked before the walk."""
        self.numbers[node.name] = min(lowest, self.numbers.get(node.name, lowest))
        return self.small(node)

    def value(self, arg: Any, dim: int | None = None) -> Any:
        """Any argument of a huge node whose outputs are in `dim`."""
        if isinstance(arg, fx.Node):
            return self.env[arg] if self.extents.huge(arg) else self.small(arg, dim)
        if isinstance(arg, tuple | list):
            return [self.value(a, dim) for a in arg]
        return arg

    def sizes(self, sizes: Any, place: int) -> list[Any]:
        """A list of sizes with C at `place`."""
        return [self.size() if i == place else self.value(s) for i, s in enumerate(sizes)]

    def huge(self, node: fx.Node) -> None:
        """Emit a huge node."""
        self.env[node] = self._emit(node)

    def _emit(self, node: fx.Node) -> fx.Node:
        ext, target = self.extents, node.target
        dim = ext.dim(node)
        if node.op == "placeholder":  # an input as large as the logits
            key = (node.name, dim)
            self.arguments.append(key)
            return self.graph.placeholder(f"h{len(self.arguments)}")
        args: Any = node.args
        place = (len(shape_of(node)) if is_tensor(node) else 0) + dim
        if target is torch.ops.elmo.multi_hot.default:
            offsets = args[2] if len(args) > 2 else None
            labels = self.outputs(args[0], 0 if offsets is not None else -1)
            return self.call(local.multi_hot, labels, self.value(offsets), self.columns)
        if target in SOURCES:
            skip = 1 if str(target).startswith("aten.new_") else 0
            rest = [self.value(a) for a in args[skip + 1 :]]
            lead = [self.value(a) for a in args[:skip]]
            if target is aten.empty_permuted.default:
                target, rest = aten.empty.memory_format, []
            return self.call(target, *lead, self.sizes(args[skip], place), *rest, **node.kwargs)
        if is_pointwise(node) or target in LIKE:
            mapped = [self.value(a, dim) for a in args]
            return self.call(_COMPILED.get(target, target), *mapped, **node.kwargs)
        if target in VIEWS:
            return self.call(aten.reshape.default, self.value(args[0]), self.sizes(args[1], place))
        if target is aten.expand.default:
            return self.call(target, self.value(args[0], dim), self.sizes(args[1], place))
        if target is aten.squeeze.default:
            ones = [i for i, s in enumerate(shape_of(args[0])) if s == 1]
            return self.call(aten.squeeze.dims, self.value(args[0]), ones)
        if target is aten.slice.Tensor:
            along = (args[1] if len(args) > 1 else 0) % len(shape_of(args[0]))
            if along == len(shape_of(args[0])) + ext.dim(args[0]):
                return self.env[args[0]]
        if target is aten.unsqueeze.default and not ext.huge(args[0]):
            return self.call(target, self.value(args[0], self._before(node, place)), args[1])
        if target in (aten.scatter.src, aten.scatter.value, aten.scatter_add.default):
            return self._scatter(node, place)
        if target is aten.index_put.default:
            return self._index_put(node, place)
        mapped = [self.value(a, dim) for a in args]
        return self.call(target, *mapped, **node.kwargs)

    def _before(self, node: fx.Node, place: int) -> int:
        """Where the outputs are in a small operand of `unsqueeze`, from the end."""
        rank = len(shape_of(node))
        args: Any = node.args
        at = args[1] % rank
        return int(place - (at < place)) - (rank - 1)

    def _scatter(self, node: fx.Node, place: int) -> fx.Node:
        args: Any = node.args
        rank, dim = len(shape_of(node)), self.extents.dim(node)
        along_rows = args[1] % rank != place and not node.kwargs.get("reduce")
        parts = [a for a in args[2:] if isinstance(a, fx.Node)]
        if along_rows and all(self._has_outputs(a, dim) for a in parts):
            given = [self.value(a, dim) for a in args]
            return self.call(node.target, *given)
        if args[1] % rank != place or self.extents.huge(args[2]) or node.kwargs.get("reduce"):
            raise Unsupported(node, f"{node.target} along rows", "scatter along the outputs")
        fn = local.scatter_add if node.target is aten.scatter_add.default else local.scatter
        source = self.value(args[0], self.extents.dim(node))
        return self.call(
            fn, source, place, self.outputs(args[2]), self.value(args[3]), self.columns
        )

    def _has_outputs(self, operand: fx.Node, dim: int) -> bool:
        """Whether an operand of a huge node has all outputs where that has them."""
        huge = self.extents.huge(operand)
        there = is_tensor(operand) and shape_of(operand)[dim:][:1] == (self.extents.L,)
        return there and (not huge or self.extents.dim(operand) == dim)

    def _index_put(self, node: fx.Node, place: int) -> fx.Node:
        args: Any = node.args
        accumulate = bool(args[3]) if len(args) > 3 else False
        indices = [None if i is None else self.value(i) for i in args[1]]
        dim = self.extents.dim(node)
        source = self.value(args[0], dim)
        if place < len(args[1]) and args[1][place] is not None:
            self.outputs(args[1][place], -self.extents.L)
            values = self.value(args[2])
            return self.call(
                local.index_put,
                source,
                indices,
                values,
                accumulate,
                place,
                self.extents.L,
                self.columns,
            )
        return self.call(node.target, source, indices, self.value(args[2], dim), accumulate)

    def result(self, node: fx.Node) -> tuple[list[fx.Node], Result]:
        """The parts of a reduction (or kept value) in this chunk, and how they combine."""
        meta = node.meta["val"]
        if self.extents.huge(node):
            kept = Result(node.name, "slice", 1, self.extents.dim(node), meta)
            return [self.env[node]], kept
        args: Any = node.args
        source = args[0]
        place = len(shape_of(source)) + self.extents.dim(source)
        combine, h = _COMBINES[node.target], self.env[source]
        if node.target is aten.gather.default:
            part = self.call(local.gather, h, place, self.outputs(args[2]), self.columns)
            return [part], Result(node.name, combine, 1, place, meta)
        if node.target is aten.index.Tensor:
            self.outputs(args[1][place], -self.extents.L)
            part = self.call(
                local.index, h, self.value(args[1]), place, self.extents.L, self.columns
            )
            return [part], Result(node.name, combine, 1, place, meta)
        keep, rank = keeps_dims(node), len(shape_of(source))
        if combine in ("argmax", "argmin", "topk", "logsumexp") and len(dims_of(node)) > 1:
            raise Unsupported(node, f"{node.target} over rows and outputs", "reduce outputs alone")
        if combine == "logsumexp":
            if not source.meta["val"].dtype.is_floating_point:
                h = self.call(aten.to.dtype, h, meta.dtype)
            return self._pair(self.call(local.log_sum_exp, h, place, keep), node, combine, place)
        if combine in ("argmax", "argmin"):
            pair = self.call(local.extreme, h, place, keep, combine == "argmax", self.columns)
            return self._pair(pair, node, combine, place)
        if combine == "topk":
            largest = args[3] if len(args) > 3 else True
            pair = self.call(local.top, h, args[1], place, largest, self.columns)
            parts, known = self._pair(pair, node, combine, place - rank)
            return parts, Result(known.name, combine, 2, place - rank, meta, largest, args[1])
        dims = list(dims_of(node))
        if combine in ("any", "all"):
            h = self.call(aten.to.dtype, h, torch.bool)
            target = aten.any.dims if combine == "any" else aten.all.dims
            part = self.call(target, h, dims, keep)
        else:
            reduce: Any = aten.sum.dim_IntList if combine == "sum" else node.target
            part = self.call(reduce, h, dims, keep, **node.kwargs)
        return [part], Result(node.name, combine, 1, place, meta)

    def _pair(
        self, pair: fx.Node, node: fx.Node, combine: Combine, place: int
    ) -> tuple[list[fx.Node], Result]:
        parts = [self.call(operator.getitem, pair, i) for i in (0, 1)]
        return parts, Result(node.name, combine, 2, place, node.meta["val"])


def _counts(node: fx.Node) -> bool:
    """Whether a small vector is 0, 1, ... L - 1."""
    args: Any = node.args
    return node.target is aten.arange.start_step and args[0] == 0 and len(args) == 2
