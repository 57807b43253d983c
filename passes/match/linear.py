"""Rules for the product with the weight and for what may stand between it and the loss.

`linear`, `matmul`, `mm`, `addmm`, `einsum` and the op of a converted head all become `Logits`;
casts, views and row slices of logits are remembered as operations on the rows of x, with which the
product commutes: (S x) W^T = S (x W^T) for any rearrangement or selection S of rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import args_of, hint, hints, tensor_of
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.match.state import Kind, Logits, WeightView
from elmo_compile.passes.records import RowOp
from elmo_compile.report.records import Code

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.other})
SAME = frozenset(
    {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh.default}
)
_TRANSPOSES = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.permute.default,
    }
)
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def linear_head(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """x W^T (+ b) in any spelling -> Logits."""
    target, args = node.target, args_of(node)
    x: Any
    w: Any
    bias: Any = None
    if target is aten.linear.default:
        x, w, bias = args[0], args[1], args[2] if len(args) > 2 else None
        weight = _weight(w, kinds, want_transposed=False)
    elif target is torch.ops.elmo.lowp_linear.default:
        x, w, bias = args[:3]
        weight = _weight(w, kinds, want_transposed=False)
    elif target in (aten.matmul.default, aten.mm.default):
        x, w = args
        weight = _weight(w, kinds, want_transposed=True)
    elif target is aten.addmm.default and not any(
        node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")
    ):
        bias, x, w = args
        weight = _weight(w, kinds, want_transposed=True)
    elif target is aten.einsum.default:
        x, weight = _einsum(node, kinds, L)
    else:
        return None
    if weight is None or not isinstance(x, fx.Node) or x in kinds:
        raise NoMatch(
            Code.WEIGHT_COMPUTED,
            node,
            "the weight of this product is not a [num_outputs, num_features] tensor of its own",
            "store the head's weight as a Parameter of shape [num_outputs, num_features]",
        )
    _check_bias(node, bias, L)
    out = tensor_of(node)
    assert out is not None
    return Logits(x=x, weight=weight, bias=bias, compute_dtype=out.dtype)


def weight_view(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """`w.t()`, `w.T`, `w.mT`, casts of w -> WeightView."""
    source = args_of(node)[0] if args_of(node) else None
    if not isinstance(source, fx.Node):
        return None
    known = kinds.get(source)
    if known is None and source.op == "placeholder":
        tensor = tensor_of(source)
        if tensor is not None and tensor.ndim == 2 and hint(tensor.shape[0]) == L:
            known = WeightView(source, False)
    if not isinstance(known, WeightView):
        return None
    if node.target in _TRANSPOSES:
        before, after = tensor_of(source), tensor_of(node)
        assert before is not None
        assert after is not None
        swapped = hints(before.shape) == hints(after.shape)[::-1]
        dims = args_of(node)[1:]
        identity = node.target is aten.permute.default and list(dims[0]) in ([0, 1], [-2, -1])
        if node.target is aten.transpose.int and dims[0] == dims[1]:
            identity = True
        return known if identity or not swapped else WeightView(known.node, not known.transposed)
    if node.target in CASTS and not _keeps_values(node, kinds):
        return None
    return known if node.target in CASTS or node.target in SAME else None


def add_bias(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """logits + b, b of shape [L] -> Logits with a bias."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    for logits, other in (args_of(node), args_of(node)[::-1]):
        known = kinds.get(logits) if isinstance(logits, fx.Node) else None
        tensor = tensor_of(other)
        if isinstance(known, Logits) and tensor is not None and hints(tensor.shape) == (L,):
            if known.bias is not None or known.class_dim != "last" or other in kinds:
                return None
            return dataclasses.replace(known, bias=other)
    return None


def rearranged_rows(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """Casts, views, transposes and slices of logits that keep every output -> Logits."""
    source = args_of(node)[0] if args_of(node) else None
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    before, after = tensor_of(source), tensor_of(node)
    if not isinstance(known, Logits) or before is None or after is None:
        return None
    target, rank = node.target, before.ndim
    if target in CASTS:
        if not _keeps_values(node, kinds):
            return None
        return dataclasses.replace(known, upcast=known.upcast or after.itemsize > before.itemsize)
    if target in SAME:
        return known
    if known.class_dim == "second":
        return None
    if target in _TRANSPOSES:
        return _transposed(known, node, rank)
    if hints(after.shape)[-1:] != (L,):
        return None
    if target in _VIEWS:
        D = _features(known)
        return _with(known, RowOp(aten.reshape.default, ([*args_of(node)[1][:-1], D],)))
    if target is aten.flatten.using_ints:
        start, end = (dim % rank for dim in (*args_of(node)[1:3], 0, -1)[:2])
        return _with(known, RowOp(target, (start, end))) if end < rank - 1 else None
    if target in (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim):
        dim = args_of(node)[1] if len(args_of(node)) > 1 else 0
        dim = dim + rank + (target is aten.unsqueeze.default) if dim < 0 else dim
        if dim >= rank - (target is not aten.unsqueeze.default):
            return known if _keeps_all(node, L) else None
        return _with(known, RowOp(target, (dim, *args_of(node)[2:])))
    if target is aten.index.Tensor and len(args_of(node)[1]) < rank:
        return _with(known, RowOp(target, tuple(args_of(node)[1:])))
    if target in (aten.index_select.default,) and args_of(node)[1] % rank != rank - 1:
        return _with(known, RowOp(target, tuple(args_of(node)[1:])))
    return None


def _keeps_values(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether a cast is one that a product's operand dtype accounts for.

    Not: to another device, to integers, or wider after a cast that was narrower (a rounding the
    program asked for, such as a simulated quantization).
    """
    source = args_of(node)[0]
    before, after = tensor_of(source), tensor_of(node)
    assert before is not None
    assert after is not None
    if not after.is_floating_point() or before.device != after.device:
        return False
    return after.itemsize <= before.itemsize or not _was_narrowed(source, kinds)


def _was_narrowed(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether logits, or a weight, were cast to fewer bytes on the way to `node`."""
    known, now = kinds.get(node), tensor_of(node)
    if known is None or now is None:
        return False
    for source in node.all_input_nodes:
        before = tensor_of(source)
        narrower = before is not None and before.itemsize > now.itemsize
        of_interest = type(kinds.get(source)) is type(known) or source.op == "placeholder"
        if of_interest and node.target in CASTS and narrower:
            return True
        if type(kinds.get(source)) is type(known) and _was_narrowed(source, kinds):
            return True
    return False


def _with(logits: Logits, op: RowOp) -> Logits:
    return dataclasses.replace(logits, row_ops=(*logits.row_ops, op))


def _keeps_all(node: fx.Node, L: int) -> bool:
    """`z[..., :]`: a slice of the outputs that keeps all of them."""
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (*args_of(node)[2:5], None, None, None)[:3]
    return (
        start in (0, None)
        and step in (1, None)
        and (end is None or (isinstance(end, int) and end >= L))
    )


def _transposed(known: Logits, node: fx.Node, rank: int) -> Logits | None:
    """A permutation of rows, or one that moves the outputs to dimension 1 (torch's class dim)."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in args_of(node)[1]]
    elif node.target is aten.transpose.int:
        a, b = (dim % rank for dim in args_of(node)[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = (
            order[::-1] if node.target is not aten.mT.default else [*order[:-2], rank - 1, rank - 2]
        )
    where = order.index(rank - 1)
    rows = [dim for dim in order if dim != rank - 1]
    if where not in (1, rank - 1) or rank < 2:
        return None
    moved = known
    if rows != sorted(rows):
        moved = _with(known, RowOp(aten.permute.default, ([*rows, rank - 1],)))
    return dataclasses.replace(moved, class_dim="last" if where == rank - 1 else "second")


def _features(logits: Logits) -> int:
    x = tensor_of(logits.x)
    assert x is not None
    return hint(x.shape[-1])


def _weight(node: Any, kinds: dict[fx.Node, Kind], *, want_transposed: bool) -> fx.Node | None:
    """The [L, D] node behind a product's weight operand, or None."""
    known = kinds.get(node) if isinstance(node, fx.Node) else None
    if isinstance(known, WeightView):
        return known.node if known.transposed == want_transposed else None
    if isinstance(node, fx.Node) and node.op == "placeholder" and not want_transposed:
        tensor = tensor_of(node)
        return node if tensor is not None and tensor.ndim == 2 else None
    return None


def _einsum(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> tuple[Any, fx.Node | None]:
    """`bd,vd->bv` with any letters and either operand order."""
    equation, operands = args_of(node)[0].replace(" ", ""), list(args_of(node)[1])
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if len(operands) != 2 or len(terms) != 2 or not out or "." in equation:
        return None, None
    for (x, x_term), (w, w_term) in (
        tuple(zip(operands, terms)),
        tuple(zip(operands[::-1], terms[::-1])),
    ):
        if len(set(w_term)) != 2 or len(w_term) != 2 or len(set(x_term)) != len(x_term):
            continue
        for wanted in (False, True):
            label, contracted = w_term if not wanted else w_term[::-1]
            if x_term[-1:] == contracted and out == x_term[:-1] + label:
                weight = _weight(w, kinds, want_transposed=wanted)
                if weight is not None:
                    return x, weight
    return None, None


def _check_bias(node: fx.Node, bias: Any, L: int) -> None:
    tensor = tensor_of(bias)
    if bias is not None and (tensor is None or hints(tensor.shape) != (L,)):
        raise NoMatch(
            Code.UNSUPPORTED_SHAPE,
            node,
            "the bias is not a vector with one element an output",
            "give the head a bias of shape [num_outputs]",
        )
