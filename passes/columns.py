"""Columns: outputs that are cut off behind a product are cut off its weight instead.

`logits[..., :V - 64]` leaves out the rows a vocabulary is padded with, `logits[:, 1:]` a padding
item. The product with `w[a:b]` has the same values, and zeros in the gradient of the other rows.

Requires: a Dynamo graph (a copy: it is edited).
Ensures: where the only reader of a product, of casts of it or of it with a bias is one slice of the
last dimension, with known ends and step 1, the product takes the slice of its weight. Nothing else
changes.
Numerics: none.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx
from torch.nn import functional

from elmo_compile.passes.find import seed_outputs
from elmo_compile.passes.graphs import sites, tensor_of
from elmo_compile.passes.modes import grad_modes

_LINEAR = frozenset({functional.linear})
_MATMUL = frozenset({operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__"})
_ADDMM = frozenset({torch.addmm})
_CASTS = frozenset({"float", "double", "half", "bfloat16", "to", "contiguous"})
_POINTWISE = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul,
     torch.div, "add", "sub", "mul", "div"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """A product, what is computed from it element by element, and the slice behind that."""

    product: fx.Node
    chain: tuple[fx.Node, ...]
    cut: fx.Node
    rest: Any
    """The index of the other dimensions, or None where they are whole."""
    start: int
    end: int


def cut_weights(
    module: fx.GraphModule, min_outputs: int, leave: Collection[str] = ()
) -> tuple[fx.Node, ...]:
    """Edit `module`, bodies under checkpoints included; the products that read less than before.

    Args:
        leave: names of products to leave as they are.
    """
    changed: list[fx.Node] = []
    for site in sites(module):
        grad = grad_modes(site.graph)
        for node in list(site.graph.nodes):
            if node.name in leave or seed_outputs(node, min_outputs) is None:
                continue
            found = _find(node)
            if found is None or found.end - found.start < min_outputs:
                continue
            if len({grad[n] for n in (node, *found.chain, found.cut)}) == 1:
                _rewrite(found)
                changed.append(node)
    return tuple(changed)


def _find(product: fx.Node) -> _Cut | None:
    shape = _shape(product)
    if not _known(product) or not isinstance(shape[-1], int):
        return None
    chain: list[fx.Node] = []
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        cut = _sliced(user, node)
        if cut is not None:
            return _Cut(product, tuple(chain), user, *cut)
        if not _elementwise(user, node, shape[-1]):
            return None
        chain.append(user)
        node = user
    return None


def _known(product: fx.Node) -> bool:
    """Whether a product is spelled in a way that says which operand is the weight."""
    given = len(product.args)
    return (
        (product.target in _LINEAR and given in (2, 3))
        or (product.target in _MATMUL and given == 2)
        or (product.target in _ADDMM and given == 3)
    )


def _elementwise(node: fx.Node, source: fx.Node, outputs: int) -> bool:
    """Casts of a source, and sums and products with what has its outputs or none."""
    if node.op == "call_method" and node.target in _CASTS:
        return node.args[0] is source and len(node.all_input_nodes) == 1
    if node.target not in _POINTWISE or node.args.count(source) != 1 or "out" in node.kwargs:
        return False
    if _shape(node) != _shape(source):
        return False
    tensors = [arg for arg in node.all_input_nodes if tensor_of(arg) is not None]
    return all(not _shape(arg) or _shape(arg)[-1] in (1, outputs) for arg in tensors)


def _sliced(node: fx.Node, source: fx.Node) -> tuple[Any, int, int] | None:
    """The other dimensions' index, start and end, where a node cuts the last dimension only."""
    rank, outputs = len(_shape(source)), _shape(source)[-1]
    args: Any = node.args
    if node.target in ("narrow", torch.narrow) and len(args) == 4:
        _, dim, start, length = args
        plain = all(isinstance(value, int) for value in args[1:])
        if not plain or dim % rank != rank - 1 or start < 0:
            return None
        return None, start, start + length
    if node.target is not operator.getitem or args[0] is not source:
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(part is None or isinstance(part, slice | int) or part is ... for part in index):
        return None
    dims = sum(isinstance(part, slice | int) for part in index)
    last = index[-1] if ... in index[:-1] or dims == rank else None
    if not isinstance(last, slice) or not _plain(last) or last.step not in (None, 1):
        return None
    start, end, _ = last.indices(outputs)
    if (start, end) == (0, outputs) or end <= start:
        return None
    rest = (*index[:-1], slice(None))
    whole = all(part is ... or part == slice(None) for part in rest)
    return None if whole else rest, start, end


def _plain(index: slice) -> bool:
    parts = (index.start, index.stop, index.step)
    return all(part is None or isinstance(part, int) for part in parts)


def _rewrite(found: _Cut) -> None:
    product, start, end = found.product, found.start, found.end
    args: list[Any] = list(product.args)
    outputs = _shape(product)[-1]
    if product.target in _LINEAR:
        args[1] = _rows(product, args[1], start, end)
        args[2:] = [_last(product, bias, outputs, start, end) for bias in args[2:]]
        bias = product.kwargs.get("bias")
        if bias is not None:
            product.kwargs = {
                **product.kwargs, "bias": _last(product, bias, outputs, start, end)
            }  # fmt: skip
    else:
        if product.target in _ADDMM:
            args[0] = _last(product, args[0], outputs, start, end)
        turned = _call(product, "t", args[-1])
        args[-1] = _call(product, "t", _rows(product, turned, start, end))
    product.args = tuple(args)
    for node in found.chain:
        others = [arg for arg in node.all_input_nodes if arg is not product]
        for other in others:
            if other not in found.chain:
                node.replace_input_with(other, _last(node, other, outputs, start, end))
    for node in (product, *found.chain):
        node.meta["example_value"] = _narrowed(tensor_of(node), start, end)
    source: Any = found.cut.args[0]
    if found.rest is None:
        found.cut.replace_all_uses_with(source)
        found.cut.graph.erase_node(found.cut)
    else:
        found.cut.target, found.cut.args = operator.getitem, (source, found.rest)


def _rows(before: fx.Node, weight: fx.Node, start: int, end: int) -> fx.Node:
    return _call(before, operator.getitem, weight, slice(start, end))


def _last(before: fx.Node, value: Any, outputs: int, start: int, end: int) -> Any:
    """The outputs from start to end of an operand that has them; others as they are."""
    if tensor_of(value) is None or _shape(value)[-1:] != (outputs,):
        return value
    return _call(before, operator.getitem, value, (..., slice(start, end)))


def _call(before: fx.Node, target: Any, source: fx.Node, *args: Any) -> fx.Node:
    """A call in front of a node, with its fake value."""
    fake = tensor_of(source)
    assert fake is not None
    with before.graph.inserting_before(before):
        if isinstance(target, str):
            made, value = before.graph.call_method(target, (source,)), getattr(fake, target)()
        else:
            made, value = before.graph.call_function(target, (source, *args)), target(fake, *args)
    made.meta = {**before.meta, "example_value": value}
    return made


def _narrowed(fake: torch.Tensor | None, start: int, end: int) -> torch.Tensor:
    assert fake is not None
    with torch.set_grad_enabled(fake.requires_grad):
        return fake[..., start:end].contiguous()


def _shape(node: fx.Node) -> tuple[Any, ...]:
    fake = tensor_of(node)
    return () if fake is None else tuple(fake.shape)
