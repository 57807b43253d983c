"""From a retraced region to a registered program."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.programs.extent import Extents
from elmo_compile.programs.record import Program, Schedule, Unsupported, register
from elmo_compile.programs.schedule import live_values, schedule
from elmo_compile.programs.simplify import simplify
from elmo_compile.programs.trace import Traced, bias_of, trace

aten = torch.ops.aten


def build(
    module: fx.GraphModule,
    products: Sequence[fx.Node],
    *,
    num_outputs: int,
    name: str,
    wanted: Sequence[int],
    grad: bool,
    work: torch.dtype,
    mode: Any,
) -> Program:
    """Make and register the program of a region.

    Args:
        module: the region in pre-dispatch ATen; its placeholders are the program's inputs.
        products: the heads' products in it.
        num_outputs: L.
        name: the loss, for reports.
        wanted: positions of the inputs that take a gradient (not the operands of products).
        grad: whether autograd records the region.
        work: arithmetic precision, float32 or float64.
        mode: the fake mode of the module's values.

    Raises:
        Unsupported: the node that cannot be done in chunks.
    """
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    traced = trace(module, products, values, wanted, grad=grad, work=work, mode=mode)
    graph = traced.graph
    places = list(graph.find_nodes(op="placeholder"))
    logits = places[: traced.num_products]
    _check_operands(
        products, places[traced.num_products :], list(module.graph.find_nodes(op="placeholder"))
    )
    extents = simplify(graph, num_outputs, logits, mode)
    ends: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    results, grads = ends[: traced.num_results], ends[traced.num_results :]
    for result in results:
        if not isinstance(result, fx.Node):
            raise Unsupported(None, "a result is a constant", "return it from outside the region")
    reached = [i for i, g in zip(traced.wanted, grads[traced.num_products :]) if g is not None]
    trained = [i for i, g in enumerate(grads[: traced.num_products]) if g is not None]
    grads = grads[: traced.num_products] + [
        g for g in grads[traced.num_products :] if g is not None
    ]
    saved = _saved(extents, results, grads) if grads else []
    forward = _forward(graph, extents, logits, traced, results + saved, work)
    backward = _backward(graph, traced, saved, grads, num_outputs, work) if grads else None
    text = f"{forward_text(graph)}|{num_outputs}|{work}|{traced.wanted}|{torch.__version__}"
    tensors, sizes = _read(places[traced.num_products :][: traced.num_inputs], values, reached)
    walks = forward.walks + (backward.walks if backward is not None else ())
    program = Program(
        key=hashlib.sha256(text.encode()).hexdigest()[:20],
        name=name,
        num_outputs=num_outputs,
        forward=forward,
        num_results=traced.num_results,
        differentiable=traced.differentiable,
        backward=backward,
        wanted=tuple(reached),
        trained=tuple(trained),
        shapes=_shapes(graph, traced, results + saved),
        live=live_values(walks),
        tensors=tensors,
        sizes=sizes,
        count=traced.num_inputs,
    )
    register(program)
    return program


def _read(
    places: Sequence[fx.Node], values: Sequence[Any], wanted: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the inputs that are read: tensors, and sizes."""
    used = [i for i, node in enumerate(places) if node.users or i in wanted]
    tensors = tuple(i for i in used if isinstance(values[i], torch.Tensor))
    return tensors, tuple(i for i in used if i not in tensors)


def forward_text(graph: fx.Graph) -> str:
    """What identifies a graph: its operations, and the dtypes and shapes they give. Where a value
    is cut into chunks follows from its shape."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = (str(size) if isinstance(size, int) else "s" for size in value.shape)
            kind = f"{value.dtype}[{','.join(sizes)}]"
        else:
            kind = type(value).__name__
        lines.append(f"{node.name}={node.target}({node.args},{node.kwargs}):{kind}")
    return "\n".join(lines)


def _check_operands(
    products: Sequence[fx.Node], traced: Sequence[fx.Node], places: Sequence[fx.Node]
) -> None:
    """The operands of a product may not be read by what follows it: a gradient would be lost."""
    for product in products:
        bias = bias_of(product)
        roots = [_viewed(arg) for arg in product.all_input_nodes if arg is not bias]
        for root in roots:
            for user in traced[places.index(root)].users if root in places else ():
                if user.target is not aten.sym_size.int:
                    raise Unsupported(
                        user, "the loss reads the features or the weight as well as the logits",
                        "compute that term outside the function that holds the head",
                    )  # fmt: skip


def _viewed(node: fx.Node) -> fx.Node:
    """What an operand is a view or a cast of, which takes the operand's gradient."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _saved(extents: Extents, results: list[Any], grads: list[Any]) -> list[fx.Node]:
    """Reductions the results need and the gradients need too: kept from forward to backward."""
    first, second = _ancestors(results), _ancestors([g for g in grads if g is not None])
    both = [node for node in first if node in second and extents.reduces(node)]
    return [n for n in both if isinstance(n.meta["val"], torch.Tensor)]


def _ancestors(nodes: Sequence[Any]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = dict.fromkeys(n for n in nodes if isinstance(n, fx.Node))
    work = list(found)
    while work:
        for arg in work.pop().all_input_nodes:
            if arg not in found:
                found[arg] = None
                work.append(arg)
    return found


def _forward(
    graph: fx.Graph,
    extents: Extents,
    logits: list[fx.Node],
    traced: Traced,
    outputs: list[fx.Node],
    work: torch.dtype,
) -> Schedule:
    made = schedule(graph, extents, logits, outputs, gradients=0, work=work)
    inputs = made.inputs[: traced.num_inputs]
    return Schedule(inputs, made.steps, made.outputs)


def _backward(
    graph: fx.Graph,
    traced: Traced,
    saved: list[fx.Node],
    grads: list[Any],
    num_outputs: int,
    work: torch.dtype,
) -> Schedule:
    """The gradients, from inputs, saved reductions and results, and upstream gradients."""
    new, mapping = fx.Graph(), {}
    old = list(graph.find_nodes(op="placeholder"))
    split = traced.num_products + traced.num_inputs
    for node in old[:split]:
        mapping[node] = new.node_copy(node)
    for node in saved:
        mapping[node] = new.placeholder(f"saved_{node.name}")
        mapping[node].meta = dict(node.meta)
    for node in old[split:]:
        mapping[node] = new.node_copy(node)
    needed = _ancestors_until([g for g in grads if g is not None], set(saved))
    for node in graph.nodes:
        if node in needed and node not in mapping:
            mapping[node] = new.node_copy(node, mapping.__getitem__)
    new.output(tuple(None if g is None else mapping[g] for g in grads))
    logits = [mapping[node] for node in old[: traced.num_products]]
    extents = Extents(new, num_outputs, logits)
    ends = [None if g is None else mapping[g] for g in grads]
    return schedule(new, extents, logits, ends, gradients=traced.num_products, work=work)


def _ancestors_until(nodes: Sequence[fx.Node], stops: set[fx.Node]) -> set[fx.Node]:
    found, work = set(nodes), list(nodes)
    while work:
        node = work.pop()
        if node in stops:
            continue
        for arg in node.all_input_nodes:
            if arg not in found:
                found.add(arg)
                work.append(arg)
    return found


def _shapes(graph: fx.Graph, traced: Traced, outputs: list[fx.Node]) -> fx.GraphModule:
    """The results and saved values as a function of logits and inputs, for fake tensors."""
    new, mapping = fx.Graph(), {}
    for node in list(graph.find_nodes(op="placeholder"))[: traced.num_products + traced.num_inputs]:
        mapping[node] = new.node_copy(node)
    needed = _ancestors(outputs)
    for node in graph.nodes:
        if node in needed and node not in mapping:
            mapping[node] = new.node_copy(node, mapping.__getitem__)
    new.output(tuple(mapping[node] for node in outputs))
    return fx.GraphModule(torch.nn.Module(), new)
