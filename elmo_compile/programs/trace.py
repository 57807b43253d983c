"""Trace what follows a head's product to functional, decomposed ATen, with its gradient.

The logits are an input in arithmetic precision (float32, or float64), so that whatever the program
computes from them is computed in it. Log-sum-exp stays one operation, and softmax and log-softmax
are written with it: its gradient needs no second pass over the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from elmo_compile.ops.cut import cut
from elmo_compile.ops.in_range import in_range
from elmo_compile.ops.rounded import rounded
from elmo_compile.programs.decompositions import rewritten, table
from elmo_compile.programs.extent import size
from elmo_compile.programs.ranges import rewrite_ranges
from elmo_compile.programs.record import Unsupported

aten = torch.ops.aten

_COMPARISONS = {
    getattr(getattr(aten, name), kind)
    for name in ("gt", "ge", "lt", "le", "eq", "ne")
    for kind in ("Tensor", "Scalar")
}


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A joint graph: (logits of each product, inputs, upstream gradients) -> results, gradients."""

    graph: fx.Graph
    num_products: int
    num_inputs: int
    num_results: int
    differentiable: tuple[int, ...]
    """Results with an upstream gradient."""
    wanted: tuple[int, ...]
    """Inputs with a gradient, after those of the logits."""


def trace(
    module: fx.GraphModule,
    products: Sequence[fx.Node],
    values: Sequence[Any],
    wanted: Sequence[int],
    *,
    grad: bool,
    work: torch.dtype,
    mode: Any,
) -> Traced:
    """Trace a retraced region.

    Args:
        module: the region in pre-dispatch ATen.
        products: the heads' products in it, replaced by inputs.
        values: fake values of its placeholders, tensors or sizes.
        wanted: positions of inputs that take a gradient.
        grad: whether autograd records the region.
        work: dtype of the logits and of what is computed from them.
        mode: the fake mode of `values`.
    """
    logits = [product.meta["val"] for product in products]
    with mode, torch.no_grad(), _without_autocast():
        zs = [torch.empty(z.shape, dtype=work, device=z.device) for z in logits]
        run = _Region(module, products, work)
        forward = _functional(run, (*zs, *values), rewritten())
    _pure(forward)
    rewrite_ranges(forward.graph, size(logits[0].shape[-1]))
    forward.recompile()
    ends: Any = forward.graph.output_node().args[0]
    results = list(ends)
    inputs: list[Any] = [*zs, *values]
    function: Callable[..., Any] = fx.Interpreter(forward).run
    diff: list[int] = []
    with mode, _without_autocast(), _without_callers():
        if grad:
            diff = _differentiable(forward, zs, values, wanted)
        if diff:
            function = _Joint(forward, len(zs), len(values), diff, wanted)
            inputs += [torch.empty_like(results[i].meta["val"]) for i in diff]
        traced = make_fx(function, decomposition_table=table())(*inputs)
        if any(map(_mutates, traced.graph.nodes)):  # Autograd's formulas write into what they make.
            with torch.no_grad():
                traced = _functional(fx.Interpreter(traced).run, inputs, table())
    _pure(traced)
    _row_sizes(traced, len(zs))
    return Traced(
        traced.graph, len(zs), len(values), len(results), tuple(diff), tuple(wanted) if diff else ()
    )  # fmt: skip


def _functional(
    function: Callable[..., Any], inputs: Sequence[Any], table: dict[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """A trace in which nothing writes into what it makes.

    A composite operation may write below the transform: its parts are above it the second time.
    """
    for _ in range(2):
        pure = torch.func.functionalize(function, remove="mutations")
        made: fx.GraphModule = make_fx(pure, decomposition_table=table)(*inputs)
        if not any(map(_mutates, made.graph.nodes)):
            break
        function = fx.Interpreter(made).run
    return made


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class _Region:
    """The region as a function of its logits and inputs."""

    def __init__(
        self, module: fx.GraphModule, products: Sequence[fx.Node], work: torch.dtype
    ) -> None:
        self.module, self.products, self.work = module, list(products), work

    def __call__(self, *args: Any) -> Any:
        zs, inputs = args[: len(self.products)], args[len(self.products) :]
        wide = [
            value.to(self.work)
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dtype.itemsize < self.work.itemsize
            else value
            for value in inputs
        ]
        return _Rerun(self.module, dict(zip(self.products, zs)), self.work).run(*wide)


class _Rerun(fx.Interpreter):
    """Runs a region with its products' values given, marking what no gradient passes."""

    def __init__(
        self, module: fx.GraphModule, known: dict[fx.Node, Tensor], work: torch.dtype
    ) -> None:
        super().__init__(module)
        self.known, self.work = known, work

    def run_node(self, n: fx.Node) -> Any:
        if n in self.known:
            z, bias = self.known[n], bias_of(n)
            # A copy: what the program writes into its logits is not written into an input.
            return z.clone() if bias is None else z + self.env[bias]
        if n.target is aten.detach.default:
            return cut(self.env[n.args[0]])  # type: ignore[index]
        if n.target is aten.one_hot.default:
            # Decomposed, it is a comparison with 0, 1, ..., which takes any number.
            numbers, *end = self.fetch_args_kwargs_from_env(n)[0]
            if end and end[0] >= 0:
                numbers = in_range(numbers, end[0])
            return aten.one_hot.default(numbers, *end)
        if _leads_to_product(n, self.known):
            return None
        if n.target in _COMPARISONS:
            (one, other), _ = self.fetch_args_kwargs_from_env(n)
            return n.target(*map(self._as_stored, n.args, (one, other)))  # type: ignore[operator]
        return super().run_node(n)

    def _as_stored(self, arg: Any, value: Any) -> Any:
        """An operand of a comparison, rounded as the user's program has it."""
        stored = arg.meta["val"].dtype if isinstance(value, Tensor) else self.work
        if not stored.is_floating_point or stored.itemsize >= self.work.itemsize:
            return value
        return rounded(cut(value), stored)


def bias_of(product: fx.Node) -> fx.Node | None:
    """The bias operand of a product: an input of the program, added to its logits."""
    args: Any = product.args
    if product.target is aten.addmm.default:
        return args[0]  # type: ignore[no-any-return]
    elmo = torch.ops.elmo
    has = product.target in (
        aten.linear.default, elmo.lowp_linear.default, elmo.sharded_linear.default
    )  # fmt: skip
    return args[2] if has and len(args) > 2 else None


def _leads_to_product(node: fx.Node, known: dict[fx.Node, Tensor]) -> bool:
    """Whether a node serves the products alone: a view of their weight, rows of their features."""
    if node.op != "call_function" or not node.users:
        return False
    return all(user in known or _leads_to_product(user, known) for user in node.users)


def _differentiable(
    forward: fx.GraphModule, zs: Sequence[Tensor], values: Sequence[Any], wanted: Sequence[int]
) -> list[int]:
    """Which results a gradient may be asked of."""
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in zs]
        inputs = _leaves(values, wanted)
        results = fx.Interpreter(forward).run(*leaves, *inputs)
    return [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.requires_grad]


def _leaves(values: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    return [
        value.detach().requires_grad_() if i in wanted else value for i, value in enumerate(values)
    ]


class _Joint:
    """Results, and the gradients of logits and wanted inputs (None where there is none)."""

    def __init__(
        self,
        forward: fx.GraphModule,
        num_products: int,
        num_inputs: int,
        diff: Sequence[int],
        wanted: Sequence[int],
    ) -> None:
        self.forward, self.num_products, self.num_inputs = forward, num_products, num_inputs
        self.diff, self.wanted = diff, wanted

    def __call__(self, *args: Any) -> Any:
        with torch.enable_grad():
            zs = [z.detach().requires_grad_() for z in args[: self.num_products]]
            rest = args[self.num_products :]
            inputs = _leaves(rest[: self.num_inputs], self.wanted)
            results = fx.Interpreter(self.forward).run(*zs, *inputs)
            ends = [results[i] for i in self.diff]
            leaves = zs + [inputs[i] for i in self.wanted]
            grads = torch.autograd.grad(
                ends, leaves, list(rest[self.num_inputs :]), allow_unused=True
            )
        return list(results) + list(grads)


@contextlib.contextmanager
def _without_autocast() -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        yield


@contextlib.contextmanager
def _without_callers() -> Any:
    """What is saved while tracing is nobody's: not counted by a checkpoint around the first call,
    nor offloaded (of such hooks the innermost are called), nor watched for NaN."""
    hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with hooks, torch.autograd.set_detect_anomaly(False):
        yield


def _same(saved: Tensor) -> Tensor:
    return saved


def _pure(module: fx.GraphModule) -> None:
    """Make a trace self-contained: constants written out, writes into fresh values functional."""
    graph = module.graph
    for node in graph.find_nodes(op="get_attr"):
        _write_out(module, node)
    for node in list(graph.nodes):
        if not _mutates(node):
            continue
        target = node.args[0]
        if node.target is not aten.copy_.default or target.op == "placeholder":
            raise Unsupported(node, "this write in place is not understood", "write out of place")
        new: Any = node.args[1]
        into, value = target.meta["val"], new.meta["val"]
        with graph.inserting_before(node):
            if value.dtype != into.dtype or tuple(value.shape) != tuple(into.shape):
                zeros = graph.call_function(aten.zeros_like.default, (target,))
                zeros.meta = dict(node.meta)
                cast = graph.call_function(aten._to_copy.default, (new,), {"dtype": into.dtype})
                cast.meta = dict(node.meta)
                cast.meta["val"] = value.to(into.dtype)
                new = graph.call_function(aten.add.Tensor, (zeros, cast))
                new.meta = dict(node.meta)
        later = False
        for other in list(graph.nodes):
            if other is node:
                later = True
            elif later:
                other.replace_input_with(target, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _row_sizes(traced: fx.GraphModule, num_logits: int) -> None:
    """Compute sizes from those of inputs where the trace asked values made from logits."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    graph = traced.graph
    places = list(graph.find_nodes(op="placeholder"))
    inputs, last = places[num_logits:], places[-1]
    known = _symbols(inputs)
    asked = [
        node
        for target in (aten.sym_size.int, aten.sym_numel.default)
        for node in graph.find_nodes(op="call_function", target=target)
        if node.args[0] not in inputs or target is aten.sym_numel.default
    ]
    tracer = fx.proxy.GraphAppendingTracer(graph)
    for node in asked:
        expr = node.meta["val"].node.expr
        if not all(symbol in known for symbol in expr.free_symbols):
            continue
        with graph.inserting_after(last):
            env = {symbol: _proxy(graph, known[symbol], tracer) for symbol in expr.free_symbols}
        last_size = max((p.node for p in env.values()), key=list(graph.nodes).index, default=last)
        before = set(graph.nodes)
        with graph.inserting_before(last_size.next):
            made = sympy_interp(PythonReferenceAnalysis, env, expr)
        for new in graph.nodes:
            if new not in before:
                new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made.node if isinstance(made, fx.Proxy) else made)
        graph.erase_node(node)
    graph.lint()


def _symbols(inputs: Sequence[fx.Node]) -> dict[Any, tuple[fx.Node, int | None]]:
    """Where a symbolic size is found: an input, and a dimension where that is a tensor."""
    found: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in inputs:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            found.setdefault(value.node.expr, (node, None))
        elif isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (node, dim))
    return found


def _proxy(graph: fx.Graph, where: tuple[fx.Node, int | None], tracer: Any) -> fx.Proxy:
    node, dim = where
    if dim is not None:
        size = graph.call_function(aten.sym_size.int, (node, dim))
        size.meta["val"] = node.meta["val"].shape[dim]
        node = size
    return fx.Proxy(node, tracer)


def _write_out(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a constant of one element by a number."""
    constant = getattr(module, str(node.target))
    known = getattr(constant, "constant", constant)
    if not isinstance(known, Tensor) or known.numel() != 1:
        raise Unsupported(
            node, "a constant tensor is made between the head and its loss",
            "pass it as an argument or a buffer",
        )  # fmt: skip
    with module.graph.inserting_before(node):
        made = module.graph.call_function(
            aten.full.default,
            (list(known.shape), known.item()),
            {"dtype": known.dtype, "device": constant.device},
        )
    made.meta = dict(node.meta)
    made.meta["val"] = constant
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
